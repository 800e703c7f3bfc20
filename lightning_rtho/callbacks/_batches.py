"""Copies of batches, to which training steps may write."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_rtho._numerics import version_of

__all__ = ["BatchCopies", "cloned"]


class BatchCopies:
    """Copies what holds the tensors of batches; the tensors, once a step has written to some.

    Args:
        clones: Whether tensors are copied from the first batch on.

    Attributes:
        clones: Whether tensors are copied.

    Example:
        >>> import torch
        >>> batch, copies = {"x": torch.zeros(2)}, BatchCopies()
        >>> first = copies.take(batch)
        >>> batch["x"] += 1  # as a step may do
        >>> copies.are_spoilt()
        True
        >>> second = copies.take(batch)
        >>> batch["x"] += 1
        >>> copies.are_spoilt(), second
        (False, {'x': tensor([1., 1.])})
    """

    def __init__(self, *, clones: bool = False) -> None:
        self.clones = clones
        self._taken: list[tuple[Tensor, int | None]] = []

    def take(self, batch: Any) -> Any:
        """Copy a batch.

        Args:
            batch: The batch, tensors in any collection.

        Returns:
            The copy.
        """
        if self.clones:
            return cloned(batch)
        self._taken = []

        def note(tensor: Tensor) -> Tensor:
            self._taken.append((tensor, version_of(tensor)))
            return tensor

        return _mapped(batch, note)

    def are_spoilt(self) -> bool:
        """Tell whether the last batch that was copied has been written to, and its copy with it."""
        taken, self._taken = self._taken, []
        is_spoilt = any(version_of(tensor) != version for tensor, version in taken)
        self.clones |= is_spoilt
        return is_spoilt


def cloned(batch: Any) -> Any:
    """Copy a batch and its tensors.

    Args:
        batch: The batch, tensors in any collection.

    Returns:
        The copy.
    """
    return _mapped(batch, Tensor.clone)


class _FrozenType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        # Private: a dataclass says in no other way that it is frozen.
        parameters = getattr(type(instance), "__dataclass_params__", None)
        return bool(getattr(parameters, "frozen", False))


class _Frozen(metaclass=_FrozenType):
    """What every frozen dataclass is an instance of; Lightning leaves them alone."""


def _mapped(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    def map_part(part: Any) -> Any:
        if isinstance(part, Tensor):
            return function(part)
        twin = copy.copy(part)
        for name in (field.name for field in dataclasses.fields(part)):
            if hasattr(part, name):
                object.__setattr__(twin, name, _mapped(getattr(part, name), function))
        return twin

    copied = apply_to_collection(batch, (Tensor, _Frozen), map_part)
    if copied is batch and not isinstance(batch, Tensor) and hasattr(batch, "__dict__"):
        return copy.copy(batch)
    return copied
