"""Domains of hyperparameters: bijections between a natural value and an unconstrained raw one.

The outer optimizer moves the raw value u; the user sees the natural value T(u).
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Domain", "Interval", "NonNegative", "Positive", "Real"]


class Domain(ABC):
    """A set of natural values and the coordinate in which the outer optimizer moves through it.

    A subclass of your own is a frozen dataclass, as these are.

    Example:
        >>> @dataclass(frozen=True)
        ... class Below(Domain):
        ...     bound: float
        ...     def contains(self, value):
        ...         return value.isfinite() & (value < self.bound)
        ...     def to_raw(self, value):
        ...         return -(self.bound - value).log()
        ...     def from_raw(self, raw):
        ...         return self.bound - (-raw).exp()
        >>> Below(3.0).from_raw(torch.tensor(0.0))
        tensor(2.)
    """

    @abstractmethod
    def contains(self, value: Tensor) -> Tensor:
        """Tell which entries lie in the domain.

        Args:
            value: Natural values ``[*H]``.

        Returns:
            Booleans ``[*H]``; false for NaN.
        """

    @abstractmethod
    def to_raw(self, value: Tensor) -> Tensor:
        """Map natural values ``[*H]`` to raw ones ``[*H]``."""

    @abstractmethod
    def from_raw(self, raw: Tensor) -> Tensor:
        """Map raw values ``[*H]`` to natural ones ``[*H]``, differentiably."""

    def project(self, raw: Tensor) -> Tensor:
        """Return the nearest raw values ``[*H]`` at which :meth:`from_raw` is in the domain."""
        return raw


@final
@dataclass(frozen=True)
class Real(Domain):
    """Every finite number; raw and natural value are the same.

    Example:
        >>> Real().from_raw(torch.tensor(-2.0))
        tensor(-2.)
    """

    def contains(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.contains`."""
        return value.isfinite()

    def to_raw(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.to_raw`."""
        return value

    def from_raw(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.from_raw`."""
        return raw


@final
@dataclass(frozen=True)
class Positive(Domain):
    """Numbers above 0, moved in log space: T(u) = exp(u).

    Example:
        >>> Positive().to_raw(torch.tensor(1.0))
        tensor(0.)
    """

    def contains(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.contains`."""
        return value.isfinite() & (value > 0)

    def to_raw(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.to_raw`."""
        return value.log()

    def from_raw(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.from_raw`."""
        return raw.exp()

    def project(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.project`."""
        return raw.clamp(-_largest_exponent(raw), _largest_exponent(raw))


def _largest_exponent(raw: Tensor) -> float:
    """Return a raw value at which the exponential is neither 0, taken negatively, nor infinite."""
    return -math.log(torch.finfo(raw.dtype).tiny) - 1


_NON_NEGATIVE_UNIT = 1e-6
"""Where `NonNegative` passes from linear to logarithmic: below any weight decay that matters."""


@final
@dataclass(frozen=True)
class NonNegative(Domain):
    """Numbers from 0 up; may start at and reach 0: T(u) = 1e-6 sinh(u), u >= 0.

    The coordinate is linear below about 1e-6, so that 0 is an ordinary point, and logarithmic
    above, so that one step means the same relative change at 1e-5 and at 1.

    Example:
        >>> NonNegative().from_raw(NonNegative().to_raw(torch.tensor(0.0)))
        tensor(0.)
    """

    def contains(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.contains`."""
        return value.isfinite() & (value >= 0)

    def to_raw(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.to_raw`."""
        return (value / _NON_NEGATIVE_UNIT).asinh()

    def from_raw(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.from_raw`."""
        return _NON_NEGATIVE_UNIT * raw.sinh()

    def project(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.project`."""
        return raw.clamp(0, _largest_exponent(raw))


_INTERVAL_START = math.log(999)
"""Raw distance from which a value at an end of its interval sets out: 0.1 % of the width inside."""

_INTERVAL_BOUND = math.log(1e6)
"""Largest raw distance: 1e-6 of the width inside, so that 1 - beta never rounds to 0."""


@final
@dataclass(frozen=True)
class Interval(Domain):
    """Numbers from `low` to `high`, moved in logit space: T(u) = low + (high - low) sigmoid(u).

    A value may start at an end; once moved it stays strictly inside.

    Args:
        low: Lower end, natural.
        high: Upper end, natural.

    Raises:
        ValueError: If `low` is not below `high`, or either is not finite.

    Example:
        >>> Interval(0, 1).from_raw(torch.tensor(0.0))
        tensor(0.5000)
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        """Check the ends."""
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"`low` must be below `high` and both finite, got low={self.low}, "
                f"high={self.high}. Use Real(), Positive() or NonNegative() for an open end."
            )

    def contains(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.contains`."""
        return (value >= self.low) & (value <= self.high)

    def to_raw(self, value: Tensor) -> Tensor:
        """See :meth:`Domain.to_raw`."""
        fraction = (value - self.low) / (self.high - self.low)
        raw = torch.where(fraction <= 0, -_INTERVAL_START, fraction.logit())
        return torch.where(fraction >= 1, _INTERVAL_START, raw)

    def from_raw(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.from_raw`."""
        return self.low + (self.high - self.low) * raw.sigmoid()

    def project(self, raw: Tensor) -> Tensor:
        """See :meth:`Domain.project`."""
        return raw.clamp(-_INTERVAL_BOUND, _INTERVAL_BOUND)
