"""Computing the loss of a past micro-batch again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import move_data_to_device
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_rtho.callbacks._attributes import (
    Attributes,
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
from lightning_rtho.callbacks._loss_scale import loss_scale
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from lightning_rtho.linearization import RunningStatistics, TracedLoss, silenceable_hooks

__all__ = ["TrainingStepReplay", "noted_beginning"]


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


@dataclass(eq=False)
class TrainingStepReplay:
    """What a ``training_step`` depended on, apart from the weights, so that it can run again.

    Attributes:
        trainer: The trainer.
        module: The module.
        statistics: The running statistics of the module.
        args: Arguments of the step, on their device.
        scale: What the loss was multiplied by.
        accumulated: Number of micro-batches that its gradient was averaged over.
        random_state: State of the global generators.
        progress: Where the trainer stood.
        buffers: The module's buffers.
        attributes: Its plain attributes.
        bystanders: Weights that no optimizer trains but that something moves.
        is_sample: Whether the batch holds a part of the examples alone.
    """

    trainer: Trainer
    module: LightningModule
    statistics: RunningStatistics
    args: list[Any]
    scale: float
    accumulated: int
    random_state: dict[str, Any]
    progress: _Progress
    buffers: dict[str, BufferCopy]
    attributes: Attributes
    bystanders: list[Bystander]
    is_sample: bool

    @classmethod
    def of_present(
        cls,
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
    ) -> Self:
        """Make the replay of the step that is about to run.

        Args:
            trainer: The trainer.
            module: The module.
            batch: A copy of the batch on its device.
            batch_idx: Its index in the epoch.
            statistics: The running statistics of the module.
            buffers: Copies its buffers.
            attributes: Copies its plain attributes.
            bystanders: Weights that no optimizer trains but that something moves.
            is_sample: Whether the batch holds a part of the examples alone.

        Returns:
            The replay.
        """
        args = [batch]
        if is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2):
            args.append(batch_idx)
        return cls(
            trainer,
            module,
            statistics,
            args,
            loss_scale(trainer),
            trainer.accumulate_grad_batches,
            read_random_state(),
            _Progress(trainer, trainer.global_step, trainer.current_epoch),
            buffers.take(),
            attributes.take(),
            bystanders,
            is_sample,
        )

    @classmethod
    def from_state_dict(
        cls,
        trainer: Trainer,
        module: LightningModule,
        statistics: RunningStatistics,
        buffers: dict[str, BufferCopy],
        state: dict[str, Any],
    ) -> Self:
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
        device = trainer.strategy.root_device
        changed = {
            name: BufferCopy(None, None, None if value is None else value.to(device))
            for name, value in state["buffers"].items()
        }
        return cls(
            trainer,
            module,
            statistics,
            move_data_to_device(state["args"], device),
            state["scale"],
            state["accumulated"],
            state["random_state"],
            _Progress(trainer, *state["progress"]),
            buffers | changed,
            {(place, name): value for place, name, value in state["attributes"]},
            [Bystander(*bystander) for bystander in state["bystanders"]],
            state["is_sample"],
        )

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the step depended on; None if its batch is of no plain kind."""
        if not _is_plain(self.args):
            return None
        return {
            "is_sample": self.is_sample,
            "args": self.args,
            "scale": self.scale,
            "accumulated": self.accumulated,
            "random_state": self.random_state,
            "progress": [self.progress.global_step, self.progress.epoch],
            "attributes": saved_attributes(self.attributes),
            "buffers": changed_since(self.buffers, self.module),
            "bystanders": [[*bystander] for bystander in self.bystanders],
        }

    def __call__(self) -> TracedLoss:
        """Return the loss at the weights that the module has now."""
        trainer, module = self.trainer, self.module
        buffers = changed_since(self.buffers, module)
        with (
            isolated(trainer, module, RunningStage.TRAINING),
            self.progress.restored(),
            standing_at(self.bystanders, module),
            twice_differentiable_kernels(module),
            silenceable_hooks(),
        ):
            write_random_state(self.random_state)
            put_buffers(module, buffers)
            put_attributes(module, self.attributes)
            self.statistics.start()
            with trainer.precision_plugin.train_step_context():  # not through DDP, as validation
                output: Any = module.training_step(*self.args)
            loss = output["loss"] if isinstance(output, dict) else output
            loss = loss / self.accumulated * self.scale
            return TracedLoss(loss, self.statistics.collect(), self.scale)
