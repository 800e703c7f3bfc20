"""Longer outer steps for learning rates that are too small to learn anything by."""

import math
from typing import Any, final

__all__ = ["Ramp"]

_NEGLIGIBLE = 0.01
"""Change of E by a raw unit of the learning rates, as a part of E, below which they do nothing."""

_STRETCH = 5.0
"""How many times as far learning rates move meanwhile: 5 times 0.2, a factor of e an update."""


@final
class Ramp:
    """Tells how many times as far the learning rates shall move in an outer step.

    As long as raising them by a factor of e would change E by less than 1 % of itself, five times
    as far: by 1 % nothing is risked, and a rate that is 10,000 times too small takes ten updates
    to come into its own instead of fifty. Once that is passed the run learns, and steps have their
    ordinary length to the end: a change that is as small later is that of a rate that has done its
    work.

    Attributes:
        is_over: Whether steps have their ordinary length from now on.

    Example:
        >>> ramp = Ramp()
        >>> ramp.stretch(change=0.001, value=2.0), ramp.stretch(change=0.1, value=2.0)
        (5.0, 1.0)
        >>> ramp.stretch(change=0.001, value=2.0)
        1.0
    """

    def __init__(self) -> None:
        self.is_over = False

    def stretch(self, change: float, value: float) -> float:
        """Return the factor of the coming step.

        Args:
            change: Sum of |dE/du| over the raw values u of all learning rates.
            value: E.

        Returns:
            5 or 1.
        """
        self.is_over |= not (math.isfinite(value) and change < _NEGLIGIBLE * abs(value))
        return 1.0 if self.is_over else _STRETCH

    def state_dict(self) -> dict[str, Any]:
        """Return whether it is over."""
        return {"is_over": self.is_over}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        self.is_over = state["is_over"]
