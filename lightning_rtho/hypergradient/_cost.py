"""What it costs to follow a run, counted in forward passes and training states."""

from dataclasses import dataclass

__all__ = ["Cost", "forward_cost", "reverse_cost"]

_GRADIENT = 3
"""Forward passes F in whose time a gradient is computed, its own forward pass included."""

_PRODUCT = 6
"""Forward passes in whose time a product with the Hessian is computed."""


@dataclass(frozen=True)
class Cost:
    """What following a step costs, where the validation gradient between updates is not counted.

    Attributes:
        passes: Time of a step's derivatives in forward passes F; a plain gradient takes 3.
        states: Training states (weights and optimizer state) that are kept.
        graphs: Graphs of losses that are kept.
    """

    passes: float
    states: int
    graphs: int = 0

    @property
    def ratio(self) -> float:
        """Time of a step's derivatives over that of a plain gradient."""
        return self.passes / _GRADIENT


def forward_cost(entries: int) -> Cost:
    """Count Forward-HG: 3 F + 6 m F, a product with the Hessian for each of m entries.

    Args:
        entries: Number m of hyperparameter entries.

    Returns:
        The cost.

    Example:
        >>> forward_cost(2).ratio
        5.0
    """
    return Cost(_GRADIENT + _PRODUCT * entries, states=entries)


def reverse_cost(window: int, *, recomputes: bool) -> Cost:
    """Count Reverse-HG: 9 F, or 12 F where gradients are computed again, less the last product.

    Of a window's last product only the hyperparameters' part is needed.

    Args:
        window: Steps between outer updates.
        recomputes: Whether gradients are computed again rather than graphs kept.

    Returns:
        The cost.

    Example:
        >>> reverse_cost(2, recomputes=True).ratio
        3.0
    """
    gradients = 2 if recomputes else 1
    passes = gradients * _GRADIENT + _PRODUCT * (1 - 1 / window)
    return Cost(passes, states=window, graphs=0 if recomputes else window)
