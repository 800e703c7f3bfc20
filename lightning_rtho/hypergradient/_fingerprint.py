"""Knowing gradients again without keeping them."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rtho._numerics import tolerance

__all__ = ["fingerprint", "have_other_sums", "is_of"]


def fingerprint(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sums and the norms of tensors.

    An edit changes one of them: a factor the norm, added noise the sum, by about its own length.

    Args:
        tensors: The tensors, each ``[*P]``.

    Returns:
        ``[2, len(tensors)]``, of at least float32, not yet synchronised with the host.
    """
    dtypes = [tensor.dtype for tensor in tensors]
    exact = functools.reduce(torch.promote_types, dtypes, torch.float32)
    sums = [tensor.sum(dtype=exact) for tensor in tensors]
    norms = [tensor.norm(dtype=exact) for tensor in tensors]
    return torch.stack([*sums, *norms]).reshape(2, -1)


def have_other_sums(
    tensors: Sequence[Tensor], sums: Tensor, precision: torch.dtype | None = None
) -> Tensor:
    """Tell whether the sums of tensors are other than given ones, by more than rounding.

    Args:
        tensors: The tensors, each ``[*P]``.
        sums: Of each ``[len(tensors)]``.
        precision: What else they were computed in.

    Returns:
        A boolean ``[]``, not yet synchronised with the host; False where they are not finite.
    """
    found, norms = fingerprint(tensors)
    differs: Tensor = (found - sums).norm() > tolerance(tensors, precision) * norms.norm()
    return differs


def is_of(
    prints: Tensor, tensors: Sequence[Tensor], precision: torch.dtype | None = None
) -> Tensor:
    """Tell whether tensors have some fingerprint, up to rounding; any has, if it is not finite.

    Args:
        prints: What :func:`fingerprint` returned ``[2, len(tensors)]``.
        tensors: The tensors, each ``[*P]``.
        precision: What else they were computed in.

    Returns:
        A boolean ``[]``, not yet synchronised with the host.
    """
    found = fingerprint(tensors)
    allowed = tolerance(tensors, precision) * found[1].norm()
    differs: Tensor = (found - prints.to(found.device)).norm() > allowed
    return ~differs
