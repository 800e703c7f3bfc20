"""Descent on hyperparameters, in the raw coordinates of their domains."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.outer._coordinates import Coordinates
from lightning_rtho.outer._ramp import Ramp

__all__ = ["HyperparameterDescent", "OuterOptimizerCallable", "adam"]

_GROWTH = 1.5
"""Growth of a learning rate by an update below which it has come near the end of its domain."""

OuterOptimizerCallable: TypeAlias = Callable[[list[Tensor]], Optimizer]


def adam(params: list[Tensor]) -> Optimizer:
    """The default outer optimizer: Adam in raw space, with a short memory.

    As long as its hypergradient keeps its size and sign, each step changes a `Positive`
    hyperparameter by a factor of exp(0.2) = 1.22, whatever the scale of the objective, if only the
    derivative by the raw value is far above Adam's eps of 1e-8: so a value far off is there soon.
    Where the hypergradient is noise, steps cancel; where there is a trend in the noise, they follow
    it. Means over 5 and 20 updates are short enough for a hypergradient that changes by orders of
    magnitude on the way.

    Args:
        params: Raw values, each ``[*H]``.

    Returns:
        The optimizer.
    """
    return torch.optim.Adam(params, lr=0.2, betas=(0.8, 0.95))


class HyperparameterDescent:
    """Moves hyperparameters against their hypergradient.

    Args:
        hyperparameters: What is moved, each ``[*H]``.
        make_optimizer: Makes a torch optimizer of a list of raw tensors.
        coordinates: Raw coordinates of the hyperparameters; None takes those of their domains.
        ramped: Positions of learning rates that set out as `ramp` says.
        ramp: How far they move in the first steps; None is `Ramp()`.

    Example:
        >>> from lightning_rtho import Positive
        >>> lr = Hyperparameter(0.1, Positive())
        >>> descent = HyperparameterDescent([lr], lambda raw: torch.optim.SGD(raw, lr=1.0))
        >>> descent.step(torch.tensor([1.0]))  # dE/dlog lr = lr dE/dlr = 0.1
        >>> lr.item() / 0.1, torch.tensor(-0.1).exp().item()
        (0.90483741..., 0.90483742...)
    """

    def __init__(
        self,
        hyperparameters: Sequence[Hyperparameter],
        make_optimizer: OuterOptimizerCallable,
        coordinates: Coordinates | None = None,
        ramped: Sequence[int] = (),
        ramp: Ramp | None = None,
    ) -> None:
        self.hyperparameters = list(hyperparameters)
        self._ramped, self._ramp = list(ramped), ramp or Ramp()
        self._coordinates = coordinates or Coordinates(hyperparameters)
        self._make_optimizer = make_optimizer
        self.restart()

    def restart(self) -> None:
        """Begin anew, with a fresh optimizer, at the values that the hyperparameters have."""
        self.raw = [raw.clone().requires_grad_() for raw in self._coordinates.read()]
        self.optimizer = self._make_optimizer(self.raw)

    @property
    def is_climbing(self) -> bool:
        """Whether learning rates go up whatever the hypergradient says."""
        return bool(self._ramped) and self._ramp.is_climbing

    @property
    def has_climbed(self) -> bool:
        """Whether learning rates went up so, now or before."""
        return self._ramp.has_climbed

    def end_climb(self) -> None:
        """Let learning rates move as the optimizer says from now on: they are as high as can be."""
        self._ramp.end_climb()

    def state_dict(self) -> dict[str, Any]:
        """Return raw values and the optimizer's state."""
        return {
            "raw": [raw.detach().clone() for raw in self.raw],
            "kind": type(self.optimizer).__name__,
            "optimizer": self.optimizer.state_dict(),
            "ramp": self._ramp.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state.

        Raises:
            ValueError: If it is that of another optimizer.
        """
        kind = type(self.optimizer).__name__
        if kind != state["kind"]:
            raise ValueError(
                f"`outer_optimizer` must be the one that the checkpoint was written with, "
                f"{state['kind']}, got {kind}. Pass the same, or begin without `ckpt_path`."
            )
        with torch.no_grad():
            for raw, value in zip(self.raw, state["raw"], strict=True):
                raw.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self._ramp.load_state_dict(state["ramp"])

    def jacobian(self) -> Tensor:
        """Return dlambda/du, natural by raw values where they stand, ``[m, m]``, float64."""
        flat = torch.cat([raw.detach().flatten().to("cpu", torch.float64) for raw in self.raw])

        def natural(flat: Tensor) -> Tensor:
            parts = flat.split([raw.numel() for raw in self.raw])
            pairs = zip(parts, self.raw, strict=True)
            values = self._coordinates.to_natural([part.reshape(raw.shape) for part, raw in pairs])
            return torch.cat([value.flatten() for value in values])

        found: Tensor = torch.autograd.functional.jacobian(natural, flat)
        return found

    def step(self, hypergradient: Tensor, objective: float = math.nan) -> None:
        """Make one outer step and write the new natural values into the hyperparameters.

        Args:
            hypergradient: dE/dlambda with respect to natural values ``[m]``.
            objective: E, by which rates on their climb tell that they go too far; NaN ends it.
        """
        with torch.enable_grad():
            values = self._coordinates.to_natural(self.raw)
        parts = hypergradient.split([raw.numel() for raw in self.raw])
        cotangents = [
            part.to(value).reshape(value.shape) for part, value in zip(parts, values, strict=True)
        ]
        gradients = torch.autograd.grad(values, self.raw, cotangents)
        for raw, gradient in zip(self.raw, gradients, strict=True):
            raw.grad = gradient
        was_climbing = self.is_climbing
        rates = [self.raw[i] for i in self._ramped]
        before = [rate.detach().clone() for rate in rates]
        self.optimizer.step()
        if rates:
            change = sum(gradients[i].abs().sum().item() for i in self._ramped)
            self._set_out(rates, before, change, objective)
        self._coordinates.project(self.raw)
        with torch.no_grad():
            values = self._coordinates.to_natural(self.raw)
            if was_climbing and not self._have_grown(values):
                self.end_climb()
            for hyper, value in zip(self.hyperparameters, values, strict=True):
                hyper.assign(value)

    def _have_grown(self, values: Sequence[Tensor]) -> bool:
        """Tell whether a learning rate is to grow still, or all are near the ends of domains."""
        return any(
            bool((values[i] > _GROWTH * self.hyperparameters[i].plain).any()) for i in self._ramped
        )

    def _set_out(
        self, rates: Sequence[Tensor], before: Sequence[Tensor], change: float, objective: float
    ) -> None:
        """Move the learning rates as far as the ramp says, from where they were."""
        with torch.no_grad():
            if self._ramp.is_climbing:
                way = self._ramp.climb(change, objective)
                moved = [old + way for old in before]
            else:
                stretch = self._ramp.stretch(change, objective)
                moved = [old.lerp(rate, stretch) for rate, old in zip(rates, before, strict=True)]
            for rate, new in zip(rates, moved, strict=True):
                rate.copy_(new)
