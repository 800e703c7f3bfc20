"""Stopping or scaling a gradient without losing what the gradient itself depends on."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["changes_gradient", "scale_gradient", "stop_gradient", "value_dependence"]


def stop_gradient(x: Tensor) -> Tensor:
    """Treat a tensor as constant when the training gradient is computed, and not beyond.

    Use it in the place of ``detach`` for what depends on the weights: the generated images in a
    discriminator's loss, a bootstrapped target. Training is the same. But the gradient's *value*
    depends on the weights through such a tensor, and so do hypergradients; ``detach`` hides that
    from them, this does not. What ran under ``torch.no_grad`` is hidden, too. What is carried from
    one training step to the next has to be detached, since backward lets the graph of a step go.

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


def scale_gradient(x: Tensor, factor: float | Tensor) -> Tensor:
    """Multiply the training gradient that passes a tensor by a factor, and leave its value alone.

    Use it for what a hook or an ``autograd.Function`` of one's own does in plain scripts: -1 is the
    gradient reversal of adversarial features. Their backward passes would be taken for derivatives
    of values, too, which they are not; of this one hypergradients know.

    Args:
        x: The tensor ``[*X]``.
        factor: A number, which may be a hyperparameter ``[]``.

    Returns:
        The same values ``[*X]``.

    Example:
        >>> w = torch.tensor(3.0, requires_grad=True)
        >>> torch.autograd.grad(scale_gradient(w, -1) * w, w)
        (tensor(0.),)

    References:
        Ganin and Lempitsky (2015) for gradient reversal.
    """
    scaled: Tensor = _ScaleGradient.apply(x, factor)
    return scaled


@contextmanager
def value_dependence() -> Iterator[None]:
    """Let derivatives pass where gradients are changed: for derivatives of values, not gradients.

    Yields:
        Nothing.
    """
    before, _ChangedGradient.passes = _ChangedGradient.passes, True
    try:
        yield
    finally:
        _ChangedGradient.passes = before


def changes_gradient(nodes: Collection[str]) -> bool:
    """Tell whether a graph holds a gradient that is stopped or scaled.

    Args:
        nodes: Names of the graph's nodes.

    Returns:
        Whether one of them is that of :func:`stop_gradient` or :func:`scale_gradient`.
    """
    return any(f"{cls.__name__}Backward" in nodes for cls in (_StopGradient, _ScaleGradient))


class _ChangedGradient(torch.autograd.Function):
    """Identity, whose derivative passes where it is that of values."""

    passes: ClassVar[bool] = False
    """Global, read from here alone: backward passes run on threads of their own."""


class _StopGradient(_ChangedGradient):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor | None:
        return grad if _ChangedGradient.passes else None


class _ScaleGradient(_ChangedGradient):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float | Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        factor = ctx.factor
        # The loss does not depend on the factor, but is seen to be made with it.
        by_factor = torch.zeros_like(factor) if isinstance(factor, Tensor) else None
        return grad if _ChangedGradient.passes else factor * grad, by_factor
