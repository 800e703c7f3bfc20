"""What is written down of one outer update."""

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["OuterUpdate"]


@dataclass(frozen=True)
class OuterUpdate:
    """One outer update: what was measured, and the values that training goes on with.

    Attributes:
        step: Optimizer steps made so far.
        values: Natural values after the update, by name, each ``[*H]``.
        hypergradients: dE/dlambda with respect to natural values, by name, each ``[*H]``, at the
            values before the update.
        outer_objective: Outer objective before the update.
        sensitivity: How many of their own lengths the weights move, to first order, for a relative
            change of a hyperparameter: the largest ||dw/dlog lambda|| / ||w||. Most runs that
            learn stay below 5; from 10 on the safeguard takes hypergradients to mean nothing. NaN
            for `TRHO`, which does not know dw/dlambda.
        safeguard: What was done in the place of an ordinary update: ``"lowered"`` where the run was
            chaotic, ``"restored"`` where it went back to its best state: lost, without a
            hypergradient (NaN), or chaotic from its start on; else None.
        restored_step: Optimizer steps after which the state was kept that a restored run went back
            to; else None.

    Example:
        >>> import torch
        >>> update = OuterUpdate(20, {"lr": torch.tensor(0.1)}, {"lr": torch.tensor(-2.0)}, 0.7)
        >>> update.values["lr"]
        tensor(0.1000)
    """

    step: int
    values: dict[str, Tensor]
    hypergradients: dict[str, Tensor]
    outer_objective: float
    sensitivity: float = math.nan
    safeguard: str | None = None
    restored_step: int | None = None
