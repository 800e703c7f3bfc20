"""RMSprop: the gradient over the root of its mean square."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

import torch
from torch import Tensor

from lightning_rtho._numerics import sqrt_zero_slope
from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["RMSpropRule"]


@final
@dataclass(frozen=True)
class RMSpropRule(UpdateRule):
    r"""Rule of ``torch.optim.RMSprop``: b' = mu b + g / (sqrt(v') + eps), w' = w - eta b'.

    v' = a v + (1 - a) g^2 is the mean square; centered, the square of the mean is taken off it.

    Attributes:
        centered: Divide by the standard deviation rather than the root mean square.
        maximize: Ascend the objective.
        buffered: Whether there is a velocity: momentum is not zero, or is tuned.

    References:
        Tieleman and Hinton (2012); Graves (2013) for the centered form.
    """

    domains = {
        "lr": Positive(),
        "alpha": Interval(0, 1),
        "eps": Positive(),
        "weight_decay": NonNegative(),
        "momentum": Interval(0, 1),
    }
    buffers = ("square_avg", "grad_avg", "momentum_buffer")

    centered: bool = False
    maximize: bool = False
    buffered: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], tuned: Collection[str]) -> Self:
        """See :meth:`UpdateRule.from_group`."""
        return cls(
            centered=bool(group["centered"]),
            maximize=bool(group["maximize"]),
            buffered=group["momentum"] > 0 or "momentum" in tuned,
        )

    @classmethod
    def unkept_buffers(cls, group: Mapping[str, Any], tuned: Collection[str]) -> tuple[str, ...]:
        """See :meth:`UpdateRule.unkept_buffers`."""
        is_unkept = group["momentum"] == 0 and "momentum" in tuned
        return ("momentum_buffer",) if is_unkept else ()

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return {"square_avg": torch.zeros_like(param)}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        grad = self.ascent(grad) + hyper["weight_decay"] * state["param"]
        square = hyper["alpha"] * state["square_avg"] + (1 - hyper["alpha"]) * grad * grad
        new_state, variance = {**state, "square_avg": square}, square
        if self.centered:
            mean = state.get("grad_avg", torch.zeros_like(grad))
            mean = mean + (1 - hyper["alpha"]) * (grad - mean)
            new_state["grad_avg"], variance = mean, square - mean * mean
        direction = grad / (sqrt_zero_slope(variance) + hyper["eps"])
        if self.buffered:
            if "momentum_buffer" in state:
                direction = hyper["momentum"] * state["momentum_buffer"] + direction
            new_state["momentum_buffer"] = direction
        return {**new_state, "param": state["param"] - hyper["lr"] * direction}
