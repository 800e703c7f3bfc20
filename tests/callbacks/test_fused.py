"""Where layers are large, the derivative of the update is compiled; numbers stay what they were."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn, optim
from torch._dynamo.utils import counters

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from lightning_rtho.hypergradient import _forward
from lightning_rtho.linearization import _fused
from tests.callbacks.problems import FEATURES, SmallNet, fit
from tests.callbacks.test_manual import ByHand

WIDE = _fused._LARGE // FEATURES + 1


class Switching(SmallNet):
    """Does without the greatest second moment from the fifth step on, in the midst of a window."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, amsgrad=True, **settings)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.trainer.optimizers[0].param_groups[0]["amsgrad"] = self.global_step < 4


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
@pytest.mark.parametrize(
    ("make", "method", "columns"),
    [
        (SmallNet, RTHO, "at once"),
        (SmallNet, RTHO, "one by one"),
        (ByHand, RTHO, "at once"),
        (SmallNet, TRHO, ""),
        (Switching, TRHO, ""),
        (SmallNet, partial(TRHO, tape=KeepGraph()), ""),
    ],
    ids=["forward", "forward by columns", "forward by hand", "recompute", "switched", "keep graph"],
)
def test_compiled_run_equals_the_plain_one(make, method, columns, monkeypatch):
    found = []
    for large in (_fused._LARGE, WIDE * FEATURES + 1):
        monkeypatch.setattr(_fused, "_LARGE", large)
        if columns == "one by one":
            monkeypatch.setattr(_forward, "_LARGE", 0)
        module = make(
            optim.AdamW,
            body=lambda: nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Tanh(), nn.Linear(WIDE, 1)),
            lr=Hyperparameter(0.01, Positive()),
            weight_decay=Hyperparameter(0.1, Positive()),
            eps=1e-3,
            l2=0.0,
        )
        callback = method(hyper_batch_size=3, outer_optimizer=None)
        fit(module, callback, steps=6)
        found.append(torch.stack([*callback.hypergradients.values()]))
    # The same operations in double precision; a compiler may join a product and a sum.
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [SmallNet, ByHand])
def test_the_update_is_compiled_also_amid_a_step_that_runs_eagerly(make):
    torch.compiler.reset()
    compiled = counters["stats"]["unique_graphs"]
    body = lambda: nn.Sequential(nn.Linear(FEATURES, WIDE), nn.Tanh(), nn.Linear(WIDE, 1))
    module = make(body=body, lr=Hyperparameter(0.01, Positive()), l2=0.0)
    fit(module, RTHO(hyper_batch_size=2, outer_optimizer=None), steps=2)
    assert counters["stats"]["unique_graphs"] > compiled
