"""Tapes that keep states and compute the losses again."""

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_rtho._numerics import HOST, sent_to
from lightning_rtho.distributed import is_distributed
from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient._arena import Arena, Arenas
from lightning_rtho.hypergradient._base import OptimizerStep, Recollection, Replay
from lightning_rtho.hypergradient._fingerprint import fingerprint
from lightning_rtho.hypergradient._kept_step import (
    copy_step,
    copy_weights,
    gradients_of,
    size_of_copies,
    with_gradients,
    with_weights,
    without_gradients,
)
from lightning_rtho.hypergradient._tape import RecordedStep, Tape
from lightning_rtho.linearization import (
    ClipByNorm,
    ClipByValue,
    GradientClip,
    Linearization,
    TracedLoss,
)

__all__ = ["Offload", "Recompute"]


class _ReplayStep(NamedTuple):
    """What a replay tape keeps of a step."""

    step: OptimizerStep
    weights: list[Tensor]
    losses: list[Replay]
    fingerprint: Tensor | None
    """Of the gradients, where they are not kept."""
    arena: Arena
    """Where all that lies."""


class _ReplayTape(Tape):
    """Keeps weights and optimizer state of each step and computes the losses again.

    Gradients come back with the losses, so that a fingerprint is enough of them; they are kept
    where a step has several losses, each linearized in its turn, or several processes, which
    would have to average them again, and where losses are computed on samples.
    """

    needs_replay = True

    def __init__(self) -> None:
        self._losses: list[Replay] = []
        self._steps: list[_ReplayStep] = []
        self._arenas = Arenas()

    @abstractmethod
    def _place(self, device: torch.device) -> torch.device:
        """Return where the states are kept of weights on a device."""

    def start(self, params: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        """See :meth:`Tape.start`; nothing to prepare."""

    def record(
        self,
        loss: TracedLoss,
        replay: Replay | None,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
    ) -> None:
        """See :meth:`Tape.record`."""
        assert replay is not None
        self._losses.append(replay)

    def advance(self, step: OptimizerStep, params: Sequence[Tensor]) -> None:
        """See :meth:`Tape.advance`."""
        prints = None
        is_whole = len(self._losses) == 1 and not self._losses[0].is_sample
        if step.transitions and is_whole and not is_distributed():
            prints = fingerprint(gradients_of(step))
            step = without_gradients(step)
        arena = self._arenas.take(self._place(params[0].device), size_of_copies(step, params))
        copied = copy_step(step, arena.copy)
        weights = copy_weights(params, copied, arena.copy)
        self._steps.append(_ReplayStep(copied, weights, self._losses, prints, arena))
        self._losses = []

    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """See :meth:`Tape.backward`."""

        def fetch(tensor: Tensor) -> Tensor:
            return sent_to(params[0].device, tensor)

        def linearize(replay: Replay) -> Linearization:
            return Linearization(replay(), params, hypers)

        def recall(kept: _ReplayStep) -> RecordedStep:
            here = [param.detach() for param in params]
            step = copy_step(with_weights(kept.step, here), fetch)
            if kept.fingerprint is None:
                lines = map(linearize, reversed(kept.losses))
                return RecordedStep(step, lines, any(loss.is_sample for loss in kept.losses))
            line = linearize(kept.losses[0])
            step = with_gradients(step, line.gradients, kept.fingerprint)
            return RecordedStep(step, [line])

        last = self._steps[-1] if self._steps else None
        try:
            while self._steps:
                kept = self._steps.pop()
                if kept is last:  # whose memory keeps the present weights meanwhile
                    _exchange(params, kept.weights)
                else:
                    _write(params, kept.weights)
                yield recall(kept)
                if kept is not last:
                    self._arenas.give_back(kept.arena)
        finally:
            if last is not None:
                _write(params, last.weights)
                self._arenas.give_back(last.arena)

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """See :meth:`Tape.clear`."""
        self._losses, self._steps = [], []
        self._arenas = Arenas()

    def state_dict(self) -> list[dict[str, Any]] | None:
        """See :meth:`Tape.state_dict`."""
        steps = []
        for step, weights, losses, prints, _ in self._steps:
            replays = [replay.state_dict() for replay in losses]
            if any(replay is None for replay in replays):
                return None
            steps.append({
                "number": step.number,
                "precision": step.precision,
                "transitions": [_transition_state(transition) for transition in step.transitions],
                "clip": step.clip and [type(step.clip).__name__, step.clip.limit],
                "raw_grads": None if step.clip is None else list(step.raw_grads),
                "weights": weights,
                "losses": replays,
                "fingerprint": prints,
            })
        return steps

    def load_state_dict(
        self,
        state: list[dict[str, Any]] | None,
        recollection: Recollection,
        device: torch.device,
    ) -> None:
        """See :meth:`Tape.load_state_dict`."""
        for saved in state or []:
            transitions = [
                Transition(rule=recollection.rule_class(**options), **_there(arguments, device))
                for options, arguments in saved["transitions"]
            ]
            raw_grads = saved["raw_grads"]
            step = OptimizerStep(
                transitions,
                [t.grad for t in transitions] if raw_grads is None else raw_grads,
                _clip(saved["clip"]),
                saved["number"],
                precision=saved["precision"],
            )
            losses = [recollection.make_replay(loss) for loss in saved["losses"]]
            arena = Arena(HOST, 0)
            weights, prints = saved["weights"], saved["fingerprint"]
            self._steps.append(_ReplayStep(step, weights, losses, prints, arena))


@final
class Recompute(_ReplayTape):
    """Keep weights and optimizer state of each step; compute each loss again on the way back.

    Memory: one training state a step of the window, and one step's graph. Time: one more forward
    and backward pass a step.

    Example:
        >>> from lightning_rtho import TRHO
        >>> callback = TRHO(tape=Recompute())
    """

    def _place(self, device: torch.device) -> torch.device:
        return device


@final
class Offload(_ReplayTape):
    """As `Recompute`, with the training states kept on another device.

    Args:
        device: Where they are kept.

    Example:
        >>> from lightning_rtho import TRHO
        >>> callback = TRHO(tape=Offload("cpu"))
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)

    def _place(self, device: torch.device) -> torch.device:
        return self.device


def _transition_state(transition: Transition) -> list[dict[str, Any]]:
    """Return the options of a transition's rule, and its other arguments."""
    arguments = {f.name: getattr(transition, f.name) for f in dataclasses.fields(transition)}
    return [dataclasses.asdict(arguments.pop("rule")), arguments]


def _clip(state: list[Any] | None) -> GradientClip | None:
    """Return the clipping whose name and limit were saved."""
    if state is None:
        return None
    name, limit = state
    return {clip.__name__: clip for clip in (ClipByNorm, ClipByValue)}[name](limit)


def _there(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Send the settings of a transition to a device; its states are fetched when they are read."""
    hyper = {name: sent_to(device, value) for name, value in arguments["hyper"].items()}
    return {**arguments, "hyper": hyper}


def _exchange(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Swap parameters and values, in place."""
    for param, value in zip(params, values, strict=True):
        present = param.detach().clone()
        param.data.copy_(value)
        value.copy_(present)


def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into the parameters, in place, without counting as someone who moves them."""
    for param, value in zip(params, values, strict=True):
        param.data.copy_(value)
