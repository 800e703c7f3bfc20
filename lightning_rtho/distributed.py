"""What the processes of a distributed run tell each other."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, distributed

__all__ = ["from_first_rank", "is_distributed", "mean_over_ranks", "to_first_rank"]

_Part = TypeVar("_Part", Tensor, Tensor | None)


def is_distributed() -> bool:
    """Tell whether several processes train together."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def mean_over_ranks(parts: Sequence[_Part], like: Sequence[Tensor]) -> list[_Part]:
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
    world_size = distributed.get_world_size()
    return [total / world_size for total in _sum_over_ranks(parts, like)]


def from_first_rank(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Let all processes have the tensors of the first.

    Args:
        tensors: Tensors of any shape, the same in every process.

    Returns:
        Those of the first process, detached.
    """
    if not is_distributed():
        return [tensor.detach() for tensor in tensors]
    copies = []
    for tensor in tensors:
        copy = _reachable(tensor.detach().contiguous().clone())
        distributed.broadcast(copy, src=0)
        copies.append(copy.to(tensor.device))
    return copies


def to_first_rank(
    cotangents: Sequence[Tensor | None], like: Sequence[Tensor]
) -> list[Tensor | None]:
    """Pull cotangents back through :func:`from_first_rank`: the first process gets their sum.

    Args:
        cotangents: One a tensor, of its shape; None is zero.
        like: The tensors.

    Returns:
        The sums in the first process, None in the others.
    """
    if not is_distributed():
        return list(cotangents)
    sums = _sum_over_ranks(cotangents, like)
    return [total if distributed.get_rank() == 0 else None for total in sums]


def _sum_over_ranks(parts: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    sums = []
    for part, twin in zip(parts, like, strict=True):
        zero = torch.zeros(twin.shape, dtype=twin.dtype, device=twin.device)
        local = zero if part is None else part.detach().contiguous().clone()
        reduced = _reachable(local)
        distributed.all_reduce(reduced)
        sums.append(reduced.to(local.device))
    return sums


def _reachable(tensor: Tensor) -> Tensor:
    """Send a tensor to where processes exchange tensors, if it is elsewhere."""
    return tensor.cuda() if distributed.get_backend() == "nccl" else tensor
