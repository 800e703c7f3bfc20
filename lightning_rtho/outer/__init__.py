"""The outer problem: validation batches, the objective on them, and descent on hyperparameters."""

from lightning_rtho.outer._backtracking import Backtracking
from lightning_rtho.outer._batches import CyclingBatches
from lightning_rtho.outer._coordinates import Coordinates, relative_slopes
from lightning_rtho.outer._objective import outer_gradient
from lightning_rtho.outer._optimizer import HyperparameterDescent, OuterOptimizerCallable, adam
from lightning_rtho.outer._ramp import Ramp

__all__ = [
    "Backtracking",
    "Coordinates",
    "CyclingBatches",
    "HyperparameterDescent",
    "OuterOptimizerCallable",
    "Ramp",
    "adam",
    "outer_gradient",
    "relative_slopes",
]
