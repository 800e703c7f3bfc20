"""Walking the graph of a loss."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["graph_leaves", "graph_nodes", "rounds_otherwise"]

_DECOMPOSED = frozenset({
    "FusedRmsNorm",
    "LinalgSolveEx",
    "Mish",
    "MkldnnRnnLayer",  # LSTMs on the CPU
    "NativeGroupNorm",
    "Silu",
})
"""Operations whose gradient torch puts together from others where a graph of it is asked for."""


def graph_nodes(tensors: Iterable[Tensor | None]) -> Iterator[Any]:
    """Yield every node of the graphs of some tensors, each once.

    Args:
        tensors: The tensors, each ``[*P]``; None has no graph, as has a constant.

    Yields:
        The nodes, which torch gives no public type.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> [node.name() for node in graph_nodes([x.exp().sum()])][:2]
        ['SumBackward0', 'ExpBackward0']
    """
    nodes = [tensor.grad_fn for tensor in tensors if tensor is not None]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        nodes += [following for following, _ in node.next_functions]


def graph_leaves(value: Tensor) -> Iterator[Tensor]:
    """Yield every tensor that a value was computed from and that was itself not computed.

    Args:
        value: The value ``[*X]``.

    Yields:
        The tensors, each once; the value itself where it is one.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> [leaf is x for leaf in graph_leaves((x * x).sum())]
        [True]
    """
    if value.is_leaf:
        yield value
    for node in graph_nodes([value]):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf


def rounds_otherwise(nodes: Iterable[Any]) -> bool:
    """Tell whether gradients are rounded otherwise where they get a graph.

    Args:
        nodes: Nodes of what they are taken of.

    Returns:
        Whether an operation among them is known for that.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> rounds_otherwise(graph_nodes([torch.nn.functional.silu(x)]))
        True
    """
    return any(node.name().partition("Backward")[0] in _DECOMPOSED for node in nodes)
