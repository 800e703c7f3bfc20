"""Computing the loss of a past micro-batch again."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_rtho.callbacks._attributes import (
    PlainAttributes,
    put_attributes,
    saved_attributes,
)
from lightning_rtho.callbacks._buffers import (
    BufferCopies,
    BufferCopy,
    changed_since,
    put_buffers,
)
from lightning_rtho.callbacks._bystanders import Bystander, standing_at
from lightning_rtho.callbacks._isolation import isolated
from lightning_rtho.callbacks._kernels import twice_differentiable_kernels
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from lightning_rtho.linearization import RunningStatistics, TracedLoss, silenceable_hooks

__all__ = ["TrainingStepReplay", "loss_scale", "noted_beginning"]


def loss_scale(trainer: Trainer) -> float:
    """Return the factor by which the trainer scales the loss before backward.

    Args:
        trainer: The trainer.

    Returns:
        The factor; 1 without a gradient scaler.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


@contextmanager
def noted_beginning(module: LightningModule, note: Callable[[Any], None]) -> Iterator[None]:
    """Tell when a training step begins, after all hooks that run before it.

    Args:
        module: The module.
        note: Called then, once, with the batch.
    """
    own, step = vars(module).get("training_step"), module.training_step

    def put_back() -> None:
        if vars(module).get("training_step") is noted:
            del module.training_step
            if own is not None:
                module.training_step = own  # type: ignore[method-assign]

    @wraps(step)
    def noted(batch: Any, *args: Any, **kwargs: Any) -> Any:
        put_back()
        note(batch)
        return step(batch, *args, **kwargs)

    # Lightning reads the signature below one decorator alone.
    noted.__wrapped__ = getattr(step, "__wrapped__", step)
    module.training_step = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        put_back()


@dataclass(frozen=True)
class _Progress:
    """Where the trainer stood: steps read ``global_step`` and ``current_epoch``."""

    trainer: Trainer
    global_step: int
    epoch: int

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let the trainer stand there again."""
        fit_loop = self.trainer.fit_loop
        # Counters of the loops, not settable through the trainer.
        steps = fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        epochs = fit_loop.epoch_progress.current
        present = steps.completed, epochs.completed
        steps.completed, epochs.completed = self.global_step, self.epoch
        try:
            yield
        finally:
            steps.completed, epochs.completed = present


def _is_plain(tree: Any) -> bool:
    """Whether a batch can be read back from a file without running foreign code."""
    if type(tree) in (list, tuple):
        return all(_is_plain(item) for item in tree)
    if type(tree) is dict:
        return all(_is_plain(item) for pair in tree.items() for item in pair)
    return type(tree) in (Tensor, int, float, str, bool, type(None))


def _copied(batch: Any) -> Any:
    """Copy what holds the tensors of a batch, which a step may change, but no tensor."""
    copied = apply_to_collection(batch, Tensor, lambda tensor: tensor)
    if copied is batch and not isinstance(batch, Tensor) and hasattr(batch, "__dict__"):
        return copy.copy(batch)
    return copied


class TrainingStepReplay:
    """What a ``training_step`` depended on, apart from the weights, so that it can run again.

    Args:
        trainer: The trainer, just before the step.
        module: The module.
        batch: The batch on its device.
        batch_idx: Its index in the epoch.
        statistics: The running statistics of the module.
        buffers: Its buffers.
        attributes: Its plain attributes.
        bystanders: Weights that no optimizer trains but that something moves.
        is_sample: Whether the batch holds a part of the examples alone.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        batch: Any,
        batch_idx: int,
        statistics: RunningStatistics,
        buffers: BufferCopies,
        attributes: PlainAttributes,
        bystanders: list[Bystander],
        *,
        is_sample: bool = False,
    ) -> None:
        self.is_sample = is_sample
        self._bystanders = bystanders
        self._trainer, self._module = trainer, module
        self._statistics = statistics
        self._args = [_copied(batch)]
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            self._args.append(batch_idx)
        self._scale = loss_scale(trainer)
        self._accumulated = trainer.accumulate_grad_batches
        self._random_state = read_random_state()
        self._progress = _Progress(trainer, trainer.global_step, trainer.current_epoch)
        self._buffers = buffers.take()
        self._attributes = attributes.take()

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the step depended on; None if its batch is of no plain kind."""
        if not _is_plain(self._args):
            return None
        return {
            "is_sample": self.is_sample,
            "args": self._args,
            "scale": self._scale,
            "accumulated": self._accumulated,
            "random_state": self._random_state,
            "progress": [self._progress.global_step, self._progress.epoch],
            "attributes": saved_attributes(self._attributes),
            "buffers": changed_since(self._buffers, self._module),
            "bystanders": [[*bystander] for bystander in self._bystanders],
        }

    @classmethod
    def from_state_dict(
        cls,
        trainer: Trainer,
        module: LightningModule,
        statistics: RunningStatistics,
        buffers: dict[str, BufferCopy],
        state: dict[str, Any],
    ) -> "TrainingStepReplay":
        """Make the replay of a step of another run.

        Args:
            trainer: The trainer.
            module: The module.
            statistics: The running statistics of the module.
            buffers: Its buffers as they were when `state` was written.
            state: What :meth:`state_dict` returned.

        Returns:
            The replay.
        """
        replay = cls.__new__(cls)
        replay._trainer, replay._module, replay._statistics = trainer, module, statistics
        replay.is_sample = state["is_sample"]
        replay._args = move_data_to_device(state["args"], trainer.strategy.root_device)
        replay._scale, replay._accumulated = state["scale"], state["accumulated"]
        replay._random_state = state["random_state"]
        replay._bystanders = [Bystander(*bystander) for bystander in state["bystanders"]]
        replay._progress = _Progress(trainer, *state["progress"])
        replay._attributes = {(place, name): value for place, name, value in state["attributes"]}
        device = trainer.strategy.root_device
        replay._buffers = buffers | {
            name: BufferCopy(None, None, None if value is None else value.to(device))
            for name, value in state["buffers"].items()
        }
        return replay

    def __call__(self) -> TracedLoss:
        """Return the loss at the weights that the module has now."""
        trainer, module = self._trainer, self._module
        buffers = changed_since(self._buffers, module)
        with (
            isolated(trainer, module, RunningStage.TRAINING),
            self._progress.restored(),
            standing_at(self._bystanders, module),
            twice_differentiable_kernels(module),
            silenceable_hooks(),
        ):
            write_random_state(self._random_state)
            put_buffers(module, buffers)
            put_attributes(module, self._attributes)
            self._statistics.start()
            output: Any = trainer.strategy.training_step(*self._args)
            loss = output["loss"] if isinstance(output, dict) else output
            loss = loss / self._accumulated * self._scale
            return TracedLoss(loss, self._statistics.collect(), self._scale)
