"""Stopping a gradient without losing what the gradient itself depends on."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["stop_gradient", "stops_gradient", "value_dependence"]


def stop_gradient(x: Tensor) -> Tensor:
    """Treat a tensor as constant when the training gradient is computed, and not beyond.

    Use it in the place of ``detach`` for what depends on the weights: the generated images in a
    discriminator's loss, a bootstrapped target. Training is the same. But the gradient's *value*
    depends on the weights through such a tensor, and so do hypergradients; ``detach`` hides that
    from them, this does not. What ran under ``torch.no_grad`` is hidden, too.

    Args:
        x: The tensor ``[*X]``.

    Returns:
        The same values ``[*X]``.

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(stop_gradient(w) * w, w)
        (tensor(3.),)
    """
    stopped: Tensor = _StopGradient.apply(x)
    return stopped


@contextmanager
def value_dependence() -> Iterator[None]:
    """Let derivatives pass where gradients are stopped: for derivatives of values, not gradients.

    Yields:
        Nothing.
    """
    before, _StopGradient.passes = _StopGradient.passes, True
    try:
        yield
    finally:
        _StopGradient.passes = before


def stops_gradient(nodes: Collection[str]) -> bool:
    """Tell whether a graph holds a stopped gradient.

    Args:
        nodes: Names of the graph's nodes.

    Returns:
        Whether one of them is that of :func:`stop_gradient`.
    """
    return f"{_StopGradient.__name__}Backward" in nodes


class _StopGradient(torch.autograd.Function):
    """Identity; its derivative passes as a whole or not at all."""

    passes: ClassVar[bool] = False
    """Global: backward passes run on threads of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if _StopGradient.passes else None
