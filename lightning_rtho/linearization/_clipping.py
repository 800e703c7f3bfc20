"""Gradient clipping, the part of a training step between gradient and update."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["ClipByNorm", "ClipByValue", "GradientClip"]


class GradientClip(ABC):
    """A pure map on the gradients of all parameters together, with its derivatives."""

    limit: float

    @abstractmethod
    def __call__(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """Clip the gradients, each ``[*P]``."""

    def jvp(self, grads: Sequence[Tensor], grads_dot: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Push tangents through the clipping.

        Args:
            grads: Gradients before clipping, each ``[*P]``.
            grads_dot: Their tangents, each ``[m, *P]``.

        Returns:
            Tangents of the clipped gradients, each ``[m, *P]``.
        """

        def push(*tangents: Tensor) -> tuple[Tensor, ...]:
            pushed: tuple[Tensor, ...] = torch.func.jvp(self, tuple(grads), tangents)[1]
            return pushed

        clipped_dot: tuple[Tensor, ...] = torch.vmap(push)(*grads_dot)
        return clipped_dot

    def vjp(self, grads: Sequence[Tensor], clipped_bar: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Pull cotangents back through the clipping: the adjoint of :meth:`jvp`.

        Args:
            grads: Gradients before clipping, each ``[*P]``.
            clipped_bar: Cotangents of the clipped gradients, each ``[*P]``.

        Returns:
            Cotangents of the gradients, each ``[*P]``.
        """
        leaves = [grad.detach().requires_grad_() for grad in grads]
        with torch.enable_grad():
            clipped = self(*leaves)
        return torch.autograd.grad(clipped, leaves, clipped_bar)


@final
@dataclass(frozen=True)
class ClipByNorm(GradientClip):
    r"""Scale all gradients so that their joint norm is at most `limit`: g c, c = min(1, limit/|g|).

    The formula is that of ``torch.nn.utils.clip_grad_norm_``, with its 1e-6 beside the norm.

    Args:
        limit: Largest norm.

    Example:
        >>> ClipByNorm(1.0)(torch.tensor([3.0, 4.0]))
        (tensor([0.6000, 0.8000]),)
    """

    limit: float

    def __call__(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`GradientClip.__call__`."""
        # In float32 at least, as torch sums: the square of 300 is too much for float16.
        dtypes = [torch.promote_types(grad.dtype, torch.float32) for grad in grads]
        squares = [grad.to(d).square().sum() for grad, d in zip(grads, dtypes, strict=True)]
        square = torch.stack(squares).sum()
        clips = square > self.limit**2 * 1e-4  # well below the limit, so that 0 has no root taken
        norm = torch.where(clips, square, 1.0).sqrt()
        factor = torch.where(clips, (self.limit / (norm + 1e-6)).clamp(max=1.0), 1.0)
        return tuple(grad * factor.to(grad.dtype) for grad in grads)


@final
@dataclass(frozen=True)
class ClipByValue(GradientClip):
    """Clamp every entry of every gradient to [-limit, limit]; its derivative is 0 where clamped.

    Args:
        limit: Largest absolute value.

    Example:
        >>> ClipByValue(1.0)(torch.tensor([3.0, -0.5]))
        (tensor([ 1.0000, -0.5000]),)
    """

    limit: float

    def __call__(self, *grads: Tensor) -> tuple[Tensor, ...]:
        """See :meth:`GradientClip.__call__`."""
        return tuple(grad.clamp(-self.limit, self.limit) for grad in grads)
