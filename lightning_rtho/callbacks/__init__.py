"""The Lightning callbacks, and all else that knows Lightning: wiring, and what it needs."""

from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._gradcheck import (
    HypergradcheckError,
    HypergradcheckResult,
    HypergradcheckRow,
    hypergradcheck,
)
from lightning_rtho.callbacks._replay_schedule import ReplaySchedule
from lightning_rtho.callbacks._rtho import RTHO
from lightning_rtho.callbacks._trho import TRHO

__all__ = [
    "RTHO",
    "TRHO",
    "HypergradcheckError",
    "HypergradcheckResult",
    "HypergradcheckRow",
    "HypergradientCallback",
    "ReplaySchedule",
    "hypergradcheck",
]
