"""Hyperparameters, their domains, and where a module declares them."""

from lightning_rtho.hyperparameters._declared import (
    declared_hyperparameters,
    load_hyperparameters,
)
from lightning_rtho.hyperparameters._domains import Domain, Interval, NonNegative, Positive, Real
from lightning_rtho.hyperparameters._hyperparameter import Hyperparameter

__all__ = [
    "Domain",
    "Hyperparameter",
    "Interval",
    "NonNegative",
    "Positive",
    "Real",
    "declared_hyperparameters",
    "load_hyperparameters",
]
