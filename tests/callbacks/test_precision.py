"""Reduced precision, and a gradient scaler that skips steps."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from tests.callbacks.problems import SmallNet, fit

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


@pytest.mark.parametrize("method", OBSERVERS)
def test_step_skipped_by_the_scaler_is_no_step(method):
    torch.set_default_dtype(torch.float32)
    found = []
    for overflow in (True, False):
        callback = OBSERVERS[method]()
        module = Overflowing(
            overflow=overflow, lr=0.1, momentum=0.5, l2=Hyperparameter(0.01, Positive())
        )
        if overflow:
            with pytest.warns(UserWarning, match="step 3 was skipped"):
                fit(module, callback, steps=5, plugins=[scaled()])
        else:
            fit(module, callback, steps=5, plugins=[scaled()])
        assert [update.step for update in callback.schedule] == [5]
        found.append(callback.hypergradients["l2"].item())
    # The scale is halved after the overflow, which only the smallest float16 numbers notice.
    assert found[0] == pytest.approx(found[1], rel=1e-3)
