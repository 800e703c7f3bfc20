"""Noticing backward passes that are no derivatives, or need not be, as a user has written them."""

import re
from collections.abc import Iterable
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

__all__ = ["check_sampling", "own_functions", "warns_of_own_functions"]

_TRUSTED = ("torch", "lightning_rtho")
"""Packages whose functions are what they seem, or are refused elsewhere."""


_STRAIGHT_THROUGH = re.compile("(FakeQuantize|FusedMovingAvgObsFq).*")
"""Functions of torch that round, whose backward pass takes them for the identity."""


_SAMPLING = re.compile("NormalBackward[1-9]")
"""Nodes of ``torch.normal``; that of ``x.normal_()``, which forgets what x was, is right."""


def check_sampling(nodes: Iterable[Any], where: str) -> None:
    """Check that no sample in a loss hides what it depends on.

    Args:
        nodes: The nodes of its graph.
        where: What the loss is of, to begin a sentence with.

    Raises:
        MisconfigurationException: If one was drawn by ``torch.normal`` with a graph.
    """
    if any(_SAMPLING.fullmatch(node.name()) for node in nodes):
        raise MisconfigurationException(
            f"{where} draws by `torch.normal(mean, std)`, whose derivative torch takes for "
            "0. Write `mean + std * torch.randn_like(mean)`, or detach what it is given, or wrap "
            "that in `lightning_rtho.stop_gradient` to train as with `torch.normal`."
        )


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


def warns_of_own_functions(nodes: Iterable[Any], where: str) -> bool:
    """Warn of such functions.

    Args:
        nodes: The nodes of the graph of a loss.
        where: What the loss is of, to begin a sentence with.

    Returns:
        Whether there was one.
    """
    names = own_functions(nodes)
    if names:
        rank_zero_warn(
            f"{where} runs the autograd function `{names[0]}`, whose `backward` need not be a "
            "derivative. Hypergradients take it for that of what runs forward. Use "
            "`lightning_rtho.scale_gradient(x, factor)` to scale or reverse gradients in training; "
            "whether all is well `hypergradcheck` tells."
        )
    return bool(names)
