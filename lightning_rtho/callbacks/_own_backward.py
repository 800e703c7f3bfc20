"""Noticing backward passes that are no derivatives, or need not be, as a user has written them."""

import re
from collections.abc import Collection, Iterable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["FunctionCheck", "own_functions"]

_TRUSTED = ("torch", "lightning_rtho")
"""Packages whose functions are what they seem, or are refused elsewhere."""


_STRAIGHT_THROUGH = re.compile("(FakeQuantize|FusedMovingAvgObsFq).*")
"""Functions of torch that round, whose backward pass takes them for the identity."""


_SAMPLING = re.compile("NormalBackward[1-9]")
"""Nodes of ``torch.normal``; that of ``x.normal_()``, which forgets what x was, is right."""


def own_functions(nodes: Iterable[Any]) -> list[str]:
    """Return the functions in the graph of a loss whose ``backward`` may be no derivative.

    They are those that a user has written, and those of torch that round.

    Args:
        nodes: The nodes of the graph.

    Returns:
        Their names, in alphabetical order.
    """
    names = set()
    for node in nodes:
        # Private: a node tells in no other way which function it is of.
        cls = getattr(type(node), "_forward_cls", None)
        if cls is not None and cls.__module__.partition(".")[0] not in _TRUSTED:
            names.add(cls.__name__)
        if _STRAIGHT_THROUGH.fullmatch(node.name()):
            names.add(node.name().partition("Backward")[0])
    return sorted(names)


class FunctionCheck:
    """Looks for functions in losses whose backward pass may be no derivative.

    Args:
        where: What the losses are of, to begin a sentence with.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._has_warned = False

    def __call__(self, nodes: Collection[Any]) -> None:
        """Look into the graph of a loss; warn once of functions of which nobody knows.

        Args:
            nodes: The nodes of the graph.

        Raises:
            MisconfigurationException: If a sample was drawn by ``torch.normal`` with a graph.
        """
        if any(_SAMPLING.fullmatch(node.name()) for node in nodes):
            raise MisconfigurationException(
                f"{self._where} draws by `torch.normal(mean, std)`, whose derivative torch takes "
                "for 0. Write `mean + std * torch.randn_like(mean)`, with `mean` and `std` wrapped "
                "in `lightning_rtho.stop_gradient` if their gradient shall stay 0."
            )
        names = [] if self._has_warned else own_functions(nodes)
        if names:
            self._has_warned = True
            rank_zero_warn(
                f"{self._where} runs the autograd function `{names[0]}`, whose `backward` need not "
                "be a derivative. Hypergradients take it for that of what runs forward. Use "
                "`lightning_rtho.scale_gradient(x, factor)` to scale or reverse gradients in "
                "training; whether all is well `hypergradcheck` tells."
            )
