"""Finding the hyperparameters that a module declares."""

from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from torch import nn

from lightning_rtho import Hyperparameter, Positive, Real
from lightning_rtho.hyperparameters import declared_hyperparameters


def _new() -> Hyperparameter:
    return Hyperparameter(1.0, Positive())


def test_module_without_hyperparameters_declares_none() -> None:
    assert declared_hyperparameters(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))) == {}


def test_attributes_are_named_as_parameters_are() -> None:
    module = nn.Module()
    module.lr = lr = _new()
    module.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module.body[1].gain = gain = _new()
    found = declared_hyperparameters(module)
    assert list(found) == ["lr", "body.1.gain"]
    assert found["lr"] is lr
    assert found["body.1.gain"] is gain


def test_containers_are_entered() -> None:
    module = nn.Module()
    module.rates = [_new(), (_new(), 3.0)]
    module.weights = {"task": _new(), "nested": {"other": [_new()]}, "name": "x"}
    assert set(declared_hyperparameters(module)) == {
        "rates.0",
        "rates.1.0",
        "weights.task",
        "weights.nested.other.0",
    }


def test_dataclasses_and_namespaces_are_entered_also_where_they_hold_themselves() -> None:
    @dataclass
    class Settings:
        lr: Any
        more: Any = None

    module = nn.Module()
    module.settings = Settings(_new(), {"a": Settings(_new())})
    module.settings.more["around"] = module.settings
    module.args, module.space = Namespace(l2=_new()), SimpleNamespace(beta=_new())
    assert set(declared_hyperparameters(module)) == {
        "settings.lr",
        "settings.more.a.lr",
        "args.l2",
        "space.beta",
    }


def test_shared_hyperparameter_is_named_after_its_first_place() -> None:
    module = nn.Module()
    shared = _new()
    module.first = module.second = shared
    module.child = nn.Linear(1, 1)
    module.child.third = [shared, shared]
    found = declared_hyperparameters(module)
    assert list(found) == ["first"]
    assert found["first"] is shared


def test_equal_hyperparameters_are_still_two() -> None:
    module = nn.Module()
    module.a, module.b = Hyperparameter([1.0, 2.0], Real()), Hyperparameter([1.0, 2.0], Real())
    assert list(declared_hyperparameters(module)) == ["a", "b"]


def test_parameters_buffers_and_plain_tensors_are_none() -> None:
    module = nn.Linear(1, 1)
    module.register_buffer("buffer", module.weight.detach().clone())
    module.plain = module.weight.detach().clone()
    assert declared_hyperparameters(module) == {}


def test_private_containers_are_not_entered() -> None:
    module = nn.Linear(1, 1)
    module._record = {"lr": Hyperparameter(1.0, Real())}
    module._rate = Hyperparameter(1.0, Real())
    assert list(declared_hyperparameters(module)) == ["_rate"]
