"""What kept graphs hold in the place of tensors that the run overwrites."""

from collections.abc import Iterable
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_rtho.hypergradient._arena import Arena

__all__ = ["SavedWeights"]


class _View(NamedTuple):
    """Where a tensor lies in a storage that will be overwritten."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Saved(NamedTuple):
    """A tensor that is kept as it is, and how often it had been written to."""

    tensor: Tensor
    version: int


@final
class SavedWeights:
    """Lets the graphs of one optimizer step survive it: they read the weights from one copy.

    Torch's ``allow_mutation_on_saved_tensors`` does so for any tensor, at the price of looking at
    every operation of the window; here weights are known and copied once, before the optimizer
    writes to them. Buffers and scalars, such as a scaler's loss scale, are copied where a graph
    saves them. Whatever else is overwritten is refused when a graph reads it.

    Args:
        weights: What the optimizer overwrites, each ``[*P]``.
        buffers: What forward passes may overwrite, each ``[*B]``.

    Example:
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> saved = SavedWeights([w], [])
        >>> with saved.hooks():
        ...     loss = (w**2).sum()
        >>> (copy,) = saved.copy([w], Arena(w.device, saved.size()))
        >>> with torch.no_grad():
        ...     w += 1
        >>> torch.autograd.grad(loss, w)
        (tensor([6.]),)
        >>> copy
        tensor([3.])
    """

    def __init__(self, weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        self._bytes = {_address(w): _bytes_of(w) for w in weights if _has_memory(w)}
        self._buffers = {_address(buffer) for buffer in buffers if _has_memory(buffer)}

    def hooks(self) -> saved_tensors_hooks:
        """Return a context for everything that makes graphs to be kept."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def size(self) -> int:
        """Return how many bytes of an arena the copies take."""
        return Arena.size_of(self._bytes.values())

    def copy(self, weights: Iterable[Tensor], arena: Arena) -> list[Tensor]:
        """Copy the weights before they are overwritten; the graphs share the copies.

        Args:
            weights: Weights, each ``[*P]``.
            arena: Where the copies are made.

        Returns:
            Their copies, each ``[*P]``.
        """
        self._bytes = {at: arena.copy(content) for at, content in self._bytes.items()}
        return [self._view(_locate(w)) if _has_memory(w) else w.detach().clone() for w in weights]

    def _pack(self, tensor: Tensor) -> _View | _Saved:
        if _has_memory(tensor):
            address = _address(tensor)
            if address in self._bytes:
                return _locate(tensor)
            if address in self._buffers or tensor.dim() == 0:
                tensor = tensor.clone()
        elif tensor.numel() == 0:  # which may be a weight
            tensor = tensor.clone()
        tensor = tensor.detach()  # what a node has put out would hold the node, which holds it
        return _Saved(tensor, tensor._version)

    def _unpack(self, packed: _View | _Saved) -> Tensor:
        if isinstance(packed, _View):
            return self._view(packed)
        if packed.tensor._version != packed.version:
            raise RuntimeError(
                f"A tensor of shape {tuple(packed.tensor.shape)} that the loss was computed from "
                "was overwritten later in the window. Use `TRHO(tape=Recompute())`, or do not "
                "compute losses from tensors that are written to in place."
            )
        return packed.tensor

    def _view(self, view: _View) -> Tensor:
        content = self._bytes[view.storage]
        empty = torch.empty(0, dtype=view.dtype, device=content.device)
        start = int(content.storage_offset()) // view.dtype.itemsize  # which arenas align
        return empty.set_(content.untyped_storage(), start + view.offset, view.size, view.stride)


def _has_memory(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.numel() > 0


def _bytes_of(tensor: Tensor) -> Tensor:
    """Everything in a tensor's storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _locate(tensor: Tensor) -> _View:
    offset = int(tensor.storage_offset())
    return _View(_address(tensor), tensor.dtype, tensor.shape, tensor.stride(), offset)
