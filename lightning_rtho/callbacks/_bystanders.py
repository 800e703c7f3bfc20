"""Weights that no optimizer trains but that something moves, as those of a mean teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Bystander", "MovingBystanders", "standing_at", "untrained_weights"]


def untrained_weights(module: nn.Module, trained: Iterable[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights that no optimizer trains, with their names.

    Args:
        module: The module.
        trained: Those that optimizers train, each ``[*P]``.

    Yields:
        Name and weight; not those that are quantized, which stand still.
    """
    known = set(trained)
    for name, weight in module.named_parameters():
        if weight not in known and weight.is_floating_point():
            yield name, weight


class Bystander(NamedTuple):
    """A weight that no optimizer trains, as it was.

    Attributes:
        name: Its name in the module.
        value: Its value ``[*P]``, on the host or beside it.
    """

    name: str
    value: Tensor


class MovingBystanders:
    """Tells which weights move though no optimizer trains them, and copies those.

    What moves is known once something has, or an optimizer step has been made; until then all are
    copied, to the host, where there is room for a model that is frozen for the most part.

    Args:
        module: The module.
        trained: Weights that optimizers train, each ``[*P]``.
    """

    def __init__(self, module: nn.Module, trained: Iterable[Tensor]) -> None:
        self._weights = dict(untrained_weights(module, trained))
        self._versions = self._read_versions()
        self._moving: set[str] | None = None
        self._first_step: int | None = None
        self._first: list[Bystander] = []

    def copy(self, step: int) -> list[Bystander]:
        """Copy what moves, before a training step that is to be made again.

        Args:
            step: Optimizer steps made so far.

        Returns:
            The copies; of those before the first optimizer step, what does not move goes later.
        """
        if self._first_step is None:
            self._first_step = step
            self._first = [Bystander(n, _on_host(w)) for n, w in self._weights.items()]
        if self._moving is None:
            moved = self._take_moved()
            if not moved and step == self._first_step:
                return self._first
            self._moving = moved
            self._first[:] = [first for first in self._first if first.name in moved]
            self._first = []
        return [Bystander(n, self._weights[n].detach().clone()) for n in sorted(self._moving)]

    def have_set_out(self) -> bool:
        """Tell whether weights have moved that had stood still; from now on they are copied."""
        if self._moving is None:
            return False
        found = self._take_moved() - self._moving
        self._moving |= found
        return bool(found)

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Leave weights to an optimizer that trains them from now on.

        Args:
            weights: The weights, each ``[*P]``.
        """
        known = set(weights)
        self._weights = {name: w for name, w in self._weights.items() if w not in known}
        if self._moving is not None:
            self._moving &= self._weights.keys()

    def _take_moved(self) -> set[str]:
        """Return the names of the weights that were written to since the last call."""
        before, self._versions = self._versions, self._read_versions()
        return {name for name, version in self._versions.items() if version != before[name]}

    def _read_versions(self) -> dict[str, int]:
        # Private: how often a tensor was written to shows in no other way without a copy.
        return {name: weight._version for name, weight in self._weights.items()}


@contextmanager
def standing_at(bystanders: Sequence[Bystander], module: nn.Module) -> Iterator[None]:
    """Let weights stand where they stood.

    Args:
        bystanders: The weights; what is written to them meanwhile is forgotten.
        module: The module.
    """
    weights = dict(module.named_parameters()) if bystanders else {}
    present = [(weights[name], weights[name].data) for name, _ in bystanders]
    try:
        for (weight, now), (_, value) in zip(present, bystanders, strict=True):
            # Not in place, which would count as a move; a copy, since the step may move it, too.
            weight.data = torch.empty_like(now).copy_(value)
        yield
    finally:
        for weight, now in present:
            weight.data = now


def _on_host(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
