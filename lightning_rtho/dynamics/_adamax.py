"""Adamax: Adam under the infinity norm."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["AdamaxRule"]


@final
@dataclass(frozen=True)
class AdamaxRule(UpdateRule):
    r"""Rule of ``torch.optim.Adamax``: u' = max(b2 u, |g| + eps), w' = w - eta m^ / u'.

    Attributes:
        maximize: Ascend the objective.

    References:
        Kingma and Ba (2015), section 7.1, in the form of ``torch.optim.Adamax``.
    """

    domains = {
        "lr": Positive(),
        "beta1": Interval(0, 1),
        "beta2": Interval(0, 1),
        "eps": Positive(),
        "weight_decay": NonNegative(),
    }
    buffers = ("step", "exp_avg", "exp_inf")

    maximize: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return {
            "step": param.new_zeros((), dtype=torch.float32),
            "exp_avg": torch.zeros_like(param),
            "exp_inf": torch.zeros_like(param),
        }

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        grad = self.ascent(grad) + hyper["weight_decay"] * state["param"]
        mean = state["exp_avg"] + (1 - hyper["beta1"]) * (grad - state["exp_avg"])
        largest = torch.maximum(hyper["beta2"] * state["exp_inf"], grad.abs() + hyper["eps"])
        step_size = hyper["lr"] / (1 - hyper["beta1"] ** step)
        return {
            "param": state["param"] - step_size * mean / largest,
            "step": step,
            "exp_avg": mean,
            "exp_inf": largest,
        }
