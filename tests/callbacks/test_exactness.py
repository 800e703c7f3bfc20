"""Hypergradients against finite differences through a real ``Trainer.fit``."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn, optim

from lightning_rtho import RTHO, TRHO, KeepGraph, NonNegative, Offload, Real
from lightning_rtho.hypergradient import _forward
from tests.callbacks.problems import (
    FEATURES,
    VAL_SIZE,
    SmallNet,
    as_hyperparameters,
    finite_difference,
    fit,
    loader,
    validation_loss,
)
from tests.callbacks.test_manual import ByHand

STEPS = 7  # RAdam rectifies from its sixth step on
ADAM = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.1}

# Every optimizer with all of its real-valued settings at values where each of them matters.
OPTIMIZERS: dict[str, tuple[type[optim.Optimizer], dict[str, float], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "weight_decay": 0.1}, {}),
    "sgd-momentum": (
        optim.SGD,
        {"lr": 0.1, "momentum": 0.7, "dampening": 0.2, "weight_decay": 0.1},
        {},
    ),
    "sgd-nesterov": (optim.SGD, {"lr": 0.1, "momentum": 0.7}, {"nesterov": True}),
    "sgd-nesterov-foreach": (  # which writes to the gradients
        optim.SGD,
        {"lr": 0.1, "momentum": 0.7},
        {"nesterov": True, "foreach": True},
    ),
    "sgd-maximize": (optim.SGD, {"lr": 0.02, "momentum": 0.5}, {"maximize": True}),
    "adam": (optim.Adam, ADAM, {}),
    "adam-amsgrad": (optim.Adam, ADAM, {"amsgrad": True}),
    "adam-maximize": (optim.Adam, ADAM, {"maximize": True}),
    "adamw": (optim.AdamW, ADAM, {}),
    "nadam": (optim.NAdam, {**ADAM, "momentum_decay": 0.01}, {}),
    "radam": (optim.RAdam, ADAM, {}),
    "adamax": (optim.Adamax, ADAM, {}),
    "rmsprop": (optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-2, "weight_decay": 0.1}, {}),
    "rmsprop-centered": (
        optim.RMSprop,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-1, "weight_decay": 0.1, "momentum": 0.5},
        {"centered": True},
    ),
    "adagrad": (
        optim.Adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.1, "eps": 1e-3},
        {"initial_accumulator_value": 0.1},
    ),
    "adadelta": (optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-2, "weight_decay": 0.1}, {}),
    "asgd": (optim.ASGD, {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "weight_decay": 0.1}, {}),
}


def measured(callback: L.Callback, module: L.LightningModule, **settings: Any) -> dict[str, float]:
    """Hypergradients at the end of a fit."""
    fit(module, callback, **settings)
    return {name: value.item() for name, value in callback.hypergradients.items()}


def observers() -> dict[str, L.Callback]:
    """Every method, observing a whole run of `STEPS` steps."""
    whole = {"hyper_batch_size": STEPS, "outer_optimizer": None}
    return {
        "forward": RTHO(**whole),
        "recompute": TRHO(**whole),
        "keep graph": TRHO(**whole, tape=KeepGraph()),
        "offload": TRHO(**whole, tape=Offload("cpu")),
    }


def check_all_methods(make: Any, values: dict[str, float], **settings: Any) -> None:
    """Compare every method with finite differences for all of `values`.

    Args:
        make: Makes a module of numbers or hyperparameters by name.
        values: Where the derivatives are taken.
        settings: Of the trainer.
    """

    def loss_at(name: str, value: float) -> float:
        module = make(**{**values, name: value})
        fit(module, steps=STEPS, **settings)
        return validation_loss(module)

    expected = {
        name: finite_difference(value, lambda v, name=name: loss_at(name, v))
        for name, value in values.items()
    }
    for method, callback in observers().items():
        module = make(**as_hyperparameters(values))
        found = measured(callback, module, steps=STEPS, **settings)
        for name, reference in expected.items():
            (value,) = (v for key, v in found.items() if key.split(".")[-1] == name)
            # Rounding of a fit, 1e-15, over the step of the difference; see `finite_difference`.
            assert value == pytest.approx(reference, rel=1e-6, abs=1e-10), (method, name)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_every_setting_of_every_optimizer_is_exact(case):
    optimizer, values, options = OPTIMIZERS[case]
    check_all_methods(
        lambda l2, **settings: SmallNet(optimizer, l2=l2, **settings, **options),
        {**values, "l2": 0.01},
    )


def batch_norm_and_dropout() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 3},  # 5 batches an epoch: the last window is shorter
        {"gradient_clip_val": 0.5},
        {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("body", [None, batch_norm_and_dropout], ids=["plain", "batchnorm"])
def test_trainer_settings_are_followed(settings, body):
    check_all_methods(
        lambda **values: SmallNet(optim.SGD, body=body, **values),
        {"lr": 0.1, "momentum": 0.6, "l2": 0.01},
        **settings,
    )


class ClippedLater(SmallNet):
    """By a limit that falls, by value in one step, and not at all in the last."""

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ):
        step = self.global_step
        if step < STEPS - 1:
            how = "value" if step == 1 else "norm"
            self.clip_gradients(optimizer, 0.5 / (1 + step), gradient_clip_algorithm=how)


class ClippedBefore(SmallNet):
    """In a hook before that of clipping, from its second step on."""

    def on_before_optimizer_step(self, optimizer):
        if self.global_step:
            self.clip_gradients(optimizer, 0.1, gradient_clip_algorithm="norm")


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize("make", [ClippedLater, ClippedBefore])
def test_clipping_of_the_modules_own_is_followed(make, accumulated):
    check_all_methods(
        lambda **values: make(optim.SGD, **values),
        {"lr": 0.1, "momentum": 0.6, "l2": 0.01},
        accumulate_grad_batches=accumulated,
    )


def test_batch_norm_and_dropout_under_adam():
    check_all_methods(
        lambda **values: SmallNet(optim.Adam, body=batch_norm_and_dropout, **values),
        {"lr": 0.02, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "l2": 0.01},
    )


class SometimesUsed(SmallNet):
    """A branch that only every other batch goes through, and one that none does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.net.branch = nn.Linear(FEATURES, 1)
        self.net.idle = nn.Linear(2, 2)
        self.net.frozen = nn.Linear(2, 2).requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x, y = batch
        output = self.net[:3](x)
        if batch_idx % 2:
            output = output + torch.tanh(self.net.branch(x))
        weights = list(self.net[:3].parameters())
        return (output - y).square().mean() + self.l2 * sum(w.square().sum() for w in weights)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return (self.net[:3](x) + self.net.branch(x) - y).square().mean()


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam], ids=["sgd", "adam"])
def test_parameters_without_gradient_in_some_steps(optimizer, monkeypatch):
    def whole_loss(module: SometimesUsed) -> float:
        with torch.no_grad():
            (batch,) = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)
            return module.validation_step(batch, 0).item()

    monkeypatch.setattr("tests.callbacks.test_exactness.validation_loss", whole_loss)
    first = (
        {"momentum": 0.6} if optimizer is optim.SGD else {"beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
    )
    check_all_methods(
        lambda **values: SometimesUsed(optimizer, **values),
        {"lr": 0.05, "weight_decay": 0.1, "l2": 0.01, **first},
    )


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.RMSprop], ids=["sgd", "rmsprop"])
def test_momentum_is_exact_where_it_starts_at_zero(optimizer):
    settings = {"lr": 0.1} if optimizer is optim.SGD else {"lr": 0.02, "eps": 0.1}
    # One-sided, since momentum can't be negative: second order, hence the wider tolerance.
    h = 1e-5

    def loss_at(momentum: float) -> float:
        module = SmallNet(optimizer, momentum=momentum, **settings)
        fit(module, steps=STEPS)
        return validation_loss(module)

    expected = (4 * loss_at(h) - loss_at(2 * h) - 3 * loss_at(0.0)) / (2 * h)
    for method, callback in observers().items():
        callback._selection = {"momentum": Real()}
        module = SmallNet(optimizer, momentum=0.0, **settings)
        found = measured(callback, module, steps=STEPS)
        assert found["momentum"] == pytest.approx(expected, rel=1e-6), method


def test_named_settings_of_several_groups_are_exact():
    class TwoGroups(SmallNet):
        def configure_optimizers(self):
            groups = [
                {"params": self.net[0].parameters(), "lr": self.settings["first"]},
                {"params": self.net[2].parameters(), "lr": self.settings["second"]},
            ]
            return optim.SGD(groups, weight_decay=self.settings["decay"])

    values = {"first": 0.1, "second": 0.02, "decay": 0.05}

    def loss_at(name: str, value: float) -> float:
        module = TwoGroups(**{**values, name: value})
        fit(module, steps=STEPS)
        return validation_loss(module)

    callback = RTHO(
        {"lr": Real(), "weight_decay": NonNegative()}, hyper_batch_size=STEPS, outer_optimizer=None
    )
    found = measured(callback, TwoGroups(**values), steps=STEPS)
    assert set(found) == {"lr/pg1", "lr/pg2", "weight_decay/pg1", "weight_decay/pg2"}
    for name, key in (("first", "lr/pg1"), ("second", "lr/pg2")):
        expected = finite_difference(values[name], lambda v, name=name: loss_at(name, v))
        assert found[key] == pytest.approx(expected, rel=1e-6)
    expected = finite_difference(values["decay"], lambda v: loss_at("decay", v))
    assert found["weight_decay/pg1"] + found["weight_decay/pg2"] == pytest.approx(
        expected, rel=1e-6
    )


@pytest.mark.parametrize("optimizer", [optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam])
@pytest.mark.parametrize("name", ["lr", "beta1", "beta2"])
def test_one_setting_alone_beside_an_input_that_is_always_zero(optimizer, name):
    # Without a penalty the weights of that input have no gradient at all; eps is torch's 1e-8.
    values = {"lr": 0.02, "beta1": 0.8, "beta2": 0.9}

    def loss_at(value: float) -> float:
        module = SmallNet(optimizer, l2=0.0, **{**values, name: value})
        fit(module, steps=STEPS)
        return validation_loss(module)

    expected = finite_difference(values[name], loss_at)
    for method, callback in observers().items():
        callback._selection = {name: Real()}
        found = measured(callback, SmallNet(optimizer, l2=0.0, **values), steps=STEPS)
        assert found.keys() == {name}
        # The difference errs by 1e-11 of the loss, the hypergradients are 1e-3 and more.
        assert abs(found[name]) > 1e-3
        assert found[name] == pytest.approx(expected, rel=1e-6), method


@pytest.mark.parametrize("case", ["plain", "clipped", "accumulated", "by hand"])
def test_columns_one_by_one_equal_columns_at_once(case, monkeypatch):
    """A large model advances Z column by column, which changes no number but by rounding."""
    settings = {
        "clipped": {"gradient_clip_val": 0.3},
        "accumulated": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
    }.get(case, {})
    found = []
    for large in (_forward._LARGE, 0):
        monkeypatch.setattr(_forward, "_LARGE", large)
        module = (ByHand if case == "by hand" else SmallNet)(
            optim.NAdam,
            body=lambda: nn.Sequential(
                nn.Linear(FEATURES, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)
            ),
            eps=1e-3,
            **as_hyperparameters({"lr": 0.05, "momentum_decay": 0.01, "l2": 0.02}),
        )
        callback = RTHO(hyper_batch_size=3, outer_optimizer=None)
        fit(module, callback, steps=6, **settings)
        found.append(torch.stack([*callback.hypergradients.values()]))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-13)
