"""Buffers of a module: a part of what a training step depends on."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_rtho._numerics import version_of
from lightning_rtho.hyperparameters import Hyperparameter

__all__ = ["BufferCopies", "BufferCopy", "buffers_of", "changed_since", "put_buffers"]

_SMALL = 2**16
"""Entries from which on a buffer on a device is not looked at, nor copied without a reason."""


def buffers_of(module: nn.Module) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Find every buffer of a module that is no hyperparameter.

    Args:
        module: The module.

    Yields:
        Its name, the dict that holds it, or None in its place, and its key there.
    """
    for prefix, submodule in module.named_modules():
        for key, buffer in submodule._buffers.items():
            if not isinstance(buffer, Hyperparameter):
                yield f"{prefix}.{key}", submodule._buffers, key


class BufferCopy(NamedTuple):
    """A buffer as it was.

    Attributes:
        buffer: The buffer itself ``[*B]``; None where it is that of another process.
        version: How often it had been written to; None where torch does not count that.
        value: Its value then ``[*B]``; None where it was not there yet.
    """

    buffer: Tensor | None
    version: int | None
    value: Tensor | None

    def is_of(self, buffer: Tensor | None) -> bool:
        """Tell whether a buffer is known to be what it was."""
        if buffer is None or self.value is None:
            return buffer is self.value
        version = version_of(buffer)
        if self.buffer is not buffer or version is None or self.version != version:
            return False
        # What is written to it through `buffer.data` is not counted.
        if buffer.layout is not torch.strided:  # which torch compares in no way
            return True
        if buffer.device.type == "cpu":
            return torch.equal(buffer, self.value)
        return buffer.numel() > _SMALL


class BufferCopies:
    """Copies a module's buffers, each once as long as nobody writes to it.

    Args:
        module: The module.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._last: dict[str, BufferCopy] = {}

    def take(self) -> dict[str, BufferCopy]:
        """Return the buffers as they are, by name."""
        known, self._last = self._last, {}
        for name, buffers, key in buffers_of(self._module):
            copy, buffer = known.get(name), buffers[key]
            if copy is None or not copy.is_of(buffer):
                copy = BufferCopy(None, None, None)
                if buffer is not None:
                    copy = BufferCopy(buffer, version_of(buffer), buffer.clone())
            self._last[name] = copy
        return self._last


def changed_since(copies: Mapping[str, BufferCopy], module: nn.Module) -> dict[str, Tensor | None]:
    """Return what buffers were, where they may be something else by now.

    Args:
        copies: What :meth:`BufferCopies.take` returned.
        module: The module.

    Returns:
        The values by name, each ``[*B]`` or None.
    """
    present = {name: buffers[key] for name, buffers, key in buffers_of(module)}
    return {
        name: copy.value
        for name, copy in copies.items()
        if name in present and not copy.is_of(present[name])
    }


def put_buffers(module: nn.Module, values: Mapping[str, Tensor | None]) -> None:
    """Put copies of values in the place of a module's buffers.

    Args:
        module: The module.
        values: What :func:`changed_since` returned.
    """
    for name, buffers, key in buffers_of(module):
        if name not in values:
            continue
        value = values[name]
        if isinstance(buffers, dict):
            buffers[key] = None if value is None else value.clone()
        elif value is not None:  # those of a scripted module cannot be replaced
            buffers[key].copy_(value)
