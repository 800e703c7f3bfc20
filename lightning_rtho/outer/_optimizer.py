"""Descent on hyperparameters, in the raw coordinates of their domains."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho.hyperparameters import Hyperparameter

__all__ = ["HyperparameterDescent", "OuterOptimizerCallable", "adam"]

OuterOptimizerCallable: TypeAlias = Callable[[list[Tensor]], Optimizer]


def adam(params: list[Tensor]) -> Optimizer:
    """The default outer optimizer: Adam with step 0.1 in raw space.

    The first steps change a `Positive` hyperparameter by about 10 % each, whatever the scale of
    the objective.

    Args:
        params: Raw values, each ``[*H]``.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.99))


class HyperparameterDescent:
    """Moves hyperparameters against their hypergradient.

    Args:
        hyperparameters: What is moved, each ``[*H]``.
        make_optimizer: Makes a torch optimizer of a list of raw tensors.

    Example:
        >>> from lightning_rtho import Positive
        >>> lr = Hyperparameter(0.1, Positive())
        >>> descent = HyperparameterDescent([lr], lambda raw: torch.optim.SGD(raw, lr=1.0))
        >>> descent.step(torch.tensor([1.0]))  # dE/dlog lr = lr dE/dlr = 0.1
        >>> lr.item() / 0.1, torch.tensor(-0.1).exp().item()
        (0.90483741..., 0.90483742...)
    """

    def __init__(
        self, hyperparameters: Sequence[Hyperparameter], make_optimizer: OuterOptimizerCallable
    ) -> None:
        self.hyperparameters = list(hyperparameters)
        self.raw = [
            hyper.domain.to_raw(hyper.plain).clone().requires_grad_()
            for hyper in self.hyperparameters
        ]
        self.optimizer = make_optimizer(self.raw)

    def state_dict(self) -> dict[str, Any]:
        """Return raw values and the optimizer's state."""
        return {
            "raw": [raw.detach().clone() for raw in self.raw],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        with torch.no_grad():
            for raw, value in zip(self.raw, state["raw"], strict=True):
                raw.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])

    def step(self, hypergradient: Tensor) -> None:
        """Make one outer step and write the new natural values into the hyperparameters.

        Args:
            hypergradient: dE/dlambda with respect to natural values ``[m]``.
        """
        parts = hypergradient.split([raw.numel() for raw in self.raw])
        for hyper, raw, part in zip(self.hyperparameters, self.raw, parts, strict=True):
            with torch.enable_grad():
                value = hyper.domain.from_raw(raw)
            (raw.grad,) = torch.autograd.grad(value, raw, part.to(raw).reshape(raw.shape))
        self.optimizer.step()
        with torch.no_grad():
            for hyper, raw in zip(self.hyperparameters, self.raw, strict=True):
                raw.copy_(hyper.domain.project(raw))
                hyper.assign(hyper.domain.from_raw(raw))
