"""Where layers are large, the derivative of the update is compiled; numbers stay what they were."""

from functools import partial

import pytest
import torch
from torch import nn, optim

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from lightning_rtho.hypergradient import _forward
from lightning_rtho.linearization import _fused
from tests.callbacks.problems import FEATURES, SmallNet, fit
from tests.callbacks.test_manual import ByHand

WIDE = _fused._LARGE // FEATURES + 1


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
@pytest.mark.parametrize(
    ("make", "method", "columns"),
    [
        (SmallNet, RTHO, "at once"),
        (SmallNet, RTHO, "one by one"),
        (ByHand, RTHO, "at once"),
        (SmallNet, TRHO, ""),
        (SmallNet, partial(TRHO, tape=KeepGraph()), ""),
    ],
    ids=["forward", "forward by columns", "forward by hand", "recompute", "keep graph"],
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
