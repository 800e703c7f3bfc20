"""Real-time hyperparameter optimization for PyTorch Lightning.

A training step is a pure map (state, gradient, hyperparameters) -> state; every hypergradient is a
JVP (forward mode) or a VJP (reverse mode) of that map, chained with one Hessian-vector product of
the user's own loss.

Notation: weights w, training state s (weights and optimizer buffers), hyperparameters lambda with
m entries in all, update rule Phi, A = dPhi/ds, B = dPhi/dlambda, tangent Z = ds/dlambda, cotangent
alpha, outer objective E. Shapes: ``[*P]`` of a parameter, ``[*H]`` of a hyperparameter. A natural
value is what the user sees, a raw value what the outer optimizer moves.
"""

from lightning_rtho.callbacks import (
    RTHO,
    TRHO,
    HypergradcheckError,
    HypergradcheckResult,
    HypergradcheckRow,
    ReplaySchedule,
    hypergradcheck,
)
from lightning_rtho.dynamics import UpdateRule, register_rule
from lightning_rtho.hypergradient import KeepGraph, Offload, Recompute
from lightning_rtho.hyperparameters import (
    Domain,
    Hyperparameter,
    Interval,
    NonNegative,
    Positive,
    Real,
    load_hyperparameters,
)
from lightning_rtho.linearization import scale_gradient, stop_gradient
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.schedule import OuterUpdate, Schedule

__version__ = "0.1.0"

__all__ = [
    "RTHO",
    "TRHO",
    "DifferentiableOptimizer",
    "Domain",
    "HypergradcheckError",
    "HypergradcheckResult",
    "HypergradcheckRow",
    "Hyperparameter",
    "Interval",
    "KeepGraph",
    "NonNegative",
    "Offload",
    "OuterUpdate",
    "Positive",
    "Real",
    "Recompute",
    "ReplaySchedule",
    "Schedule",
    "UpdateRule",
    "__version__",
    "hypergradcheck",
    "load_hyperparameters",
    "register_rule",
    "scale_gradient",
    "stop_gradient",
]
