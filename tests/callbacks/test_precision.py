"""Reduced precision, and a gradient scaler that skips steps."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from tests.callbacks.problems import TRAIN_SIZE, VAL_SIZE, SmallNet, fit, loader
from tests.helpers import leaves

OBSERVERS = {
    "forward": lambda: RTHO(hyper_batch_size=4, outer_optimizer=None),
    "recompute": lambda: TRHO(hyper_batch_size=4, outer_optimizer=None),
    "keep graph": lambda: TRHO(hyper_batch_size=4, outer_optimizer=None, tape=KeepGraph()),
}


def hypergradients(callback: Any, **settings: Any) -> dict[str, float]:
    torch.set_default_dtype(torch.float32)
    module = SmallNet(
        lr=Hyperparameter(0.1, Positive()), momentum=0.5, l2=Hyperparameter(0.01, Positive())
    )
    fit(module, callback, steps=4, **settings)
    assert all(value.dtype == torch.float64 for value in callback.hyperparameters.values())
    assert callback.hyperparameters["l2"] == 0.01
    return {name: value.item() for name, value in callback.hypergradients.items()}


def unrolled(module: SmallNet, precision: str) -> tuple[dict[str, float], list[Tensor]]:
    """Hypergradients by autograd through four steps, and the last weights, in that precision."""
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    weights = {k: p.detach().to(dtype).requires_grad_() for k, p in module.net.named_parameters()}
    lambdas = leaves({"lr": 0.125, "l2": 0.01})

    def loss_on(batch: list[Tensor], l2: Any) -> Tensor:
        x, y = (part.to(dtype) for part in batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = F.mse_loss(functional_call(module.net, weights, (x,)), y)
            return loss + l2 * sum(w.square().sum() for w in weights.values()) if l2 else loss

    velocities: dict[str, Tensor] = {}
    for batch in list(loader(TRAIN_SIZE, seed=1, batch_size=4))[:4]:
        loss = loss_on(batch, lambdas["l2"])
        gradients = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        for (name, weight), gradient in zip(list(weights.items()), gradients, strict=True):
            known = velocities.get(name)
            velocities[name] = v = gradient if known is None else 0.5 * known + gradient
            weights[name] = weight - lambdas["lr"] * v
    (batch,) = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)
    found = torch.autograd.grad(loss_on(batch, None), list(lambdas.values()))
    return dict(zip(lambdas, (g.item() for g in found), strict=True)), list(weights.values())


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_reduced_precision_is_autograd_unrolled_in_it(method, precision):
    torch.set_default_dtype(torch.float32)
    # A power of two: its products are exact, whichever way torch takes them.
    lr, l2 = Hyperparameter(0.125, Positive()), Hyperparameter(0.01, Positive())
    expected, weights = unrolled(SmallNet(lr=lr, l2=l2), precision)
    module, callback = SmallNet(lr=lr, momentum=0.5, l2=l2), OBSERVERS[method]()
    fit(
        module,
        callback,
        steps=4,
        precision=precision,
        train=loader(TRAIN_SIZE, seed=1, batch_size=4),
    )
    assert all(torch.equal(*pair) for pair in zip(module.net.parameters(), weights, strict=True))
    found = {k.removeprefix("settings."): v.item() for k, v in callback.hypergradients.items()}
    # Reverse mode takes the products of the unrolled graph one by one; in float32 between the
    # layers that leaves its rounding. Else two products a step are rounded to 8 bits.
    same_products = precision == "bf16-mixed" and method != "forward"
    assert found == pytest.approx(expected, rel=1e-5 if same_products else 4 * 2 * 2**-8)


def scaled(initial: float = 2.0**10) -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=initial)
    return MixedPrecision("16-mixed", "cpu", scaler)


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"precision": "64-true"}, 1e-4),  # float32's own rounding, amplified
        ({"precision": "bf16-mixed"}, 0.1),  # bfloat16 keeps 8 bits
        ({"precision": "bf16-true"}, 0.1),
        ({"plugins": "scaled"}, 0.02),  # float16 keeps 11 bits
    ],
    ids=str,
)
def test_reduced_precision_agrees_with_float32(method, settings, tolerance):
    full = hypergradients(OBSERVERS[method]())
    if settings.get("plugins") == "scaled":
        settings = {"plugins": [scaled()]}
    reduced = hypergradients(OBSERVERS[method](), **settings)
    assert reduced == pytest.approx(full, rel=tolerance)
    assert reduced != full


class Attending(SmallNet):
    """Attention, whose fast kernels round otherwise than its formula."""

    def __init__(self) -> None:
        super().__init__(lr=Hyperparameter(0.1, Positive()))
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.words = nn.Linear(1, 16)

    def training_step(self, batch, batch_idx):
        words = self.words(batch[0][..., None]).sin()
        mixed, _ = self.attention(words, words, words, need_weights=False)
        return super().training_step(batch, batch_idx) + mixed.square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.settings["lr"])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_steps_are_made_again_as_they_were_where_kernels_round_coarsely(precision, accumulate):
    torch.set_default_dtype(torch.float32)
    settings = {"precision": precision, "accumulate_grad_batches": accumulate}
    found, weights = [], []
    for method in ("recompute", "keep graph"):
        module, callback = Attending(), OBSERVERS[method]()
        fit(module, callback, steps=8, **settings)
        weights.append([*module.parameters()])
        found.append([update.hypergradients["settings.lr"] for update in callback.schedule])
    assert len(found[0]) == 2
    assert all(map(torch.equal, *weights))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)  # sums in another order


@pytest.mark.parametrize("method", OBSERVERS)
def test_gradients_that_round_otherwise_with_a_graph_are_not_taken_for_edited(method):
    def body() -> nn.Module:
        return nn.Sequential(
            nn.Linear(3, 64), nn.GroupNorm(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
            nn.Linear(64, 1),
        )  # fmt: skip

    torch.set_default_dtype(torch.float32)
    callback = OBSERVERS[method]()
    module = SmallNet(torch.optim.Adam, body=body, lr=Hyperparameter(0.01, Positive()))
    fit(module, callback, steps=4, precision="bf16-mixed")
    assert len(callback.schedule) == 1


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("method", OBSERVERS)
def test_loss_scale_has_no_part_in_the_hypergradient(method, clip):
    settings = {"gradient_clip_val": clip, "accumulate_grad_batches": 2}
    small, large = (
        hypergradients(OBSERVERS[method](), plugins=[scaled(2.0**k)], **settings) for k in (6, 11)
    )
    # Powers of two are exact; only what falls below float16's smallest number differs.
    assert small == pytest.approx(large, rel=1e-3)


class Overflowing(SmallNet):
    """At its third step a loss beyond float16, or none at all."""

    def __init__(self, *, overflow: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self.overflow = overflow

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if self.global_step != 2:
            return loss
        return loss * 1e30 if self.overflow else None


def check_that_a_skipped_step_is_no_step(make_callback: Any, make_plugin: Any, **device: Any):
    """Compare a run whose third step overflows with one that leaves it out."""
    torch.set_default_dtype(torch.float32)
    found = []
    for overflow in (True, False):
        callback = make_callback()
        module = Overflowing(
            overflow=overflow, lr=0.1, momentum=0.5, l2=Hyperparameter(0.01, Positive())
        )
        settings = {"steps": 5, "plugins": [make_plugin()], **device}
        if overflow:
            with pytest.warns(UserWarning, match="step 3 was skipped"):
                fit(module, callback, **settings)
        else:
            fit(module, callback, **settings)
        assert [update.step for update in callback.schedule] == [5]
        found.append(callback.hypergradients["l2"].item())
    # The scale is halved after the overflow, which only the smallest float16 numbers notice.
    assert found[0] == pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("method", OBSERVERS)
def test_step_skipped_by_the_scaler_is_no_step(method):
    check_that_a_skipped_step_is_no_step(OBSERVERS[method], scaled)
