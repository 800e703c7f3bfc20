"""From a torch optimizer to its update rule, its settings and its state."""

import inspect
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho._numerics import sent_to
from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._adadelta import AdadeltaRule
from lightning_rtho.dynamics._adagrad import AdagradRule
from lightning_rtho.dynamics._adam import AdamRule, NAdamRule, RAdamRule
from lightning_rtho.dynamics._adamax import AdamaxRule
from lightning_rtho.dynamics._asgd import ASGDRule
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.dynamics._rmsprop import RMSpropRule
from lightning_rtho.dynamics._sgd import SGDRule

__all__ = [
    "Transition",
    "get_setting",
    "read_hypers",
    "read_state",
    "register_rule",
    "rule_class_for",
    "set_setting",
]

_RULES: dict[type[Optimizer], type[UpdateRule]] = {
    torch.optim.ASGD: ASGDRule,
    torch.optim.Adadelta: AdadeltaRule,
    torch.optim.Adagrad: AdagradRule,
    torch.optim.Adam: AdamRule,
    torch.optim.AdamW: AdamRule,
    torch.optim.Adamax: AdamaxRule,
    torch.optim.NAdam: NAdamRule,
    torch.optim.RAdam: RAdamRule,
    torch.optim.RMSprop: RMSpropRule,
    torch.optim.SGD: SGDRule,
}


@dataclass(frozen=True)
class Transition:
    """What the optimizer is about to do to one parameter: the arguments of Phi.

    Attributes:
        index: Position of the parameter among those that are followed; as an optimizer makes it,
            in the order of its groups.
        rule: Phi.
        state: State before the update, ``[*P]`` or ``[]``.
        grad: Gradient as the optimizer sees it, after clipping ``[*P]``.
        hyper: Natural settings, each ``[]``.
        columns: Tuned settings, each with its entry in the vector of all hyperparameters.
        slopes: Derivative of a tuned setting by its hyperparameter, where that is not 1: a
            scheduled learning rate over its base.
        cohort: Equal for transitions that have rule, settings, columns and step count in common;
            None where that is not known.
    """

    index: int
    rule: UpdateRule
    state: State
    grad: Tensor
    hyper: Hypers
    columns: Mapping[str, int]
    slopes: Mapping[str, float] = field(default_factory=dict)
    cohort: Hashable = None


def register_rule(optimizer_class: type[Optimizer], rule_class: type[UpdateRule]) -> None:
    """Tell how an optimizer class of your own updates a parameter.

    Args:
        optimizer_class: The class; subclasses need a registration of their own, since they may
            update differently.
        rule_class: Its rule.

    Raises:
        TypeError: If either is not a class of its kind.

    Example:
        >>> from lightning_rtho.dynamics import SGDRule, register_rule, rule_class_for
        >>> class LoggedSGD(torch.optim.SGD):
        ...     '''Updates as SGD does.'''
        >>> register_rule(LoggedSGD, SGDRule)
        >>> rule_class_for(LoggedSGD([torch.zeros(1)])).__name__
        'SGDRule'
    """
    for argument, given, base in (
        ("optimizer_class", optimizer_class, Optimizer),
        ("rule_class", rule_class, UpdateRule),
    ):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(
                f"`{argument}` must be a subclass of {base.__name__}, got {given!r}. "
                "Pass the class itself, not an instance."
            )
    _RULES[optimizer_class] = rule_class


def rule_class_for(optimizer: Optimizer) -> type[UpdateRule]:
    """Return the rule of a torch optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        The rule's class.

    Raises:
        TypeError: If there is none for its class, nor for one of which that differs in nothing but
            its name and how it is made.
    """
    known = next((cls for cls in type(optimizer).__mro__ if cls in _RULES), None)
    if known is not None and _is_alike(type(optimizer), known):
        return _RULES[known]
    name = type(optimizer).__name__
    names = ", ".join(sorted(cls.__name__ for cls in _RULES))
    raise TypeError(
        f"No differentiable rule for `{name}`. Known: {names}. Write its update as an "
        f"`UpdateRule` and call `lightning_rtho.register_rule({name}, {name}Rule)`."
    )


def _is_alike(cls: type[Optimizer], base: type[Optimizer]) -> bool:
    """Tell whether a class does what its base does, but for how it is made."""
    between = cls.__mro__[: cls.__mro__.index(base)]
    names = {name for own in between for name, value in vars(own).items() if callable(value)}
    # Torch wraps a class's `step` anew when the first of it is made.
    return all(
        inspect.unwrap(getattr(cls, name)) is inspect.unwrap(getattr(base, name, cls))
        for name in names - {"__init__"}
    )


_BETAS = ("beta1", "beta2")


def get_setting(group: Mapping[str, Any], name: str) -> Any:
    """Read a real-valued setting from a parameter group.

    Args:
        group: One of an optimizer's ``param_groups``.
        name: Its key, or ``beta1``, ``beta2`` for the entries of ``betas``.

    Returns:
        The number or tensor that stands there.

    Raises:
        KeyError: If the group has no such setting.
    """
    if name in _BETAS and "betas" in group:
        return group["betas"][_BETAS.index(name)]
    return group[name]


def set_setting(group: MutableMapping[str, Any], name: str, value: Any) -> None:
    """Write what :func:`get_setting` reads.

    Args:
        group: One of an optimizer's ``param_groups``.
        name: Its key, or ``beta1``, ``beta2``.
        value: What shall stand there.
    """
    if name in _BETAS and "betas" in group:
        betas = list(group["betas"])
        betas[_BETAS.index(name)] = value
        group["betas"] = tuple(betas)
    else:
        group[name] = value


def read_hypers(rule: type[UpdateRule], group: Mapping[str, Any], device: torch.device) -> Hypers:
    """Read all real-valued settings of a group, in the precision that the optimizer uses.

    torch computes its scalar coefficients in Python floats, so numbers become float64; a tensor
    keeps its dtype. Adam's derivative is ill-conditioned in them: float32 is not enough.

    Args:
        rule: The optimizer's rule.
        group: One of its ``param_groups``.
        device: Where the group's parameters live.

    Returns:
        Natural settings, each ``[]``.
    """
    exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    hyper = {}
    for name in rule.domains:
        value = get_setting(group, name)
        if isinstance(value, Tensor):
            hyper[name] = sent_to(device, value.detach().clone().reshape(()))  # may be written to
        else:
            hyper[name] = sent_to(device, torch.tensor(value, dtype=exact))
    return hyper


def read_state(rule: type[UpdateRule], optimizer: Optimizer, param: Tensor) -> State:
    """Read a parameter and those of its optimizer buffers that belong to the rule.

    Args:
        rule: The optimizer's rule.
        optimizer: The torch optimizer.
        param: One of its parameters ``[*P]``.

    Returns:
        The state, which shares memory with the parameter ``[*P]`` and its dense buffers, ``[*P]``
        or ``[]``.
    """
    buffers = optimizer.state.get(param, {})
    state = {"param": param.detach()}
    for name in rule.buffers:
        value = buffers.get(name)
        if value is not None:  # torch keeps step counts on the CPU, others as numbers
            value = value if isinstance(value, Tensor) else torch.tensor(float(value))
            state[name] = sent_to(param.device, value).to_dense()  # SGD's velocity may be sparse
    return state
