"""A tape that keeps the graphs of the losses."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_rtho.hypergradient._arena import Arena, Arenas
from lightning_rtho.hypergradient._base import (
    GradientMismatchError,
    OptimizerStep,
    Recollection,
    Replay,
)
from lightning_rtho.hypergradient._kept_step import copy_step, with_weights
from lightning_rtho.hypergradient._saved import SavedWeights
from lightning_rtho.hypergradient._tape import RecordedStep, Tape
from lightning_rtho.linearization import Linearization, TracedLoss

__all__ = ["KeepGraph"]


class _KeptStep(NamedTuple):
    """What is kept of a step."""

    step: OptimizerStep
    losses: list[Linearization]
    versions: list[int]
    """How often its gradients had been written to."""
    arena: Arena
    """Where its copies lie."""


@final
class KeepGraph(Tape):
    """Keep the graph of every loss of the window: no loss is computed twice.

    Memory: one training state and one graph a step of the window.

    Example:
        >>> from lightning_rtho import TRHO
        >>> callback = TRHO(tape=KeepGraph())
    """

    needs_replay = False

    def __init__(self) -> None:
        self._losses: list[Linearization] = []
        self._steps: list[_KeptStep] = []
        self._arenas = Arenas()
        self._saved: SavedWeights | None = None
        self._hooks = ExitStack()

    def start(self, params: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        """See :meth:`Tape.start`; the graphs shall not hold what will be overwritten."""
        self._hooks.close()
        if self._saved is None:
            self._saved = SavedWeights(params, buffers)
        self._hooks.enter_context(self._saved.hooks())

    def record(
        self,
        loss: TracedLoss,
        replay: Replay | None,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
    ) -> list[Tensor | None]:
        """See :meth:`Tape.record`."""
        linearization = Linearization(loss, params, hypers)
        self._losses.append(linearization)
        self._hooks.close()
        return linearization.scaled_gradients

    def advance(self, step: OptimizerStep, params: Sequence[Tensor]) -> None:
        """See :meth:`Tape.advance`."""
        self._hooks.close()
        saved = SavedWeights(params, []) if self._saved is None else self._saved
        self._saved = None
        states = [transition.state for transition in step.transitions]
        buffers = [x for state in states for name, x in state.items() if name != "param"]
        size = saved.size() + Arena.size_of(buffers)
        arena = self._arenas.take(params[0].device, size)
        copies = saved.copy(params, arena)
        ours = {id(copy) for copy in copies}

        def copy(tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in ours else arena.copy(tensor)

        step = copy_step(with_weights(step, copies), copy)
        versions = [transition.grad._version for transition in step.transitions]
        self._steps.append(_KeptStep(step, self._losses, versions, arena))
        self._losses = []

    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """See :meth:`Tape.backward`; graphs go as they are read."""
        self._hooks.close()
        while self._steps:
            step, losses, versions, arena = self._steps.pop()
            if versions != [transition.grad._version for transition in step.transitions]:
                raise GradientMismatchError(
                    "Gradients were written to after the optimizer's step, whose graph is kept "
                    "with them. Use `TRHO(tape=Recompute())`, or clear gradients by "
                    "`zero_grad(set_to_none=True)`."
                )
            yield RecordedStep(step, reversed(losses))
            self._arenas.give_back(arena)

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """See :meth:`Tape.clear`."""
        self._losses, self._steps = [], []
        self._arenas = Arenas()
        self._saved = None
        self._hooks.close()

    def state_dict(self) -> None:
        """See :meth:`Tape.state_dict`; a graph can be kept in memory alone."""

    def load_state_dict(
        self,
        state: list[dict[str, Any]] | None,
        recollection: Recollection,
        device: torch.device,
    ) -> None:
        """See :meth:`Tape.load_state_dict`; the window begins anew."""
