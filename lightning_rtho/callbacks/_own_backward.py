"""Noticing backward passes that a user has written: they need not be derivatives."""

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rtho.linearization import graph_nodes

__all__ = ["own_functions", "warn_of_own_functions"]

_TRUSTED = ("torch", "lightning_rtho")
"""Packages whose functions are what they seem, or are refused elsewhere."""


def own_functions(loss: Tensor) -> list[str]:
    """Return the names of autograd functions in the graph of a loss that a user has written.

    Args:
        loss: The loss ``[]``.

    Returns:
        The names, in alphabetical order.
    """
    # Private: a node tells in no other way which function it is of.
    classes = {getattr(type(node), "_forward_cls", None) for node in graph_nodes([loss])}
    return sorted(
        cls.__name__
        for cls in classes
        if cls is not None and cls.__module__.partition(".")[0] not in _TRUSTED
    )


def warn_of_own_functions(loss: Tensor) -> None:
    """Warn of such functions.

    Args:
        loss: The loss ``[]``.
    """
    names = own_functions(loss)
    if names:
        rank_zero_warn(
            f"`training_step` runs the autograd function `{names[0]}`, whose `backward` is its "
            "author's. Hypergradients take it for the derivative of what runs forward. Use "
            "`lightning_rtho.scale_gradient(x, factor)` to scale or reverse gradients; whether all "
            "is well `hypergradcheck` tells."
        )
