"""When a run has left the region in which it makes progress."""

import math
from typing import Any, final

__all__ = ["Backtracking"]

_RISE = 0.05
"""How far E may rise above its value at the start, as a part of that value."""

_FAR = 2.0
"""Distance from the best state, in lengths of its weights, from which on a gain is asked for.

Networks that learn have moved less in 20 steps; those whose rate is so large that their units die,
by 5 to 100 lengths in 10 steps, and E then rests within 4 % of its start.
"""

_GAIN = 0.2
"""The gain that is asked for every such distance, as a part of E at its beginning."""

_NEWS = 0.05
"""How far E has to fall below the best state's before another is kept, as a part of it."""


@final
class Backtracking:
    """Judges the outer objective E of a run by where it began and by the best state so far.

    A run is lost where E is 5 % above its start or is not finite; or where the weights have moved
    by more than twice their own length from the best state and E has not fallen by 20 % for every
    two lengths. Since E is taken on other data every time, the best state is evaluated on the same
    before it is believed.

    Attributes:
        start: E where the run began; NaN before :meth:`begin`.
        best: E of the state that is kept.

    Example:
        >>> backtracking = Backtracking()
        >>> backtracking.begin(2.0)
        >>> backtracking.suspects(2.05, distance=0.1), backtracking.suspects(2.2, distance=0.1)
        (False, True)
        >>> backtracking.suspects(1.9, distance=6.0), backtracking.suspects(1.0, distance=6.0)
        (True, False)
        >>> backtracking.confirms(2.2, best=2.3, distance=0.1)  # it was the data
        False
    """

    def __init__(self) -> None:
        self.start = self.best = math.nan

    @property
    def has_begun(self) -> bool:
        """Whether there is a start to compare with."""
        return not math.isnan(self.start)

    def begin(self, value: float) -> None:
        """Take down where the run begins; where E is not finite, it does not begin yet.

        Args:
            value: E.
        """
        if math.isfinite(value):
            self.start = self.best = value

    def suspects(self, value: float, distance: float) -> bool:
        """Tell whether the run seems lost.

        Args:
            value: E.
            distance: ||w - w_best|| / ||w_best||.

        Returns:
            Whether it seems so.
        """
        risen = not value <= self.start + _RISE * abs(self.start)
        return risen or _strayed(value, self.best, distance)

    def confirms(self, value: float, best: float, distance: float) -> bool:
        """Tell whether the run is lost, given E of the best state on the same data.

        Args:
            value: E.
            best: E of the best state; where even that is not finite, the data are at fault.
            distance: ||w - w_best|| / ||w_best||.

        Returns:
            Whether it is.
        """
        risen = not value <= best + _RISE * abs(best)
        return math.isfinite(best) and (risen or _strayed(value, best, distance))

    def is_worth_keeping(self, value: float) -> bool:
        """Tell whether the present state is so much better than the best that it is to be kept.

        Args:
            value: E.

        Returns:
            Whether it is; about 90 times while E falls to a hundredth.
        """
        return value < self.best - _NEWS * abs(self.best)

    def state_dict(self) -> dict[str, Any]:
        """Return both values."""
        return {"start": self.start, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        self.start, self.best = state["start"], state["best"]


def _strayed(value: float, best: float, distance: float) -> bool:
    """Tell whether the weights have gone far for too small a gain."""
    if not distance > _FAR:
        return False
    gain = 1 - (1 - _GAIN) ** (distance / _FAR)
    return not value < best - gain * abs(best)
