"""One table of every optimizer with a rule, and a small smooth training problem to run it on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho.dynamics import (
    Transition,
    UpdateRule,
    get_setting,
    read_hypers,
    read_state,
    rule_class_for,
    set_setting,
)


@dataclass(frozen=True)
class Case:
    """An optimizer class and its keywords."""

    name: str
    optimizer_class: type[Optimizer]
    keywords: Mapping[str, Any]

    def optimizer(self, *params: Tensor, **changes: float) -> Optimizer:
        """Make the optimizer; `changes` may pass the ends at which torch refuses a setting."""
        optimizer = self.optimizer_class(list(params), **self.keywords)
        for name, value in changes.items():
            set_setting(optimizer.param_groups[0], name, value)
        return optimizer

    @property
    def settings(self) -> dict[str, float]:
        """Every real-valued setting and its value."""
        optimizer = self.optimizer(torch.zeros(1))
        domains = rule_class_for(optimizer).domains
        return {name: get_setting(optimizer.param_groups[0], name) for name in domains}


# `eps` is far above its default: by 1e-8 no finite difference is possible, and the default has
# tests of its own.
_ADAM = {"lr": 0.03, "betas": (0.8, 0.9), "eps": 1e-2}

_BASES = [
    Case("SGD", torch.optim.SGD, {"lr": 0.1}),
    Case("SGD-momentum", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8}),
    Case("SGD-dampening", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "dampening": 0.3}),
    Case("SGD-nesterov", torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    Case("Adam", torch.optim.Adam, _ADAM),
    Case("Adam-amsgrad", torch.optim.Adam, {**_ADAM, "amsgrad": True}),
    Case("Adam-decoupled", torch.optim.Adam, {**_ADAM, "decoupled_weight_decay": True}),
    Case("AdamW", torch.optim.AdamW, {**_ADAM, "weight_decay": 0.0}),
    Case("AdamW-amsgrad", torch.optim.AdamW, {**_ADAM, "weight_decay": 0.0, "amsgrad": True}),
    Case("RMSprop", torch.optim.RMSprop, {"lr": 0.03, "alpha": 0.8, "eps": 1e-2}),
    Case(
        "RMSprop-momentum",
        torch.optim.RMSprop,
        {"lr": 0.03, "alpha": 0.8, "eps": 1e-2, "momentum": 0.7},
    ),
    Case(
        "RMSprop-centered",
        torch.optim.RMSprop,
        {"lr": 0.03, "alpha": 0.8, "eps": 1e-2, "centered": True},
    ),
    Case(
        "RMSprop-centered-momentum",
        torch.optim.RMSprop,
        {"lr": 0.03, "alpha": 0.8, "eps": 1e-2, "centered": True, "momentum": 0.7},
    ),
    Case("Adagrad", torch.optim.Adagrad, {"lr": 0.1, "eps": 1e-2}),
    Case(
        "Adagrad-lr_decay",
        torch.optim.Adagrad,
        {"lr": 0.1, "eps": 1e-2, "lr_decay": 0.1, "initial_accumulator_value": 0.2},
    ),
    Case("Adadelta", torch.optim.Adadelta, {"lr": 1.0, "rho": 0.8, "eps": 1e-2}),
    Case("Adamax", torch.optim.Adamax, _ADAM),
    Case("NAdam", torch.optim.NAdam, {**_ADAM, "momentum_decay": 0.1}),
    Case(
        "NAdam-decoupled",
        torch.optim.NAdam,
        {**_ADAM, "momentum_decay": 0.1, "decoupled_weight_decay": True},
    ),
    Case("RAdam", torch.optim.RAdam, _ADAM),
    Case("RAdam-decoupled", torch.optim.RAdam, {**_ADAM, "decoupled_weight_decay": True}),
    Case("ASGD", torch.optim.ASGD, {"lr": 0.1, "lambd": 0.05, "alpha": 0.7}),
]


def _with(case: Case, suffix: str, **keywords: Any) -> Case:
    return replace(case, name=f"{case.name}-{suffix}", keywords={**case.keywords, **keywords})


CASES = [
    variant
    for case in _BASES
    for variant in (
        case,
        _with(case, "weight_decay", weight_decay=0.1),
        _with(case, "maximize", maximize=True),
        _with(case, "weight_decay-maximize", weight_decay=0.1, maximize=True),
    )
]

START = torch.tensor([0.5, -1.0, 0.3, 0.8], dtype=torch.float64)
DEAD = 2
"""The entry of the problem's parameter whose gradient is always zero."""

_COUPLING = torch.tensor(
    [[1.0, 0.3, 0.0, -0.2], [0.3, 0.7, 0.0, 0.1], [0.0] * 4, [-0.2, 0.1, 0.0, 0.5]],
    dtype=torch.float64,
)
_ALIVE = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
_PUSH = torch.tensor([0.6, -0.9, 0.0, 0.4], dtype=torch.float64)


def gradient(param: Tensor, step: int) -> Tensor:
    """Gradient of a smooth loss with coupled entries, another one at every step."""
    return _COUPLING @ param + _ALIVE * (0.5 * (param + step).sin()) + _PUSH / (1 + step)


def train(case: Case, steps: int, start: Tensor = START, **changes: float) -> Tensor:
    """Train with torch alone and return the parameter."""
    param = start.clone().requires_grad_()
    optimizer = case.optimizer(param, **changes)
    for step in range(steps):
        param.grad = gradient(param.detach(), step)
        optimizer.step()
    return param.detach()


def transition(
    optimizer: Optimizer, param: Tensor, grad: Tensor, tuned: Mapping[str, int]
) -> Transition:
    """Describe what a torch optimizer with one parameter would do with a gradient."""
    rule_class, group = rule_class_for(optimizer), optimizer.param_groups[0]
    return Transition(
        index=0,
        rule=rule_class.from_group(group, tuned),
        state={name: t.clone() for name, t in read_state(rule_class, optimizer, param).items()},
        grad=grad.clone(),
        hyper=read_hypers(rule_class, group, param.device),
        columns=tuned,
    )


def warm_transition(
    case: Case, steps: int, param: Tensor, gradient: Callable[[Tensor, int], Tensor] = gradient
) -> Transition:
    """Describe the step after `steps` steps, with every setting tuned.

    Momentum is held where torch keeps no velocity: it has no derivative that torch's state tells.
    """
    param = param.clone().requires_grad_()
    optimizer = case.optimizer(param)
    for step in range(steps):
        param.grad = gradient(param.detach(), step).to(param)
        optimizer.step()
    names = [name for name in case.settings if name != "momentum" or case.settings[name] != 0]
    columns = {name: column for column, name in enumerate(names)}
    return transition(optimizer, param, gradient(param.detach(), steps).to(param), columns)


def rule_of(case: Case) -> UpdateRule:
    """Return the rule with momentum untuned."""
    optimizer = case.optimizer(torch.zeros(1))
    return rule_class_for(optimizer).from_group(optimizer.param_groups[0], ())
