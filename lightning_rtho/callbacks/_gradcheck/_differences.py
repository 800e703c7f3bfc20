"""Finite differences at several step sizes, and what their disagreement says."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Differences"]

_STEPS = (1e-3, 1e-4, 1e-5, 1e-6)
"""Relative step sizes: truncation falls with their square, rounding grows with their inverse."""

_FINE_STEPS = (1e-7, 1e-8)
"""For what is not smooth at those, as next to the kink of a ReLU."""


@dataclass(frozen=True)
class Differences:
    """The derivative of a function of one variable at 0, by central differences.

    Attributes:
        value: The derivative, at the step size at which it depends least on the step size.
        step: That step size.
        spread: How much it differs there from the derivative at the next larger step size.
        one_sided: The derivatives to the left and to the right, at the two middle step sizes.

    Example:
        >>> found = Differences.of(lambda t: (1 + t) ** 3, at_zero=1.0)
        >>> abs(found.value - 3) < 1e-8, found.has_kink(tolerance=1e-6)
        (True, False)
        >>> Differences.of(abs, at_zero=0.0).has_kink(tolerance=1e-6)
        True
    """

    value: float
    step: float
    spread: float
    one_sided: tuple[tuple[float, float], tuple[float, float]]

    @classmethod
    def of(
        cls,
        function: Callable[[float], float],
        at_zero: float,
        expected: Sequence[float] = (),
        tolerance: float = 0.0,
    ) -> "Differences":
        """Measure.

        Args:
            function: The function.
            at_zero: Its value at 0.
            expected: What the derivative should be; where it is not, smaller steps are tried, and
                the smallest counts at which it depends on the step size no more than it may.
            tolerance: By how much it may.

        Returns:
            Its derivative at 0.
        """
        values = {h: (function(-h), function(h)) for h in _STEPS}
        central, spreads = _central(values)
        step = min(spreads, key=lambda h: spreads[h])
        if any(abs(central[step] - value) > tolerance for value in expected):
            values |= {h: (function(-h), function(h)) for h in _FINE_STEPS}
            central, spreads = _central(values)
            steady = [h for h, spread in spreads.items() if spread <= tolerance]
            step = min(steady or spreads, key=lambda h: h if steady else spreads[h])
        coarse, fine = (
            ((at_zero - values[h][0]) / h, (values[h][1] - at_zero) / h) for h in _STEPS[1:3]
        )
        return cls(central[step], step, spreads[step], (coarse, fine))

    def has_kink(self, tolerance: float) -> bool:
        """Tell whether the function is not smooth at 0.

        Args:
            tolerance: By how much derivatives may differ.

        Returns:
            Whether central differences depend on the step size, or those to the left and to the
            right stay apart as the step size falls.
        """
        coarse, fine = (abs(right - left) for left, right in self.one_sided)
        return self.spread > tolerance or (fine > 10 * tolerance and fine > coarse / 2)


def _central(
    values: Mapping[float, tuple[float, float]],
) -> tuple[dict[float, float], dict[float, float]]:
    """Return central differences by step size, and how much each differs from the one before."""
    central = {h: (right - left) / (2 * h) for h, (left, right) in values.items()}
    return central, {h: abs(central[h] - central[larger]) for larger, h in pairwise(values)}
