"""Raw coordinates in which hyperparameters that act together can be moved one by one."""

from collections.abc import Collection, Sequence
from typing import final

import torch
from torch import Tensor

from lightning_rtho.hyperparameters import Hyperparameter

__all__ = ["Coordinates", "relative_slopes"]

_SLOW = 0.3
"""How far slow coordinates move where others move by 1."""


@final
class Coordinates:
    r"""The bijection between natural values of several hyperparameters and raw ones.

    Each value has the raw coordinate T^{-1} of its domain, a slow one that coordinate over 0.3. A
    learning rate eta and a momentum mu that act as eta / (1 - mu), the step that a lasting gradient
    leads to, are moved as T^{-1}(eta / (1 - mu)) and T^{-1}(mu): more momentum then does not mean
    a larger step.

    Args:
        hyperparameters: The hyperparameters, each ``[*H]``.
        couplings: Positions of a learning rate and of its momentum; no position twice.
        slow: Positions of those that shall move less far.

    Example:
        >>> from lightning_rtho import Interval, Positive
        >>> lr, momentum = Hyperparameter(0.1, Positive()), Hyperparameter(0.9, Interval(0, 1))
        >>> coordinates = Coordinates([lr, momentum], couplings=[(0, 1)], slow=[1])
        >>> raw = coordinates.read()
        >>> round(raw[0].exp().item(), 6)  # 0.1 / (1 - 0.9)
        1.0
        >>> raw[1] = raw[1] + 1
        >>> [round(value.item(), 4) for value in coordinates.to_natural(raw)]
        [0.0761, 0.9239]
    """

    def __init__(
        self,
        hyperparameters: Sequence[Hyperparameter],
        couplings: Sequence[tuple[int, int]] = (),
        slow: Collection[int] = (),
    ) -> None:
        self._hypers = list(hyperparameters)
        self._couplings = list(couplings)
        self._units = [1 / _SLOW if i in slow else 1.0 for i in range(len(self._hypers))]

    def read(self) -> list[Tensor]:
        """Return the raw values of the present natural ones, each ``[*H]``."""
        values = [hyper.plain for hyper in self._hypers]
        # A momentum at the end of its interval sets out from a little inside it.
        raw = [
            hyper.domain.to_raw(value) for hyper, value in zip(self._hypers, values, strict=True)
        ]
        for rate, momentum in self._couplings:
            # Not the momentum itself, which may be at the end of its interval, where raw is not.
            inside = self._hypers[momentum].domain.from_raw(raw[momentum])
            hyper = self._hypers[rate]
            raw[rate] = hyper.domain.to_raw(hyper.plain / (1 - inside))
        return [value * unit for value, unit in zip(raw, self._units, strict=True)]

    def to_natural(self, raw: Sequence[Tensor]) -> list[Tensor]:
        """Map raw values to natural ones, differentiably.

        Args:
            raw: Raw values, each ``[*H]``.

        Returns:
            Natural values, each ``[*H]``.
        """
        values = [
            hyper.domain.from_raw(coordinate / unit)
            for hyper, coordinate, unit in zip(self._hypers, raw, self._units, strict=True)
        ]
        for rate, momentum in self._couplings:
            values[rate] = values[rate] * (1 - values[momentum])
        return values

    def project(self, raw: Sequence[Tensor]) -> None:
        """Move raw values, each ``[*H]``, to the nearest ones inside the domains, in place."""
        with torch.no_grad():
            for hyper, coordinate, unit in zip(self._hypers, raw, self._units, strict=True):
                coordinate.copy_(hyper.domain.project(coordinate / unit) * unit)


def relative_slopes(hyperparameters: Sequence[Hyperparameter]) -> Tensor:
    """Return by how much natural values change with a raw unit, or by themselves if that is less.

    Args:
        hyperparameters: The hyperparameters, each ``[*H]``, m entries in all.

    Returns:
        min(|dlambda/du|, |lambda|) ``[m]``, float64: what makes a derivative by lambda one by
        log lambda where lambda is moved in log space.

    Example:
        >>> from lightning_rtho import Interval, Positive
        >>> lr, momentum = Hyperparameter(0.1, Positive()), Hyperparameter(0.9, Interval(0, 1))
        >>> relative_slopes([lr, momentum])
        tensor([0.1000, 0.0900], dtype=torch.float64)
    """
    parts = []
    for hyper in hyperparameters:
        raw = hyper.domain.to_raw(hyper.plain).clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(hyper.domain.from_raw(raw).sum(), raw)
        parts.append(slope.abs().minimum(hyper.plain.abs()).flatten().to("cpu", torch.float64))
    return torch.cat(parts)
