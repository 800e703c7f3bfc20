"""What runs in isolation leaves the module as it was."""

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
