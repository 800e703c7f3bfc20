"""The outer problem: validation batches, the objective on them, and descent on hyperparameters."""

from lightning_rtho.outer._backtracking import Backtracking
from lightning_rtho.outer._batches import CyclingBatches, NoBatchError
from lightning_rtho.outer._coordinates import Coordinates, relative_slopes
from lightning_rtho.outer._objective import NoGraphError, outer_gradient
from lightning_rtho.outer._optimizer import HyperparameterDescent, OuterOptimizerCallable, adam
from lightning_rtho.outer._ramp import Ramp

__all__ = [
    "Backtracking",
    "Coordinates",
    "CyclingBatches",
    "HyperparameterDescent",
    "NoBatchError",
    "NoGraphError",
    "OuterOptimizerCallable",
    "Ramp",
    "adam",
    "outer_gradient",
    "relative_slopes",
]
