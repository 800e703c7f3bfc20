"""Noticing backward passes that are no derivatives, or need not be, as a user has written them."""

import re

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rtho.linearization import graph_nodes

__all__ = ["check_sampling", "own_functions", "warn_of_own_functions"]

_TRUSTED = ("torch", "lightning_rtho")
"""Packages whose functions are what they seem, or are refused elsewhere."""


_SAMPLING = re.compile("NormalBackward[1-9]")
"""Nodes of ``torch.normal``; that of ``x.normal_()``, which forgets what x was, is right."""


def check_sampling(loss: Tensor) -> None:
    """Check that no sample in a loss hides what it depends on.

    Args:
        loss: The loss ``[]``.

    Raises:
        MisconfigurationException: If one was drawn by ``torch.normal`` with a graph.
    """
    if any(_SAMPLING.fullmatch(node.name()) for node in graph_nodes([loss])):
        raise MisconfigurationException(
            "`training_step` draws by `torch.normal(mean, std)`, whose derivative torch takes for "
            "0. Write `mean + std * torch.randn_like(mean)`, or detach what it is given, or wrap "
            "that in `lightning_rtho.stop_gradient` to train as with `torch.normal`."
        )


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
