"""Stochastic gradient descent with momentum."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Self, final

from torch import Tensor

from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["SGDRule"]


@final
@dataclass(frozen=True)
class SGDRule(UpdateRule):
    r"""Rule of ``torch.optim.SGD``: v' = mu v + (1 - tau) g, w' = w - eta v', g <- g + rho w.

    Attributes:
        nesterov: w' = w - eta (g + mu v').
        maximize: Ascend the objective.
        buffered: Whether there is a velocity: momentum is not zero, or is tuned.

    References:
        ``torch.optim.SGD``; Sutskever et al. (2013) for Nesterov's form.
    """

    domains = {
        "lr": Positive(),
        "momentum": Interval(0, 1),
        "dampening": Interval(0, 1),
        "weight_decay": NonNegative(),
    }
    buffers = ("momentum_buffer",)

    nesterov: bool = False
    maximize: bool = False
    buffered: bool = False

    @classmethod
    def from_group(cls, group: Mapping[str, Any], tuned: Collection[str]) -> Self:
        """See :meth:`UpdateRule.from_group`.

        Returns:
            The rule of this group.

        Raises:
            ValueError: If momentum is tuned at 0 beside dampening, fixed or tuned: torch applies
                no dampening at momentum 0, so the update jumps there and has no derivative.
        """
        dampened = group["dampening"] != 0 or "dampening" in tuned
        if "momentum" in tuned and group["momentum"] == 0 and dampened:
            raise ValueError(
                "`momentum` cannot be tuned from 0 with dampening: the update of torch.optim.SGD "
                f"jumps there, got dampening={group['dampening']}. Start momentum above 0."
            )
        return cls(
            nesterov=bool(group["nesterov"]),
            maximize=bool(group["maximize"]),
            buffered=group["momentum"] != 0 or "momentum" in tuned,
        )

    @classmethod
    def unkept_buffers(cls, group: Mapping[str, Any], tuned: Collection[str]) -> tuple[str, ...]:
        """See :meth:`UpdateRule.unkept_buffers`."""
        return cls.buffers if group["momentum"] == 0 and "momentum" in tuned else ()

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        param = state["param"]
        grad = self.ascent(grad) + hyper["weight_decay"] * param
        if not self.buffered:  # what a scheduler has had in momentum before stays
            return {**state, "param": param - hyper["lr"] * grad}
        if "momentum_buffer" in state:
            velocity = state["momentum_buffer"] * hyper["momentum"]
            velocity = velocity + (1 - hyper["dampening"]) * grad
        else:  # torch starts the velocity at the first gradient, whatever the dampening
            velocity = grad
        direction = grad + hyper["momentum"] * velocity if self.nesterov else velocity
        return {"param": param - hyper["lr"] * direction, "momentum_buffer": velocity}
