"""Training along a schedule that another run has learned."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_rtho._types import State
from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._checks import check_package
from lightning_rtho.callbacks._company import forget_what_is_given_up
from lightning_rtho.callbacks._metrics import log_metrics
from lightning_rtho.callbacks._run import schedulers_of
from lightning_rtho.callbacks._selection import select_hyperparameters
from lightning_rtho.callbacks._snapshot import (
    move_snapshot,
    read_derivative_buffers,
    restore_snapshot,
    take_snapshot,
    write_derivative_buffers,
)
from lightning_rtho.hyperparameters import Hyperparameter, Real, declared_hyperparameters
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.schedule import OuterUpdate, Schedule

__all__ = ["ReplaySchedule"]


@final
class ReplaySchedule(Callback):
    """Train along the hyperparameters that another run has learned, at the cost of plain training.

    No hypergradient is computed. With the same module, data, trainer settings and seed the weights
    are bitwise those of the run that learned the schedule, but for rounding where that computed
    something otherwise than plain training does: attention, recurrent layers, weight norm and
    compiled modules under `RTHO` and ``KeepGraph()``; a power of a hyperparameter in the loss, as
    in ``x ** h``; momentum that left 0 when `start_step` was not 0. Values are taken from the
    schedule from the first step on, those of the module are ignored.

    Where the run that learned was lost and went back to an earlier state, this one goes back to its
    own state of that step. It keeps that state, one more copy of the training state, until it is
    last gone back to. (Early stopping does not know of a range test that it goes through again.)

    After its last update the schedule holds its last values, however long the run; `stretch` makes
    a longer (or shorter) run of it instead. A run that resumes from a checkpoint goes on with the
    values of its step, whether the checkpoint was written along a schedule or while learning one.

    Args:
        schedule: The schedule, or a file that ``Schedule.to_json`` or ``to_csv`` wrote.
        stretch: Factor on the steps of the updates: 10 for a run of 10 times as many steps.

    Raises:
        ValueError: If the schedule names no hyperparameter, or `stretch` is not positive.

    Example:
        >>> import torch
        >>> import lightning as L
        >>> schedule = Schedule(start={"lr": torch.tensor(0.1)})
        >>> trainer = L.Trainer(callbacks=[ReplaySchedule(schedule, stretch=10)])
    """

    def __init__(self, schedule: str | Path | Schedule, *, stretch: float = 1.0) -> None:
        if not stretch > 0:
            raise ValueError(
                f"`stretch` must be positive, got {stretch}. It multiplies the steps of the "
                "updates; 1 leaves them."
            )
        self.schedule = schedule if isinstance(schedule, Schedule) else Schedule.load(schedule)
        if not self.schedule.names:
            raise ValueError(
                "`schedule` must name hyperparameters, got an empty one. Save `callback.schedule` "
                "after `trainer.fit`."
            )
        self.stretch = stretch
        self._steps = [step * stretch for step in self.schedule.steps]
        self._replayed: dict[str, Hyperparameter] = {}
        self._resumed_step: int | None = None
        self._applied = 0
        self._optimizers: list[DifferentiableOptimizer] = []
        self._buffers: list[State] = []
        # States that will be gone back to: one at a time, since what is best only gets better.
        kept = {update.restored_step for update in self.schedule}
        self._kept_steps = sorted(step * stretch for step in kept if step is not None)
        self._last_return = max(
            (n for n, u in enumerate(self.schedule, start=1) if u.safeguard == "restored"),
            default=0,
        )
        self._kept = 0
        self._snapshot: dict[str, Any] = {}

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Present natural values by name, each ``[*H]``; empty before ``fit``."""
        return {name: hyper.plain.clone() for name, hyper in self._replayed.items()}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse company that moves the same hyperparameters; forget what was read before."""
        check_package(pl_module)
        if stage == "fit":  # Lightning then loads what it resumes from
            self._resumed_step, self._snapshot, self._buffers = None, {}, []
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        others = [
            type(other).__name__
            for other in callbacks
            if isinstance(other, HypergradientCallback)  # of two of this kind Lightning refuses one
        ]
        if stage == "fit" and others:
            raise MisconfigurationException(
                f"`ReplaySchedule` must be alone in moving hyperparameters, got {others[0]} beside "
                "it. Remove one of them."
            )

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Note the step from which the run goes on."""
        self._resumed_step = checkpoint["global_step"]

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the present values and the state to go back to."""
        return {
            "hyperparameters": self.hyperparameters,
            "snapshot": self._snapshot,
            "derivative_buffers": self._derivative_buffers(),
        }

    def _derivative_buffers(self) -> list[State]:
        """Return what the optimizers keep, or have kept, for the derivative alone."""
        if not self._optimizers:
            return self._buffers
        return read_derivative_buffers(self._params, self._optimizers)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back the state to go back to; the values are those of the schedule."""
        self._snapshot = state_dict["snapshot"]
        self._buffers = state_dict["derivative_buffers"]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the hyperparameters and where they act."""
        names = self.schedule.names
        declared = declared_hyperparameters(pl_module)
        keys = [name if name in declared else re.sub(r"/pg\d+$", "", name) for name in names]
        # Learned values may lie outside of a setting's natural domain.
        domains = {key: declared[key].domain if key in declared else Real() for key in keys}
        self._replayed = select_hyperparameters(domains, pl_module, trainer.optimizers)
        if self._replayed.keys() != set(names):
            raise MisconfigurationException(
                f"The schedule holds {sorted(names)}, but the module has {sorted(self._replayed)}. "
                "Use as many parameter groups as the run that learned it."
            )
        for name, hyper in self._replayed.items():
            learned = self.schedule.values_at(float("inf"))[name]
            if learned.shape != hyper.shape:
                raise MisconfigurationException(
                    f"The schedule holds {name!r} of shape {tuple(learned.shape)}, but the module "
                    f"declares it with shape {tuple(hyper.shape)}. Declare it as in the run that "
                    "learned it."
                )
        if self._resumed_step is not None:  # the optimizer's state is from under these values
            self._assign(self._resumed_step)
        self._optimizers = [
            DifferentiableOptimizer(inner, schedulers_of(trainer, inner))
            for inner in trainer.optimizers
        ]
        # Else torch's own steps are those of the run that learned.
        trainer.optimizers = [o if self._leaves_0(o) else o.optimizer for o in self._optimizers]

    def _leaves_0(self, optimizer: DifferentiableOptimizer) -> bool:
        """Tell whether momentum is 0 somewhere, where torch keeps no velocity to go on with."""
        momenta = optimizer.acting_as("momentum").values()
        names = {n for n, hyper in self._replayed.items() if any(hyper is m for m in momenta)}
        values = [self.schedule.start, *(update.values for update in self.schedule)]
        return any(held.get(name) == 0 for held in values for name in names)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the values of the first step, or of the one that the run resumes from."""
        if self._resumed_step is None:
            self._snapshot = {}
        self._snapshot = move_snapshot(self._snapshot, self._params)
        begun = bisect_right if self._snapshot else bisect_left
        self._kept = begun(self._kept_steps, trainer.global_step)
        if self._resumed_step is not None and len(self._buffers) == len(self._params):
            write_derivative_buffers(self._buffers, self._params, self._optimizers)
        self._resumed_step, self._buffers = None, []
        self._applied = self._updates_until(trainer.global_step)
        self._write(trainer)
        for optimizer in self._optimizers:
            optimizer.before_update = partial(self._carry_buffers, optimizer)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the state of the start."""
        self._keep_state(trainer, pl_module)

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Go on with the values of an update as soon as its step is made."""
        self._keep_state(trainer, pl_module)
        made = self._updates_until(trainer.global_step)
        if made > self._applied:
            self._go_back(trainer, pl_module, self.schedule[self._applied : made])
            self._applied = made
            self._write(trainer)
        if made >= self._last_return:
            self._snapshot = {}

    def _keep_state(self, trainer: Trainer, module: LightningModule) -> None:
        """Copy the training state if the schedule will go back to it."""
        if self._kept == len(self._kept_steps):
            return
        due = bisect_right(self._kept_steps, trainer.global_step)
        if due > self._kept:
            self._kept = due
            self._snapshot = take_snapshot(module, self._params, self._optimizers)

    def _go_back(
        self, trainer: Trainer, module: LightningModule, updates: Sequence[OuterUpdate]
    ) -> None:
        """Go back to an earlier state if the run that learned did so at these updates."""
        if not any(update.safeguard == "restored" for update in updates):
            return
        if len(self._params) == len(self._snapshot.get("params", ())):
            restore_snapshot(self._snapshot, module, self._params, self._optimizers)
            forget_what_is_given_up(trainer, module)
        else:
            rank_zero_warn(
                "The run that learned the schedule went back to an earlier state at step "
                f"{updates[-1].step}, of which this run has none. Its weights stay, so from here "
                "on it is another run."
            )

    def _write(self, trainer: Trainer) -> None:
        """Write the values of the present step to where they act, and log them."""
        self._assign(trainer.global_step)
        for optimizer in self._optimizers:
            # Stochastic weight averaging brings in a scheduler of its own.
            optimizer.follow_schedulers(schedulers_of(trainer, optimizer.optimizer))
            optimizer.write_hyperparameters()
        values = self.hyperparameters.items()
        log_metrics(trainer, {f"hyperparameter/{k}": v.mean().item() for k, v in values})

    @property
    def _params(self) -> list[Tensor]:
        return [param for optimizer in self._optimizers for param in optimizer.params]

    def _updates_until(self, step: int) -> int:
        return bisect_right(self._steps, step)

    def _assign(self, step: int) -> None:
        """Give the hyperparameters the values that hold after so many optimizer steps."""
        made = self._updates_until(step)
        values = self.schedule[made - 1].values if made else self.schedule.start
        for name, value in values.items():
            self._replayed[name].assign(value)

    def _carry_buffers(self, optimizer: DifferentiableOptimizer) -> None:
        """Hand torch the velocity that the run had which learned momentum from 0 on."""
        rule, tuned = optimizer.rule_class, optimizer.tuned_settings
        lacking = any(rule.unkept_buffers(group, tuned) for group in optimizer.param_groups)
        if lacking or any(optimizer.derivative_buffers(param) for param in optimizer.params):
            columns = {id(hyper): i for i, hyper in enumerate(optimizer.hyperparameters)}
            optimizer.carry_derivative_buffers(optimizer.transitions(columns))

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give the optimizers back."""
        self._end(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the optimizers back."""
        self._end(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a fit that made no step, since the run that it goes on with had been ended."""
        self._resumed_step = None
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._optimizers:
            trainer.optimizers = [optimizer.optimizer for optimizer in self._optimizers]
            self._buffers = self._derivative_buffers()
        self._optimizers = []
