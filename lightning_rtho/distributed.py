"""Means over the processes of a distributed run."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed

__all__ = ["is_distributed", "mean_over_ranks"]


def is_distributed() -> bool:
    """Tell whether several processes train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def mean_over_ranks(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
    """Average tensors over all processes; one process keeps them as they are.

    Args:
        parts: Tensors of any shape; None is zero. Their number is the same in every process.
        like: Tensors of the same shapes, for those that are None here and not elsewhere.

    Returns:
        The means, bitwise the same in every process.

    Example:
        >>> mean_over_ranks([torch.ones(1), None], like=[torch.ones(1), torch.ones(2)])
        [tensor([1.]), None]
    """
    if not is_distributed():
        return list(parts)
    on_gpu = distributed.get_backend() == "nccl"  # which reduces nothing on the CPU
    means: list[Tensor | None] = []
    for part, twin in zip(parts, like, strict=True):
        zero = torch.zeros(twin.shape, dtype=twin.dtype, device=twin.device)
        local = zero if part is None else part.detach().contiguous().clone()
        reduced = local.cuda() if on_gpu else local
        distributed.all_reduce(reduced)
        means.append((reduced / distributed.get_world_size()).to(local.device))
    return means
