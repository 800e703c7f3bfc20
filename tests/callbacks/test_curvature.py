"""Hessian products on a part of the batch: unbiased, harmless, and refused where they are wrong."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, NonNegative, Offload, Positive
from lightning_rtho.callbacks._curvature import CurvatureSample
from lightning_rtho.hypergradient import forward_cost, reverse_cost
from tests.callbacks.problems import FEATURES, SmallNet, fit, loader

METHODS: dict[str, Callable[..., RTHO | TRHO]] = {
    "RTHO": RTHO,
    "TRHO": TRHO,
    "offload": partial(TRHO, tape=Offload("cpu")),
}
every_method = pytest.mark.parametrize("method", METHODS)


def make_module(
    optimizer: type[torch.optim.Optimizer] = torch.optim.SGD, **settings: Any
) -> SmallNet:
    settings = {"lr": Hyperparameter(0.05, Positive()), **settings}
    return SmallNet(optimizer, l2=Hyperparameter(0.01, NonNegative()), **settings)


def observe(
    method: str, fraction: float, module: L.LightningModule | None = None, **settings: Any
) -> Tensor:
    """Hypergradients ``[updates, m]`` of a run whose hyperparameters stay where they are."""
    module = make_module(momentum=0.9) if module is None else module
    callback = METHODS[method](
        hyper_batch_size=3, outer_optimizer=None, curvature_fraction=fraction
    )
    fit(module, callback, steps=9, **settings)
    return torch.stack([
        torch.stack([*update.hypergradients.values()]) for update in callback.schedule
    ])


def repeated_rows(size: int = 4) -> DataLoader:
    """Batches of one example each, again and again."""
    (x, y) = next(iter(loader(5, seed=1, batch_size=5)))
    return DataLoader(
        TensorDataset(x.repeat_interleave(size, 0), y.repeat_interleave(size, 0)), batch_size=size
    )


@every_method
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
    ],
)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_part_of_a_batch_of_equal_examples_is_as_good_as_the_whole(method, settings, optimizer):
    found, expected = (
        observe(method, fraction, make_module(optimizer), train=repeated_rows(), **settings)
        for fraction in (0.5, 1.0)
    )
    # Means of two and of four equal numbers differ by rounding, which nine steps enlarge.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)


@every_method
def test_products_are_unbiased(method, monkeypatch):
    """A hypergradient is linear in the product of one step: its mean over all draws is exact."""
    batch = next(iter(loader(4, seed=3, batch_size=4)))

    def hypergradient(fraction: float, rows: tuple[int, ...] = ()) -> Tensor:
        def draw(self: CurvatureSample, batch: list[Tensor], *place: int) -> list[Tensor]:
            return [x[list(rows)] for x in batch]

        monkeypatch.setattr(CurvatureSample, "draw", draw)
        callback = METHODS[method](
            hyper_batch_size=2, outer_optimizer=None, curvature_fraction=fraction
        )
        module = make_module(momentum=0.9)
        fit(module, callback, steps=2, train=DataLoader(TensorDataset(*batch), batch_size=4))
        return torch.stack([*callback.hypergradients.values()])

    draws = [hypergradient(0.5, rows) for rows in itertools.combinations(range(4), 2)]
    exact = hypergradient(1.0)
    assert torch.stack(draws).std(0).min() > 1e-3 * exact.abs().min()  # that depends on the draw
    torch.testing.assert_close(torch.stack(draws).mean(0), exact, rtol=1e-10, atol=1e-14)


@every_method
def test_observing_leaves_training_bitwise_as_it_was(method):
    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.3), nn.Tanh(), nn.Linear(4, 1))

    def weights(*callbacks: L.Callback) -> Tensor:
        module = make_module(body=body)
        fit(module, *callbacks, steps=7)
        return torch.cat([param.detach().flatten() for param in module.parameters()])

    callback = METHODS[method](hyper_batch_size=2, outer_optimizer=None, curvature_fraction=0.5)
    assert torch.equal(weights(callback), weights())
    assert len(callback.schedule) == 3


@every_method
def test_resumed_run_goes_on_bitwise(method, tmp_path):
    train = loader(20, seed=1, batch_size=4)

    def run(ckpt_path: str | None, seed: int) -> tuple[Tensor, Tensor]:
        callback = METHODS[method](hyper_batch_size=3, curvature_fraction=0.5)
        module = make_module(momentum=0.9)
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=15,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                callback,
                ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1),
            ],
        )
        trainer.fit(module, train, loader(6, seed=2, batch_size=6), ckpt_path=ckpt_path)
        weights = torch.cat([param.detach().flatten() for param in module.parameters()])
        return weights, torch.stack([*callback.hyperparameters.values()])

    whole = run(None, seed=3)
    resumed = run(str(tmp_path / "step=5.ckpt"), seed=4)
    assert all(map(torch.equal, whole, resumed))


def test_draws_depend_on_seed_process_and_place_alone():
    torch.manual_seed(5)
    batch = [torch.arange(100), {"targets": torch.arange(100) * 2, "name": "x"}, torch.ones(3)]
    sample, other = CurvatureSample(0.25, rank=0), CurvatureSample(0.25, rank=1)
    drawn = sample.draw(batch, 7, 2)
    torch.rand(1)
    again = sample.draw(batch, 7, 2)
    assert len(drawn[0]) == 25
    assert torch.equal(drawn[0], again[0])
    assert torch.equal(drawn[1]["targets"], drawn[0] * 2)
    assert drawn[1]["name"] == "x"
    assert torch.equal(drawn[2], torch.ones(3))
    for different in (sample.draw(batch, 8, 2), sample.draw(batch, 7, 3), other.draw(batch, 7, 2)):
        assert not torch.equal(drawn[0], different[0])


def test_every_example_is_drawn_equally_often():
    sample = CurvatureSample(0.25, rank=0)
    counts = torch.zeros(8)
    for step in range(4000):
        counts[sample.draw(torch.arange(8), step)] += 1
    # Binomial with p = 1/4: a standard deviation of 27 about 1000; five of them.
    assert (counts - 1000).abs().max() < 137


class Summed(SmallNet):
    """A loss that is a sum."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1], reduction="sum")


class Contrasted(SmallNet):
    """A loss in which examples meet."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.net(batch[0])
        return F.cross_entropy(-(outputs - outputs.T).square(), torch.arange(len(outputs)))


@every_method
@pytest.mark.parametrize("net", [Summed, Contrasted])
def test_loss_that_is_no_mean_over_examples_is_refused_before_a_weight_moves(method, net):
    module = net(lr=Hyperparameter(0.1, Positive()))
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(MisconfigurationException, match=r"`curvature_fraction`.*mean"):
        fit(module, METHODS[method](curvature_fraction=0.5))
    assert all(map(torch.equal, before, module.parameters()))


def test_batch_normalization_is_refused():
    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))

    with pytest.raises(MisconfigurationException, match=r"`curvature_fraction`.*normalization"):
        fit(make_module(body=body), RTHO(curvature_fraction=0.5))


def test_edited_gradients_are_found_out():
    class Edited(SmallNet):
        def on_after_backward(self) -> None:
            next(iter(self.parameters())).grad.mul_(1.1)

    for method in METHODS.values():
        callback = method(hyper_batch_size=2, curvature_fraction=0.5)
        with pytest.raises(Exception, match="gradient"):
            fit(Edited(lr=Hyperparameter(0.1, Positive())), callback)


def test_what_a_step_does_to_a_batch_leaves_examples_drawn_of_it_alone():
    class Weighted(SmallNet):
        def training_step(self, batch, batch_idx):
            *pair, weight = batch
            return weight.mul_(0.5) * super().training_step(pair, batch_idx)

    rows = repeated_rows().dataset
    collate = lambda pairs: [*default_collate(pairs), torch.tensor(1.0)]
    data = DataLoader(rows, batch_size=4, collate_fn=collate)
    found = []
    for settings in ({"tape": KeepGraph(), "start_step": 1}, {"curvature_fraction": 0.5}):
        callback = TRHO(["lr"], hyper_batch_size=3, outer_optimizer=None, **settings)
        fit(Weighted(lr=0.1), callback, steps=7, train=data)
        found.append([update.hypergradients["lr"] for update in callback.schedule])
    assert len(found[0]) == 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-13)  # as above


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, float("nan")])
def test_fraction_out_of_bounds_is_refused(fraction):
    for method in METHODS.values():
        with pytest.raises(ValueError, match="curvature_fraction"):
            method(curvature_fraction=fraction)


def test_kept_graphs_are_refused():
    with pytest.raises(ValueError, match=r"`tape`.*Recompute"):
        TRHO(tape=KeepGraph(), curvature_fraction=0.5)


def test_manual_optimization_is_refused():
    module = make_module()
    module.automatic_optimization = False
    with pytest.raises(MisconfigurationException, match="manual"):
        fit(module, RTHO(curvature_fraction=0.5))


def test_batch_of_one_example_is_taken_whole():
    found, expected = (
        observe("RTHO", fraction, train=loader(20, seed=1, batch_size=1)) for fraction in (0.5, 1.0)
    )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_cost_is_counted():
    # Plain 3 F; the sample's gradient 3/4 F; four products of 6/4 F.
    assert forward_cost(4, 0.25).passes == 3 + 0.75 + 6
    assert reverse_cost(4, recomputes=True, fraction=0.5).passes == 3 + 1.5 + 3 * 0.75
