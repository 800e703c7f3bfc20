"""What a window of training steps leaves behind, to be read backwards."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor

from lightning_rtho.distributed import is_distributed
from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient._arena import Arena, Arenas
from lightning_rtho.hypergradient._base import OptimizerStep, Recollection, Replay
from lightning_rtho.hypergradient._fingerprint import fingerprint, is_of
from lightning_rtho.hypergradient._saved import SavedWeights
from lightning_rtho.linearization import Linearization, TracedLoss

__all__ = ["KeepGraph", "Offload", "Recompute", "RecordedStep", "Tape"]


class RecordedStep(NamedTuple):
    """One optimizer step of the past.

    Attributes:
        step: The step, with copies of its tensors.
        linearizations: One for each micro-batch of its gradient, made when called.
        is_sampled: Whether they are of samples, whose gradients are not the step's.
    """

    step: OptimizerStep
    linearizations: Sequence[Callable[[], Linearization]]
    is_sampled: bool = False

    def after_update(self) -> "RecordedStep":
        """Let the gradients go, once they are pulled back through the update and need no check."""
        if self.step.is_traced is None:
            return self
        return self._replace(step=_without_gradients(self.step))


class Tape(ABC):
    """Records a window of optimizer steps.

    Attributes:
        needs_replay: Whether it computes losses again.
    """

    needs_replay: ClassVar[bool]

    @abstractmethod
    def start(self, params: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        """Prepare for a forward pass.

        Args:
            params: All weights, each ``[*P]``.
            buffers: What forward passes may overwrite, each ``[*B]``.
        """

    @abstractmethod
    def record(
        self,
        loss: TracedLoss,
        replay: Replay | None,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
    ) -> list[Tensor | None] | None:
        """Keep what is needed to linearize a loss later.

        Args:
            loss: The loss with its graph.
            replay: Computes it again; may be None unless :attr:`needs_replay`.
            params: Weights, each ``[*P]``.
            hypers: Hyperparameters, each ``[*H]``.

        Returns:
            The gradients by the weights, each ``[*P]``, if they were computed.
        """

    @abstractmethod
    def advance(self, step: OptimizerStep, params: Sequence[Tensor]) -> None:
        """Keep what an optimizer step, about to be made, was.

        Args:
            step: The step.
            params: All weights, each ``[*P]``.
        """

    @abstractmethod
    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """Yield the steps from last to first and let them go; the weights end as they began.

        Args:
            params: All weights, each ``[*P]``.
            hypers: Hyperparameters, at the values they had in the window, each ``[*H]``.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of steps."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all steps and let go of what was held."""

    @abstractmethod
    def state_dict(self) -> list[dict[str, Any]] | None:
        """Return the steps so far, in plain values; None if they cannot be had."""

    @abstractmethod
    def load_state_dict(
        self, state: list[dict[str, Any]] | None, recollection: Recollection
    ) -> None:
        """Take in the steps of another tape.

        Args:
            state: What :meth:`state_dict` returned; None leaves the window empty.
            recollection: What belongs to the state but is not in it.
        """


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
            prints = fingerprint(_gradients(step))
            step = _without_gradients(step)
        arena = self._arenas.take(self._place(params[0].device), _size(step, params))
        copied = _copy_step(step, arena.copy)
        weights = _copy_weights(params, copied, arena.copy)
        self._steps.append(_ReplayStep(copied, weights, self._losses, prints, arena))
        self._losses = []

    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """See :meth:`Tape.backward`."""

        def fetch(tensor: Tensor) -> Tensor:
            return tensor.to(params[0].device)

        def linearize(replay: Replay) -> Linearization:
            return Linearization(replay(), params, hypers)

        def recall(kept: _ReplayStep) -> RecordedStep:
            step = _copy_step(_at(params, kept.step), fetch)
            if kept.fingerprint is None:
                lines = [partial(linearize, replay) for replay in kept.losses]
                return RecordedStep(step, lines, any(loss.is_sample for loss in kept.losses))
            line = linearize(kept.losses[0])
            step = _with_gradients(step, line.gradients, kept.fingerprint)
            return RecordedStep(step, [partial(_identity, line)])

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

    def state_dict(self) -> list[dict[str, Any]] | None:
        """See :meth:`Tape.state_dict`."""
        steps = []
        for step, weights, losses, prints, _ in self._steps:
            replays = [replay.state_dict() for replay in losses]
            if any(replay is None for replay in replays):
                return None
            steps.append({
                "number": step.number,
                "transitions": [_transition_state(transition) for transition in step.transitions],
                "raw_grads": None if step.clip is None else list(step.raw_grads),
                "weights": weights,
                "losses": replays,
                "fingerprint": prints,
            })
        return steps

    def load_state_dict(
        self, state: list[dict[str, Any]] | None, recollection: Recollection
    ) -> None:
        """See :meth:`Tape.load_state_dict`."""
        for saved in state or []:
            transitions = [
                Transition(rule=recollection.rule_class(**options), **arguments)
                for options, arguments in saved["transitions"]
            ]
            raw_grads = saved["raw_grads"]
            clip = None if raw_grads is None else recollection.clip
            raw_grads = [t.grad for t in transitions] if raw_grads is None else raw_grads
            step = OptimizerStep(transitions, raw_grads, clip, saved["number"])
            losses = [recollection.make_replay(loss) for loss in saved["losses"]]
            arena = Arena(torch.device("cpu"), 0)
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


@final
class KeepGraph(Tape):
    """Keep the graph of every loss of the window: nothing is computed twice.

    Memory: one training state and one graph a step of the window.

    Example:
        >>> from lightning_rtho import TRHO
        >>> callback = TRHO(tape=KeepGraph())
    """

    needs_replay = False

    def __init__(self) -> None:
        self._losses: list[Linearization] = []
        self._steps: list[tuple[OptimizerStep, list[Linearization], Arena]] = []
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
        transitions = [
            dataclasses.replace(t, state={**t.state, "param": copies[t.index]})
            for t in step.transitions
        ]
        ours = {id(copy) for copy in copies}

        def copy(tensor: Tensor) -> Tensor:
            return tensor if id(tensor) in ours else arena.copy(tensor)

        step = dataclasses.replace(step, transitions=transitions)
        self._steps.append((_copy_step(step, copy), self._losses, arena))
        self._losses = []

    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """See :meth:`Tape.backward`; graphs go as they are read."""
        self._hooks.close()
        while self._steps:
            step, losses, arena = self._steps.pop()
            yield RecordedStep(step, [partial(_identity, line) for line in losses])
            self._arenas.give_back(arena)

    def __len__(self) -> int:
        return len(self._steps)

    def clear(self) -> None:
        """See :meth:`Tape.clear`."""
        self._losses, self._steps = [], []
        self._saved = None
        self._hooks.close()

    def state_dict(self) -> None:
        """See :meth:`Tape.state_dict`; a graph can be kept in memory alone."""

    def load_state_dict(
        self, state: list[dict[str, Any]] | None, recollection: Recollection
    ) -> None:
        """See :meth:`Tape.load_state_dict`; the window begins anew."""


def _gradients(step: OptimizerStep) -> list[Tensor]:
    """Return the gradients of a step, before and after clipping."""
    grads = [transition.grad for transition in step.transitions]
    return grads if step.clip is None else [*step.raw_grads, *grads]


def _without_gradients(step: OptimizerStep) -> OptimizerStep:
    """Leave empty tensors in the place of gradients."""
    transitions = [
        dataclasses.replace(transition, grad=transition.grad.new_empty(0))
        for transition in step.transitions
    ]
    return dataclasses.replace(
        step, transitions=transitions, raw_grads=[t.grad for t in transitions]
    )


def _with_gradients(
    step: OptimizerStep, gradients: Sequence[Tensor | None], prints: Tensor
) -> OptimizerStep:
    """Put gradients back, computed again; tell whether they are what the optimizer saw."""
    raw_grads = []
    for transition in step.transitions:
        gradient = gradients[transition.index]
        zero = torch.zeros_like(transition.state["param"])
        raw_grads.append(zero if gradient is None else gradient)
    grads = raw_grads if step.clip is None else step.clip(*raw_grads)
    transitions = [
        dataclasses.replace(transition, grad=grad)
        for transition, grad in zip(step.transitions, grads, strict=True)
    ]
    step = dataclasses.replace(step, transitions=transitions, raw_grads=raw_grads)
    return dataclasses.replace(step, is_traced=bool(is_of(prints, _gradients(step))))


def _identity(linearization: Linearization) -> Linearization:
    return linearization


def _transition_state(transition: Transition) -> list[dict[str, Any]]:
    """Return the options of a transition's rule, and its other arguments."""
    names = ("index", "state", "grad", "hyper", "columns", "slopes")
    arguments = {name: getattr(transition, name) for name in names}
    return [dataclasses.asdict(transition.rule), arguments]


def _copy_step(step: OptimizerStep, copy: Callable[[Tensor], Tensor]) -> OptimizerStep:
    """Copy the tensors of a step that the optimizer will overwrite."""

    def copy_transition(transition: Transition) -> Transition:
        state = {name: copy(value) for name, value in transition.state.items()}
        grad = transition.grad if step.is_traced else copy(transition.grad)
        return dataclasses.replace(transition, state=state, grad=grad)

    transitions = [copy_transition(transition) for transition in step.transitions]
    if step.clip is None:
        raw_grads = [transition.grad for transition in transitions]
    else:
        raw_grads = [copy(grad) for grad in step.raw_grads]
    return dataclasses.replace(step, transitions=transitions, raw_grads=raw_grads)


def _copy_weights(
    weights: Sequence[Tensor], step: OptimizerStep, copy: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Copy weights, but for those that a copied step holds already."""
    held = {transition.index: transition.state["param"] for transition in step.transitions}
    return [held[i] if i in held else copy(weight) for i, weight in enumerate(weights)]


def _size(step: OptimizerStep, params: Sequence[Tensor]) -> int:
    """Return how many bytes copies of a step and of all weights take."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    _copy_weights(params, _copy_step(step, note), note)
    return Arena.size_of(tensors)


def _at(params: Sequence[Tensor], step: OptimizerStep) -> OptimizerStep:
    """Let a step read its weights where they stand now."""
    transitions = [
        dataclasses.replace(t, state={**t.state, "param": params[t.index].detach()})
        for t in step.transitions
    ]
    return dataclasses.replace(step, transitions=transitions)


def _exchange(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Swap parameters and values, in place."""
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            present = param.clone()
            param.copy_(value)
            value.copy_(present)


def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write values into the parameters, in place."""
    with torch.no_grad():
        for param, value in zip(params, values, strict=True):
            param.copy_(value)
