"""Averaged stochastic gradient descent."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["ASGDRule"]


@final
@dataclass(frozen=True)
class ASGDRule(UpdateRule):
    r"""Rule of ``torch.optim.ASGD``: w' = (1 - lambd eta_t) w - eta_t g, eta_t a buffer.

    eta_{t+1} = eta / (1 + lambd eta t)^alpha. The averaged weights ``ax`` are no part of the map:
    nothing the model computes depends on them.

    Attributes:
        maximize: Ascend the objective.

    References:
        Polyak and Juditsky (1992), in the form of ``torch.optim.ASGD``.
    """

    domains = {
        "lr": Positive(),
        "lambd": NonNegative(),
        "alpha": Interval(0, 1),
        "weight_decay": NonNegative(),
    }
    buffers = ("step", "eta")

    maximize: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return {"step": param.new_zeros((), dtype=torch.float32), "eta": hyper["lr"].clone()}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        grad = self.ascent(grad) + hyper["weight_decay"] * state["param"]
        param = state["param"] * (1 - hyper["lambd"] * state["eta"]) - state["eta"] * grad
        eta = hyper["lr"] / (1 + hyper["lambd"] * hyper["lr"] * step) ** hyper["alpha"]
        return {"param": param, "step": step, "eta": eta}
