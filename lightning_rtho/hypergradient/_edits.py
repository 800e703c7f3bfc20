"""Whether gradients were changed between a loss and the optimizer."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rtho._numerics import differ
from lightning_rtho.distributed import is_distributed, mean_over_ranks
from lightning_rtho.hypergradient._base import OptimizerStep
from lightning_rtho.hypergradient._fingerprint import fingerprint, have_other_sums

__all__ = ["edited"]


def edited(step: OptimizerStep, traced: Sequence[Tensor | None]) -> Tensor:
    """Tell whether the optimizer's gradients are other than those of the traced losses, clipped.

    Processes that train together compare sums, whose mean is the sum of the mean gradient: one
    number each is exchanged.

    Args:
        step: The step; it has transitions.
        traced: What this process's losses give, one a transition, each ``[*P]``; None is zero.

    Returns:
        A boolean ``[]``, not yet synchronised with the host.
    """
    if step.is_traced is not None:
        return torch.as_tensor(step.is_traced).logical_not()
    if is_distributed():
        pairs = zip(step.raw_grads, traced, strict=True)
        local = fingerprint([raw.new_zeros(1) if own is None else own for raw, own in pairs])[0]
        (mean,) = mean_over_ranks([local], like=[local])
        differs = have_other_sums(step.raw_grads, mean, step.precision)
    else:
        differs = differ(step.raw_grads, traced, step.precision)
    if step.clip is not None:
        grads = [transition.grad for transition in step.transitions]
        differs = differs | differ(grads, step.clip(*step.raw_grads))
    return differs
