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

_FAR_ON_TRIAL = 1.0
"""The same in the first updates.

Rates that are two or three times too large do not lose a run, but harm its network for good; they
lead by one length in 10 steps, those that learn well do so once E has fallen.
"""

_TRIAL = 10
"""Outer updates at the beginning of a run that can be thrown away and made again at a lower rate.
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
    two lengths. In its first 10 updates it is on trial: it has to gain as much for every length,
    and the start stays the best state. Since E is taken on other data every time, the best state is
    evaluated on the same before it is believed.

    Attributes:
        start: E where the run began; NaN before :meth:`begin`.
        best: E of the state that is kept.
        trial: Outer updates that are left of the trial.

    Example:
        >>> backtracking = Backtracking()
        >>> backtracking.begin(2.0)
        >>> backtracking.suspects(2.05, distance=0.1), backtracking.suspects(2.2, distance=0.1)
        (False, True)
        >>> backtracking.suspects(1.9, distance=3.0), backtracking.suspects(1.0, distance=3.0)
        (True, False)
        >>> backtracking.confirms(2.2, best=2.3, distance=0.1)  # it was the data
        False
    """

    def __init__(self) -> None:
        self.start = self.best = math.nan
        self.trial = 0

    @property
    def has_begun(self) -> bool:
        """Whether there is a start to compare with."""
        return not math.isnan(self.start)

    def begin(self, value: float, *, on_trial: bool = True) -> None:
        """Take down where the run begins; where E is not finite, it does not begin yet.

        Args:
            value: E.
            on_trial: Whether there is a trial: without a learning rate to lower there is no use.
        """
        if math.isfinite(value):
            self.start = self.best = value
            self.trial = _TRIAL if on_trial else 0

    def suspects(self, value: float, distance: float) -> bool:
        """Tell whether the run seems lost.

        Args:
            value: E.
            distance: ||w - w_best|| / ||w_best||.

        Returns:
            Whether it seems so.
        """
        return self._is_lost(value, self.start, self.best, distance)

    def confirms(self, value: float, best: float, distance: float) -> bool:
        """Tell whether the run is lost, given E of the best state on the same data.

        Args:
            value: E.
            best: E of the best state; where even that is not finite, the data are at fault.
            distance: ||w - w_best|| / ||w_best||.

        Returns:
            Whether it is.
        """
        return math.isfinite(best) and self._is_lost(value, best, best, distance)

    def _is_lost(self, value: float, start: float, best: float, distance: float) -> bool:
        risen = not value <= start + _RISE * abs(start)
        return risen or self._has_strayed(value, best, distance)

    def _has_strayed(self, value: float, best: float, distance: float) -> bool:
        """Tell whether the weights have gone far for too small a gain."""
        far = _FAR_ON_TRIAL if self.trial > 0 else _FAR
        if not distance > far:
            return False
        gain = 1 - (1 - _GAIN) ** (distance / far)
        return not value < best - gain * abs(best)

    def go_on(self) -> None:
        """Count an update of the trial that the run has stood."""
        self.trial = max(self.trial - 1, 0)

    def begin_again(self) -> None:
        """Begin the trial anew, if the run is on trial still."""
        self.trial = _TRIAL if self.trial > 0 else 0

    def is_worth_keeping(self, value: float) -> bool:
        """Tell whether the present state is so much better than the best that it is to be kept.

        Args:
            value: E.

        Returns:
            Whether it is; about 90 times while E falls to a hundredth, and never on trial.
        """
        return self.trial == 0 and value < self.best - _NEWS * abs(self.best)

    def sets_out_too_fast(self, value: float, sensitivity: float) -> bool:
        """Tell whether the first steps of a run are too long, from its dependence on the rate.

        As long as steps go downhill, weights depend on the learning rate as they have moved by it:
        dw/dlog lr is w - w_0. Where they depend on it by more than their length, gains are asked
        for as for so long a way.

        Args:
            value: E.
            sensitivity: ||dw/dlog lr|| / ||w||; NaN where it is not known.

        Returns:
            Whether they are; after the trial not any more.
        """
        return self.trial > 0 and self._has_strayed(value, self.best, sensitivity)

    def state_dict(self) -> dict[str, Any]:
        """Return both values, and where the trial stands."""
        return {"start": self.start, "best": self.best, "trial": self.trial}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state.
        """
        self.start, self.best, self.trial = state["start"], state["best"], state["trial"]
