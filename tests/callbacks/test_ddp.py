"""Two processes equal one with the same global batch, and hold the same values to the bit."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ProcessPoolExecutor, wait
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanSquaredError

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    KeepGraph,
    Offload,
    OuterUpdate,
    Positive,
    ReplaySchedule,
    Schedule,
)
from tests.callbacks.problems import FEATURES, SmallNet, fit, loader

METHODS = {
    "forward": lambda: RTHO(hyper_batch_size=3),
    "recompute": lambda: TRHO(hyper_batch_size=3),
    "keep graph": lambda: TRHO(hyper_batch_size=3, tape=KeepGraph()),
    "offload": lambda: TRHO(hyper_batch_size=3, tape=Offload("cpu")),
    # Of so few examples all are drawn: products are taken as on samples, and are exact.
    "forward, drawn": lambda: RTHO(hyper_batch_size=3, curvature_fraction=0.99),
    "reverse, drawn": lambda: TRHO(hyper_batch_size=3, curvature_fraction=0.99),
    "metric": lambda: RTHO(hyper_batch_size=3, objective=MeanSquaredError()),
}


Method = str | Callable[[], L.Callback]
"""A name among the methods, or what makes a callback."""


class Shared(SmallNet):
    """Adam, with a rate, a decay and an L2 coefficient to tune; data of its own."""

    def __init__(self, batch_size: int, unused: bool = False) -> None:
        super().__init__(
            optim.Adam,
            lr=Hyperparameter(0.01, Positive()),
            eps=1e-3,
            weight_decay=Hyperparameter(0.1, Positive()),
            l2=Hyperparameter(0.01, Positive()),
        )
        self.batch_size = batch_size
        if unused:
            self.net.unused = nn.Linear(2, 2)
            self.unused = True

    def setup(self, stage):
        torch.set_default_dtype(torch.float64)  # also in a process that has just begun

    def training_step(self, batch, batch_idx):
        if not hasattr(self, "unused"):
            return super().training_step(batch, batch_idx)
        x, y = batch
        used = self.net[:3]
        return (used(x) - y).square().mean() + self.l2 * sum(
            p.square().sum() for p in used.parameters()
        )

    def forward(self, x):
        return self.net[:3](x)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return (self(x) - y).square().mean()

    def dealt_out(self, size: int, *, seed: int, batch_size: int) -> DataLoader:
        data = loader(size, seed=seed, batch_size=batch_size).dataset
        world_size, rank = self.trainer.world_size, self.trainer.global_rank
        order = DistributedSampler(data, world_size, rank, shuffle=False)
        return DataLoader(data, batch_size=batch_size, sampler=order)

    def train_dataloader(self):
        return self.dealt_out(24, seed=1, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(8, seed=2, batch_size=2 * self.batch_size)


class Report(L.Callback):
    """Writes what a process holds at the end of the fit."""

    def __init__(self, callback: Any, path: Path) -> None:
        self.callback, self.path = callback, path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        held = {
            "weights": [p.detach().clone() for p in pl_module.parameters()],
            "buffers": [buffer.clone() for buffer in pl_module.buffers()],
            "start": self.callback.schedule.start,
            "values": [u.values for u in self.callback.schedule],
            "hypergradients": [u.hypergradients for u in self.callback.schedule],
            "objectives": [u.outer_objective for u in self.callback.schedule],
        }
        torch.save(held, self.path / f"{trainer.global_rank}.pt")


def run(method: Method, path: Path, processes: int, *args: Any, **settings: Any) -> list[Any]:
    """Train, and give what each process held; see `train`."""
    train(method, path, processes, *args, **settings)
    return read(path, processes)


def read(path: Path, processes: int) -> list[Any]:
    return [torch.load(path / f"{rank}.pt", map_location="cpu") for rank in range(processes)]


def train(
    method: Method,
    path: Path,
    processes: int,
    strategy: Any,
    unused: bool = False,
    module_type: type[Shared] = Shared,
    **settings: Any,
) -> None:
    path.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    callback = METHODS[method]() if isinstance(method, str) else method()
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        accelerator=settings.pop("accelerator", "cpu"),
        devices=processes,
        strategy=strategy,
        max_steps=6,
        max_epochs=-1,
        callbacks=[callback, Report(callback, path)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=1000,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module_type(4 // processes, unused))


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Executor]]:
    """Two processes that a cluster has started, as Lightning sees it, and that fit many times.

    Most of a fit of processes that Lightning spawns is their import of torch.
    """
    context, port = multiprocessing.get_context("spawn"), find_free_network_port()
    pools = [ProcessPoolExecutor(1, context, _join, (rank, port)) for rank in range(2)]
    yield pools
    for pool in pools:
        pool.shutdown()


def _join(rank: int, port: int) -> None:
    """Lightning starts no processes where it finds a rank."""
    os.environ |= {"LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}


def run_on(
    pair: list[Executor], method: Method, path: Path, *args: Any, **settings: Any
) -> list[Any]:
    """Train in both processes, and give what each held."""
    fits = [pool.submit(_train_joined, method, path, *args, **settings) for pool in pair]
    for fitted in wait(fits, return_when=FIRST_EXCEPTION).done:
        fitted.result()
    return read(path, 2)


def _train_joined(
    method: Method, path: Path, options: dict[str, Any], *args: Any, **kw: Any
) -> None:
    limit = timedelta(minutes=1)  # where the other has failed
    strategy = DDPStrategy(process_group_backend="gloo", timeout=limit, **options)
    train(method, path, 2, strategy, *args, **kw)


@pytest.mark.parametrize(
    ("method", "options", "unused", "settings"),
    [
        ("forward", {}, False, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}),
        ("forward", {"gradient_as_bucket_view": True}, False, {}),
        ("forward", {"find_unused_parameters": True}, True, {}),
        ("recompute", {}, False, {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}),
        ("keep graph", {}, False, {}),
        ("metric", {}, False, {}),
        ("forward, drawn", {}, False, {"accumulate_grad_batches": 2}),
        ("reverse, drawn", {}, False, {"gradient_clip_val": 0.5}),
        ("offload", {"find_unused_parameters": True}, True, {}),
    ],
    ids=str,
)
def test_two_processes_equal_one(method, options, unused, settings, pair, tmp_path):
    (one,) = run(method, tmp_path / "one", 1, "auto", unused, **settings)
    two = run_on(pair, method, tmp_path / "two", options, unused, **settings)
    for rank in two:
        # Sums over the batch are taken in another order.
        torch.testing.assert_close(rank, one, rtol=1e-12, atol=1e-14)
    for kind in ("values", "hypergradients"):
        for update, other in zip(two[0][kind], two[1][kind], strict=True):
            assert all(torch.equal(update[name], other[name]) for name in update)
    assert len(one["values"]) == 2


class Untouched(L.Callback):
    """Does nothing."""

    schedule = Schedule(start={})


class HalvedBatchNorm(nn.BatchNorm1d):
    """Two processes in one: of every second example the other one has the statistics."""

    def __init__(self, features: int, own_statistics: bool) -> None:
        super().__init__(features)
        self.other = nn.BatchNorm1d(features, affine=False) if own_statistics else None

    def forward(self, x):
        first, second = super().forward(x[::2]), x[1::2]
        if self.other is not None:
            second = self.other(second) * self.weight + self.bias
        elif self.training:
            second = F.batch_norm(second, None, None, self.weight, self.bias, training=True)
        else:
            second = super().forward(second)
        return torch.stack([first, second], 1).flatten(0, 1)


class Normalized(Shared):
    """Has a layer that normalizes the batch of its process, and another buffer."""

    own_statistics = False

    def __init__(self, batch_size: int, unused: bool = False) -> None:
        super().__init__(batch_size, unused)
        self.net.insert(1, nn.BatchNorm1d(3))
        self.register_buffer("shift", torch.zeros(()))

    def setup(self, stage):
        super().setup(stage)
        if self.trainer.world_size == 1:
            self.net[1] = HalvedBatchNorm(3, self.own_statistics)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        is_of_both = self.trainer.world_size == 1 and not self.own_statistics
        self.shift.copy_(batch[0][:: 2 if is_of_both else 1].mean())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx) + 0.01 * self.shift

    def val_dataloader(self):
        return self.dealt_out(8, seed=2, batch_size=2 * self.batch_size)


class NormalizedApart(Normalized):
    own_statistics = True


@pytest.mark.parametrize(
    ("method", "module_type", "settings"),
    [
        ("forward", Normalized, {"accumulate_grad_batches": 2}),
        ("keep graph", Normalized, {}),
        ("recompute", Normalized, {"accumulate_grad_batches": 2}),
        ("forward", NormalizedApart, {}),
        ("recompute", NormalizedApart, {}),
    ],
)
def test_batch_normalization_of_two_processes(method, module_type, settings, pair, tmp_path):
    (one,) = run(method, tmp_path / "one", 1, "auto", module_type=module_type, **settings)
    options = {"broadcast_buffers": not module_type.own_statistics}
    two = run_on(pair, method, tmp_path / "two", options, module_type=module_type, **settings)
    for kind in ("weights", "values", "hypergradients", "objectives"):
        for rank in two:
            torch.testing.assert_close(rank[kind], one[kind], rtol=1e-11, atol=1e-14)


def test_observer_leaves_weights_and_buffers_of_each_process_as_they_were(pair, tmp_path):
    observing = partial(TRHO, hyper_batch_size=5, outer_optimizer=None)
    found = [
        run_on(pair, make, tmp_path / name, {}, module_type=Normalized)
        for name, make in (("plain", Untouched), ("observed", observing))
    ]
    for plain, observed in zip(*found, strict=True):
        for kind in ("weights", "buffers"):
            torch.testing.assert_close(observed[kind], plain[kind], rtol=0, atol=0)
    assert not torch.equal(found[0][0]["buffers"][0], found[0][1]["buffers"][0])


class Doubling(Shared):
    def training_step(self, batch, batch_idx):
        if self.global_rank == 1:
            batch = self.doubled(batch)
        return super().training_step(batch, batch_idx)

    def doubled(self, batch):
        return [2 * batch[0], batch[1]]


class DoublingInPlace(Doubling):
    def doubled(self, batch):
        return [batch[0].mul_(2), batch[1]]


def test_one_process_may_write_to_its_batch(pair, tmp_path):
    found = []
    for module_type in (Doubling, DoublingInPlace):
        path = tmp_path / module_type.__name__
        found.append(run_on(pair, "recompute", path, {}, module_type=module_type))
    torch.testing.assert_close(*found, rtol=0, atol=0)


class EditsLate(Shared):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 4:
            for param in self.net.parameters():
                param.grad.mul_(0.9)


@pytest.mark.parametrize("method", ["forward", "recompute"])
def test_gradients_edited_in_any_step_are_found_out(method, tmp_path):
    strategy = DDPStrategy(start_method="spawn", process_group_backend="gloo")
    with pytest.raises(Exception, match="The gradient given to the optimizer is not the loss's"):
        run(method, tmp_path / "two", 2, strategy, module_type=EditsLate)


def test_two_processes_replay_what_they_have_learned(pair, tmp_path):
    learned = run_on(pair, "forward", tmp_path / "learned", {})
    held = learned[0]
    updates = [
        OuterUpdate(step, values, {}, 0.0)
        for step, values in zip((3, 6), held["values"], strict=True)
    ]
    path = tmp_path / "schedule.json"
    Schedule(updates, start=held["start"]).to_json(path)
    replayed = run_on(pair, partial(ReplaySchedule, path), tmp_path / "replayed", {})
    for ours, theirs in zip(replayed, learned, strict=True):
        pairs = zip(ours["weights"], theirs["weights"], strict=True)
        assert all(torch.equal(found, expected) for found, expected in pairs)


def test_static_graph_is_refused():
    strategy = DDPStrategy(static_graph=True, process_group_backend="gloo")
    with pytest.raises(MisconfigurationException, match="`static_graph=True`"):
        fit(SmallNet(lr=0.1), RTHO(["lr"]), strategy=strategy)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.SyncBatchNorm(4), "`net.1` normalizes over all processes"),
        (lambda: nn.Embedding(4, 4, sparse=True), "`net.1` has sparse gradients"),
    ],
)
def test_layers_that_are_not_followed_over_several_processes_are_refused(layer, message):
    from types import SimpleNamespace

    from lightning_rtho.callbacks._checks import check_modules

    module = SmallNet(body=lambda: nn.Sequential(nn.Linear(FEATURES, 4), layer()))
    with pytest.raises(MisconfigurationException, match=message):
        check_modules(SimpleNamespace(world_size=2), module)
