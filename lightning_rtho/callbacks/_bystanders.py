"""Weights that no optimizer trains but that something moves, as those of a mean teacher."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["Bystander", "MovingBystanders", "standing_at", "untrained_weights"]

_STEPS_TO_DECIDE = 2


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

    Of the others the host keeps a copy, where there is room for a model that is frozen for the most
    part, until two optimizer steps have shown what moves: an average of weights that is a copy of
    them at first, and is moved before they are, stands still for the first step.

    Args:
        module: The module.
        trained: Weights that optimizers train, each ``[*P]``.
    """

    def __init__(self, module: nn.Module, trained: Iterable[Tensor]) -> None:
        self._module, self._trained = module, set(trained)
        self._weights = dict(untrained_weights(module, self._trained))
        self._marks = self._read_marks()
        self._moving: set[str] = set()
        self._first: dict[str, Bystander] = {}
        self._first_step: int | None = None
        self._is_decided = False
        self._undecided: list[list[Bystander]] = []

    def copy(self, step: int) -> list[Bystander]:
        """Copy what moves, before a training step that is to be made again.

        Args:
            step: Optimizer steps made so far.

        Returns:
            The copies; of those before the second optimizer step, what does not move goes later.
        """
        if self._first_step is None:
            self._first = {n: Bystander(n, _on_host(w)) for n, w in self._weights.items()}
            self._first_step = step
        self._take_in_new()
        if not self._is_decided:
            self._moving |= self._take_moved()
        if not self._is_decided and step >= self._first_step + _STEPS_TO_DECIDE:
            self._is_decided, self._first = True, {}
            for copies in self._undecided:
                copies[:] = [copy for copy in copies if copy.name in self._moving]
            self._undecided = []
        copies = [Bystander(n, self._weights[n].detach().clone()) for n in sorted(self._moving)]
        copies += [first for name, first in self._first.items() if name not in self._moving]
        if not self._is_decided:
            self._undecided.append(copies)
        return copies

    def have_set_out(self) -> bool:
        """Tell whether weights have moved that had stood still; from now on they are copied."""
        if not self._is_decided:
            return False
        found = self._take_moved() - self._moving
        self._moving |= found
        return bool(found)

    def forget(self, weights: Iterable[Tensor]) -> None:
        """Leave weights to an optimizer that trains them from now on.

        Args:
            weights: The weights, each ``[*P]``.
        """
        self._trained |= set(weights)
        self._weights = dict(untrained_weights(self._module, self._trained))
        self._moving &= self._weights.keys()
        self._first = {n: first for n, first in self._first.items() if n in self._weights}

    def _take_in_new(self) -> None:
        """Take in weights that a step has made since; they may move at once."""
        present = dict(untrained_weights(self._module, self._trained))
        self._moving |= present.keys() - self._weights.keys()
        self._moving &= present.keys()
        self._weights = present

    def _take_moved(self) -> set[str]:
        """Return the names of the weights that were written to since the last call.

        What is written through ``weight.data`` shows in values alone, as long as these are known.
        """
        before, self._marks = self._marks, self._read_marks()
        return {
            name
            for name, mark in self._marks.items()
            if mark != before.get(name, mark) or self._differs_from_first(name)
        }

    def _differs_from_first(self, name: str) -> bool:
        if name not in self._first:
            return False
        return not torch.equal(self._first[name].value, self._weights[name].detach().cpu())

    def _read_marks(self) -> dict[str, tuple[int, int]]:
        # Private: how often a tensor was written to shows in no other way without a copy.
        return {name: (w._version, w.data_ptr()) for name, w in self._weights.items()}


@contextmanager
def standing_at(bystanders: Sequence[Bystander], module: nn.Module) -> Iterator[None]:
    """Let weights stand where they stood.

    Args:
        bystanders: The weights; what is written to them meanwhile is forgotten.
        module: The module.
    """
    weights = dict(module.named_parameters()) if bystanders else {}
    standing = [(weights[name], value) for name, value in bystanders if name in weights]
    present = [weight.data for weight, _ in standing]
    # A graph that saves a weight itself would read it where it stands when it is differentiated.
    graphs = saved_tensors_hooks(Tensor.detach, Tensor.detach) if standing else nullcontext()
    try:
        for (weight, value), now in zip(standing, present, strict=True):
            # Not in place, which would count as a move; a copy, since the step may move it, too.
            weight.data = torch.empty_like(now).copy_(value)
        with graphs:
            yield
    finally:
        for (weight, _), now in zip(standing, present, strict=True):
            weight.data = now


def _on_host(weight: Tensor) -> Tensor:
    return weight.detach().to("cpu", copy=True)
