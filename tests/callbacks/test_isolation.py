"""What runs in isolation leaves the module as it was."""

import functools
import random
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn

from lightning_rtho import Hyperparameter, Positive
from lightning_rtho.callbacks._preservation import preserved


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
    with preserved(module):
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
        self.stats = {"sum": torch.zeros(1), "meter": Meter()}
        self.stats["meter"].total = torch.zeros(1)
        self.ordered = OrderedDict(a=1, b=2)
        self.norms = [nn.BatchNorm1d(2)]

    def collect(self, value: float) -> None:
        self.nested["val"].append(value)
        self.nested["deep"][0]["seen"].add(value)
        self.meter(value)
        self.recent.append(value)
        self.counts[0] += value
        self.metrics["mean"].update(value)
        self.metrics["all"][0].update(value)
        self.stats["sum"].add_(value)
        self.stats["meter"].total += value
        self.ordered.pop("a", None)
        self.ordered[value] = value
        self.norms[0](torch.randn(4, 2))

    def collected(self) -> list[Any]:
        (all_,) = self.metrics["all"]
        return [
            *(list(self.nested["val"]), set(self.nested["deep"][0]["seen"]), list(self.recent)),
            *(self.meter.total, list(self.meter.values), self.counts.tolist()),
            *(self.metrics["mean"].compute().item(), torch.as_tensor(all_.compute()).tolist()),
            *(self.stats["sum"].item(), self.stats["meter"].total.item(), list(self.ordered)),
            self.norms[0].num_batches_tracked.item(),
        ]


def test_what_lies_deeper_is_put_back():
    module = Collecting()
    module.collect(2.0)
    before = module.collected()
    with preserved(module):
        module.collect(3.0)
        during = module.collected()
    assert all(one != other for one, other in zip(before, during, strict=True))
    assert module.collected() == before
    module.ordered.popitem()  # it is whole, within, too


class Output(OrderedDict):
    """Refuses to be changed as some libraries' outputs do."""

    def update(self, *args, **kwargs):
        raise TypeError("an output is not changed")


class Bare:
    """Answers for attributes that it does not have, and has no dict of them."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        raise KeyError(name)


class Node:
    def __init__(self, following: Any) -> None:
        self.following = following


@pytest.mark.parametrize(
    "value",
    [
        np.broadcast_to(np.ones(3), (2, 3)),
        Output(a=1),
        Bare(),
        functools.reduce(lambda node, _: Node(node), range(5000), None),
    ],
    ids=["read-only", "output", "slots", "chain"],
)
def test_what_cannot_be_written_to_does_no_harm(value):
    module = nn.Linear(1, 1)
    module.value = value
    module.itself = [module]
    with preserved(module):
        module.count = 1
    assert module.value is value
    assert not hasattr(module, "count")


def test_what_is_unchanged_is_not_touched():
    """As another thread may be at work on it."""

    class Watched(list):
        def clear(self):
            raise AssertionError

    module = Collecting()
    module.seen = Watched([1, 2])
    with preserved(module):
        module.meter(1.0)
    assert module.seen == [1, 2]


def test_what_a_data_set_holds_is_not_searched():
    module = nn.Linear(1, 1)
    module.samples = [{"seen": 0} for _ in range(20_000)]
    with preserved(module):
        for sample in module.samples:
            sample["seen"] += 1
        module.samples.append({})
    assert len(module.samples) == 20_000
    assert all(sample == {"seen": 1} for sample in module.samples)


def test_data_held_by_a_module_is_not_copied():
    module = changeable()
    pointer = module.data.data_ptr()
    with preserved(module):
        assert module.data.data_ptr() == pointer


def test_module_is_put_back_after_an_error():
    module = changeable()
    try:
        with preserved(module):
            module.count += 1
            raise KeyError
    except KeyError:
        pass
    assert module.count == 0


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: torch.Generator().manual_seed(1), lambda g: torch.rand(1, generator=g).item()),
        (lambda: np.random.default_rng(1), lambda g: g.random()),
        (lambda: np.random.RandomState(1), lambda g: g.rand()),
        (lambda: random.Random(1), lambda g: g.random()),
    ],
)
def test_random_generators_draw_again_what_they_drew(make, draw):
    module = nn.Linear(2, 2)
    module.generator, module.nested = make(), {"a": [make()]}
    with preserved(module):
        inside = [draw(module.generator), draw(module.nested["a"][0])]
    assert [draw(module.generator), draw(module.nested["a"][0])] == inside


def test_buffers_of_scripted_modules_are_put_back():
    module = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.BatchNorm1d(2)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with preserved(module):
        module(torch.randn(4, 2))
        assert not torch.equal(module[1].running_mean, before["1.running_mean"])
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
