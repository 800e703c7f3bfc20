"""Adagrad: the gradient over the root of the sum of its squares."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_rtho._numerics import sqrt_zero_slope
from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import NonNegative, Positive

__all__ = ["AdagradRule"]


@final
@dataclass(frozen=True)
class AdagradRule(UpdateRule):
    r"""Rule of ``torch.optim.Adagrad``: w' = w - eta_t g / (sqrt(sum g^2) + eps).

    eta_t = eta / (1 + (t - 1) ``lr_decay``).

    Attributes:
        maximize: Ascend the objective.
        initial_accumulator_value: What the sum begins with.

    References:
        Duchi et al. (2011), in the form of ``torch.optim.Adagrad``.
    """

    domains = {
        "lr": Positive(),
        "lr_decay": NonNegative(),
        "weight_decay": NonNegative(),
        "eps": Positive(),
    }
    buffers = ("step", "sum")

    maximize: bool = False
    initial_accumulator_value: float = 0.0

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`; for groups that are added, others have their buffers."""
        total = torch.full_like(param, self.initial_accumulator_value)
        return {"step": torch.zeros((), device=param.device), "sum": total}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        grad = self.ascent(grad) + hyper["weight_decay"] * state["param"]
        total = state["sum"] + grad * grad
        rate = hyper["lr"] / (1 + (step - 1) * hyper["lr_decay"])
        param = state["param"] - rate * grad / (sqrt_zero_slope(total) + hyper["eps"])
        return {"param": param, "step": step, "sum": total}
