"""Adadelta: steps in the unit of the parameter."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_rtho._numerics import sqrt_zero_slope
from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["AdadeltaRule"]


@final
@dataclass(frozen=True)
class AdadeltaRule(UpdateRule):
    r"""Rule of ``torch.optim.Adadelta``: d = g sqrt(u + eps) / sqrt(v' + eps), w' = w - eta d.

    v and u are running averages, at rate rho, of the squares of g and of d.

    Attributes:
        maximize: Ascend the objective.

    References:
        Zeiler (2012), in the form of ``torch.optim.Adadelta``.
    """

    domains = {
        "lr": Positive(),
        "rho": Interval(0, 1),
        "eps": Positive(),
        "weight_decay": NonNegative(),
    }
    buffers = ("square_avg", "acc_delta")

    maximize: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return {"square_avg": torch.zeros_like(param), "acc_delta": torch.zeros_like(param)}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        grad = self.ascent(grad) + hyper["weight_decay"] * state["param"]
        rho, eps = hyper["rho"], hyper["eps"]
        square = rho * state["square_avg"] + (1 - rho) * grad * grad
        numerator = sqrt_zero_slope(state["acc_delta"] + eps)
        delta = numerator / sqrt_zero_slope(square + eps) * grad
        return {
            "param": state["param"] - hyper["lr"] * delta,
            "square_avg": square,
            "acc_delta": rho * state["acc_delta"] + (1 - rho) * delta * delta,
        }
