"""How learning rates set out: far where they do nothing, and up to where a run is lost."""

import math
from typing import Any, final

__all__ = ["Ramp"]

_NEGLIGIBLE = 0.01
"""Change of E by a raw unit of the learning rates, as a part of E, below which they do nothing."""

_STRETCH = 5.0
"""How many times as far learning rates move meanwhile: 5 times 0.2, a factor of e an update."""

_SHARE = 4
"""A climb takes one update of so many that a run makes, at the most."""

_CLIMB = 20
"""And so many in all: factors of e, of which rates that do anything need 5 to 10 to lose a run."""

_JUMP = 10.0
"""How many of these factors one update makes, at the most."""


@final
class Ramp:
    """Tells how far the learning rates shall move in the first outer steps.

    *Climb*: where a run can be taken back, its rates go up by a factor of e an update, whatever
    the hypergradient says, until the run is lost: a tenth of that rate is what it begins again
    with. Where their domain ends before, they go on from there. It is for hypergradients that look
    back over a few steps only, as `TRHO` tells. As long as the rates do nothing E is linear in
    them, so that one update can go as far as that line leads to a change of 1 % of E.

    *Ramp*: without a climb, as long as raising the rates by a factor of e would change E by less
    than 1 % of itself, they move five times as far as the outer optimizer says: by 1 % nothing is
    risked, and a rate that is 10,000 times too small takes ten updates to come into its own instead
    of fifty. Once that is passed the run learns, and steps have their ordinary length to the end: a
    change that is as small later is that of a rate that has done its work.

    Args:
        updates: Outer updates of the whole run, of which a quarter may be a climb, but not more
            than 20; 0 where the run cannot be taken back, and for no climb.

    Attributes:
        climbs: Updates of the climb that are left.
        has_climbed: Whether it has begun, or ended.
        is_over: Whether steps have their ordinary length from now on, after a climb.

    Example:
        >>> ramp = Ramp()
        >>> ramp.stretch(change=0.001, value=2.0), ramp.stretch(change=0.1, value=2.0)
        (5.0, 1.0)
        >>> ramp.stretch(change=0.001, value=2.0)
        1.0
        >>> ramp = Ramp(updates=50)
        >>> round(ramp.climb(change=0.02 / 1000, value=2.0), 6)  # ln 1000
        6.907755
        >>> ramp.climb(change=0.5, value=2.0), ramp.climbs
        (1.0, 10)
    """

    def __init__(self, updates: float = 0) -> None:
        self.climbs = int(min(updates / _SHARE, _CLIMB))
        self.has_climbed = self.is_over = False

    @property
    def is_climbing(self) -> bool:
        """Whether the rates go up whatever the hypergradient says."""
        return self.climbs > 0

    def climb(self, change: float, value: float) -> float:
        """Return how far up the rates go, and count the update.

        Args:
            change: Sum of |dE/du| over the raw values u of all learning rates.
            value: E.

        Returns:
            The way in raw units, from 1 to 10.
        """
        self.climbs, self.has_climbed = self.climbs - 1, True
        negligible = _NEGLIGIBLE * abs(value)
        if not 0 < change < negligible < math.inf:
            return 1.0
        return min(max(math.log(negligible / change), 1.0), _JUMP)

    def end_climb(self) -> None:
        """Go on by ordinary steps: the run was lost, or there is no room above."""
        self.climbs, self.has_climbed, self.is_over = 0, True, True

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
        """Return what is left of the climb, and whether there was one and all is over."""
        return {
            "climbs": self.climbs,
            "has_climbed": self.has_climbed,
            "is_over": self.is_over,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state; a climb does not go on where this run has none.
        """
        self.climbs = min(self.climbs, state["climbs"])
        self.has_climbed, self.is_over = state["has_climbed"], state["is_over"]
