"""Memory for the copies of a training step, taken at once and used again."""

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

__all__ = ["Arena", "Arenas"]

_ALIGNMENT = 64
"""Bytes to which copies are aligned, as torch aligns its own on a CPU."""


@final
class Arena:
    """Copies tensors, one behind the other, into one piece of memory.

    Args:
        device: Where the copies are kept.
        size: Bytes; what does not fit is copied elsewhere.

    Example:
        >>> ones = torch.ones(2, 2)
        >>> arena = Arena(torch.device("cpu"), Arena.size_of([ones]))
        >>> arena.copy(ones)
        tensor([[1., 1.],
                [1., 1.]])
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self._memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._used = 0

    @staticmethod
    def size_of(tensors: Iterable[Tensor]) -> int:
        """Return how many bytes copies of tensors take.

        Args:
            tensors: The tensors, each ``[*P]``.
        """
        return sum(_size(tensor) for tensor in tensors if _is_laid_out(tensor))

    def __len__(self) -> int:
        """Bytes there are."""
        return len(self._memory)

    def clear(self) -> None:
        """Let later copies overwrite those so far."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """Copy a tensor.

        Args:
            tensor: The tensor ``[*P]``, on any device.

        Returns:
            The copy ``[*P]``, detached.
        """
        start, end = self._used, self._used + _size(tensor)
        if not _is_laid_out(tensor) or end > len(self):
            return tensor.detach().to(self._memory.device, copy=True)
        self._used = end
        piece = self._memory[start : start + tensor.numel() * tensor.element_size()]
        return piece.view(tensor.dtype).view(tensor.shape).copy_(tensor.detach())


@final
class Arenas:
    """Gives out arenas and takes them back for later steps.

    Copies that live for a window, allocated one by one between others that live for a moment, leave
    holes in a heap, and new memory costs more than the copy into it.
    """

    def __init__(self) -> None:
        self._free: list[Arena] = []

    def take(self, device: torch.device, size: int) -> Arena:
        """Return an empty arena.

        Args:
            device: Where it shall lie; always the same.
            size: Bytes that it shall have at least.
        """
        while self._free:
            arena = self._free.pop()
            if len(arena) >= size:
                arena.clear()
                return arena
        return Arena(device, size)

    def give_back(self, arena: Arena) -> None:
        """Take an arena whose copies nobody reads any more.

        Args:
            arena: The arena.
        """
        self._free.append(arena)


def _is_laid_out(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.dim() > 0


def _size(tensor: Tensor) -> int:
    size = tensor.numel() * tensor.element_size()
    return -(-size // _ALIGNMENT) * _ALIGNMENT
