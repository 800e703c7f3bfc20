"""The dynamics Phi of torch's optimizers: one pure rule a family, and the way to it from torch."""

from lightning_rtho.dynamics._adadelta import AdadeltaRule
from lightning_rtho.dynamics._adagrad import AdagradRule
from lightning_rtho.dynamics._adam import AdamRule, NAdamRule, RAdamRule
from lightning_rtho.dynamics._adamax import AdamaxRule
from lightning_rtho.dynamics._asgd import ASGDRule
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.dynamics._from_torch import (
    Transition,
    get_setting,
    read_hypers,
    read_state,
    register_rule,
    rule_class_for,
    set_setting,
)
from lightning_rtho.dynamics._rmsprop import RMSpropRule
from lightning_rtho.dynamics._sgd import SGDRule

__all__ = [
    "ASGDRule",
    "AdadeltaRule",
    "AdagradRule",
    "AdamRule",
    "AdamaxRule",
    "NAdamRule",
    "RAdamRule",
    "RMSpropRule",
    "SGDRule",
    "Transition",
    "UpdateRule",
    "get_setting",
    "read_hypers",
    "read_state",
    "register_rule",
    "rule_class_for",
    "set_setting",
]
