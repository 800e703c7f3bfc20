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
        states: Training states (weights and optimizer state) that are kept, in their precision.
        graphs: Graphs of losses that are kept.
    """

    passes: float
    states: float
    graphs: int = 0

    @property
    def ratio(self) -> float:
        """Time of a step's derivatives over that of a plain gradient."""
        return self.passes / _GRADIENT


def forward_cost(entries: int, fraction: float = 1.0, precision: float = 1.0) -> Cost:
    """Count Forward-HG: 3 F + 6 m F, a product with the Hessian for each of m entries.

    With products on a fraction f of the examples 3 F + 3 f F + 6 m f F: their gradient is another.

    Args:
        entries: Number m of hyperparameter entries.
        fraction: Share of the examples that products are taken on.
        precision: Bytes of an entry of Z over those of a weight.

    Returns:
        The cost.

    Example:
        >>> forward_cost(2).ratio
        5.0
    """
    again = 0 if fraction == 1 else fraction * _GRADIENT  # a sample's own
    passes = _GRADIENT + again + fraction * _PRODUCT * entries
    return Cost(passes, states=entries * precision)


def reverse_cost(window: int, *, recomputes: bool, fraction: float = 1.0) -> Cost:
    """Count Reverse-HG: 9 F, or 12 F where gradients are computed again, less the last product.

    Of a window's last product only the hyperparameters' part is needed.

    Args:
        window: Steps between outer updates.
        recomputes: Whether gradients are computed again rather than graphs kept.
        fraction: Share of the examples on which that is done, and products are taken.

    Returns:
        The cost.

    Example:
        >>> reverse_cost(2, recomputes=True).ratio
        3.0
    """
    again = fraction * _GRADIENT if recomputes else 0
    passes = _GRADIENT + again + fraction * _PRODUCT * (1 - 1 / window)
    return Cost(passes, states=window, graphs=0 if recomputes else window)
