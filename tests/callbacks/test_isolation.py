"""What runs in isolation leaves the module as it was."""

from collections import deque
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import nn

from lightning_rtho import Hyperparameter, Positive
from lightning_rtho.callbacks._isolation import _preserved


def changeable() -> nn.Module:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    module.metric = torchmetrics.MeanMetric()
    module.state = torch.zeros(3)
    module.data = torch.zeros(2**20 + 1)
    module.seen = [1]
    module.table = {"a": 1}
    module.count = 0
    module.rate = Hyperparameter(1.0, Positive())
    return module


def test_every_kind_of_attribute_is_put_back():
    module = changeable()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.inference_mode():
        module.metric.reset()  # as Lightning's own validation leaves it
    state, rate = module.state, module.rate
    with _preserved(module):
        module[0](torch.randn(4, 2))
        module.metric.update(3.0)
        module.state.add_(1)
        module.seen.append(2)
        module.table["b"] = 2
        module.count += 1
        module.eval()
        module.new = 1
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.metric.update_count == 0
    assert module.state is state
    assert torch.equal(state, torch.zeros(3))
    assert (module.seen, module.table, module.count) == ([1], {"a": 1}, 0)
    assert module.training
    assert module[0].training
    assert module.rate is rate
    assert not hasattr(module, "new")


class Meter:
    """Sums up what it is given, as many a training script's own."""

    def __init__(self) -> None:
        self.total, self.values = 0.0, [1.0]

    def __call__(self, value: float) -> None:
        self.total += value
        self.values.append(value)


class Collecting(nn.Module):
    """Keeps what its steps have given in places that torch knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.nested = {"val": [1.0], "deep": ({"seen": {1.0}},)}
        self.meter = Meter()
        self.recent = deque([1.0], maxlen=3)
        self.counts = np.zeros(2)
        self.metrics = {"mean": torchmetrics.MeanMetric(), "all": [torchmetrics.CatMetric()]}

    def collect(self, value: float) -> None:
        self.nested["val"].append(value)
        self.nested["deep"][0]["seen"].add(value)
        self.meter(value)
        self.recent.append(value)
        self.counts[0] += value
        self.metrics["mean"].update(value)
        self.metrics["all"][0].update(value)

    def collected(self) -> list[Any]:
        (all_,) = self.metrics["all"]
        return [
            *(list(self.nested["val"]), set(self.nested["deep"][0]["seen"]), list(self.recent)),
            *(self.meter.total, list(self.meter.values), self.counts.tolist()),
            *(self.metrics["mean"].compute().item(), torch.as_tensor(all_.compute()).tolist()),
        ]


def test_what_lies_deeper_is_put_back():
    module = Collecting()
    module.collect(2.0)
    before = module.collected()
    with _preserved(module):
        module.collect(3.0)
        during = module.collected()
    assert all(one != other for one, other in zip(before, during, strict=True))
    assert module.collected() == before


def test_data_held_by_a_module_is_not_copied():
    module = changeable()
    pointer = module.data.data_ptr()
    with _preserved(module):
        assert module.data.data_ptr() == pointer


def test_module_is_put_back_after_an_error():
    module = changeable()
    try:
        with _preserved(module):
            module.count += 1
            raise KeyError
    except KeyError:
        pass
    assert module.count == 0
