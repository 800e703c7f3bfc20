"""Checking hypergradients of the user's own module against finite differences."""

from lightning_rtho.callbacks._gradcheck._check import hypergradcheck
from lightning_rtho.callbacks._gradcheck._result import (
    HypergradcheckError,
    HypergradcheckResult,
    HypergradcheckRow,
)

__all__ = [
    "HypergradcheckError",
    "HypergradcheckResult",
    "HypergradcheckRow",
    "hypergradcheck",
]
