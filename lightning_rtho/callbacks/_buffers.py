"""Buffers of a module: a part of what a training step depends on."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import Tensor, nn

__all__ = ["BufferCopies", "BufferCopy", "changed_since"]

Name = tuple[str, str]
"""Of the submodule, and of the buffer in it."""


class BufferCopy(NamedTuple):
    """A buffer as it was.

    Attributes:
        buffer: The buffer itself ``[*B]``; None where it is that of another process.
        version: How often it had been written to; None where torch does not count that.
        value: Its value then ``[*B]``.
    """

    buffer: Tensor | None
    version: int | None
    value: Tensor

    def is_of(self, buffer: Tensor) -> bool:
        """Tell whether a buffer is known to be what it was."""
        version = _version(buffer)
        return self.buffer is buffer and version is not None and self.version == version


class BufferCopies:
    """Copies a module's buffers, each once as long as nobody writes to it.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._last: dict[Name, BufferCopy] = {}

    def take(self) -> dict[Name, BufferCopy]:
        """Return the buffers as they are."""
        known, self._last = self._last, {}
        for name, buffer in _buffers(self._module):
            copy = known.get(name)
            if copy is None or not copy.is_of(buffer):
                copy = BufferCopy(buffer, _version(buffer), buffer.clone())
            self._last[name] = copy
        return self._last


def changed_since(copies: Mapping[Name, BufferCopy], module: nn.Module) -> dict[Name, Tensor]:
    """Return what buffers were, where they may be something else by now.

    Args:
        copies: What :meth:`BufferCopies.take` returned.
        module: The module.

    Returns:
        The values by name, each ``[*B]``.
    """
    present = dict(_buffers(module))
    return {
        name: copy.value
        for name, copy in copies.items()
        if name in present and not copy.is_of(present[name])
    }


def _buffers(module: nn.Module) -> Iterator[tuple[Name, Tensor]]:
    """Yield names and buffers."""
    for namespace, submodule in module.named_modules():
        for name, buffer in submodule.named_buffers(recurse=False):
            yield (namespace, name), buffer


def _version(buffer: Tensor) -> int | None:
    return None if buffer.is_inference() else buffer._version
