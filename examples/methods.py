"""Ways to come by hyperparameters, each an object: fixed, tuned on the way, found by a search.

A `Task` says how to make a module from values of its hyperparameters, and what it trains on. Every
run keeps the weights of its best validation error.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import lightning as L
import optuna
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder
from runs import clock
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_rtho import RTHO, TRHO

Values = dict[str, float]


class MakesModule(Protocol):
    """Returns a fresh module; it logs `val_error`, in percent."""

    def __call__(self, values: Values, *, tuned: bool) -> L.LightningModule:
        """Start at `values`: each a `Hyperparameter` if it is to be tuned, else a number."""


@dataclass(frozen=True)
class Task:
    """A module and its data.

    Attributes:
        make: Makes the module.
        train: Training batches.
        validation: Validation batches.
        steps: Optimizer steps of a whole run.
        check_every: Steps between two measurements of the validation error.
        patience: Measurements without a better one that end a run of fixed values.
        accelerator: As `Trainer` takes it.
    """

    make: MakesModule
    train: DataLoader
    validation: DataLoader
    steps: int
    check_every: int
    patience: int | None = None
    accelerator: str = "cpu"


@dataclass
class KeepBest(L.Callback):
    """Validation errors, and the weights of the best."""

    best: dict[str, Tensor] = field(default_factory=dict)
    best_error: float = math.inf
    best_step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down the error, and the weights where it is the lowest so far."""
        error = trainer.callback_metrics["val_error"].item()
        self.curve.append((trainer.global_step, error))
        if error < self.best_error:
            self.best_error, self.best_step = error, trainer.global_step
            self.best = copy.deepcopy(pl_module.state_dict())


@dataclass
class Trained:
    """A module with the weights of its best validation error, and how it came to be.

    Attributes:
        module: The module.
        kept: Its validation errors.
        seconds: What all of it took.
        values: Hyperparameters at the end.
        schedule: Step and values of every outer update.
        trials: Trainings that were begun.
    """

    module: L.LightningModule
    kept: KeepBest
    seconds: float
    values: Values
    schedule: list[tuple[int, Values]] = field(default_factory=list)
    trials: int = 1


@dataclass(frozen=True)
class Method(ABC):
    """A way to come by hyperparameters; `share` says how much of RTHO's time it is given."""

    title: str
    share: float = field(default=0.0, kw_only=True)

    @abstractmethod
    def __call__(self, task: Task, seed: int, budget: float) -> Trained:
        """Train; take `budget` seconds if there is a share."""


@dataclass(frozen=True)
class Fixed(Method):
    """The start values, to the end."""

    start: Values

    @override
    def __call__(self, task: Task, seed: int, budget: float) -> Trained:
        """Train once."""
        return train(task, task.make(self.start, tuned=False), self.start)


@dataclass(frozen=True)
class Tuned(Method):
    """The start values, moved by a callback while the module trains."""

    start: Values
    callback: Callable[[], RTHO | TRHO]

    @override
    def __call__(self, task: Task, seed: int, budget: float) -> Trained:
        """Train once, to the end."""
        callback, module = self.callback(), task.make(self.start, tuned=True)
        trained = train(replace(task, patience=None), module, self.start, [callback])
        trained.schedule = [(u.step, _numbers(u.values)) for u in callback.schedule]
        trained.values = _numbers(callback.hyperparameters)
        return trained


@dataclass(frozen=True)
class RateFinder(Method):
    """The start values, with the learning rate that Lightning's `LearningRateFinder` suggests."""

    start: Values

    @override
    def __call__(self, task: Task, seed: int, budget: float) -> Trained:
        """Find the rate, train once."""
        finder = LearningRateFinder()
        trained = train(task, task.make(self.start, tuned=False), self.start, [finder])
        rate = finder.optimal_lr.suggestion() if finder.optimal_lr else None
        trained.values = self.start if rate is None else {**self.start, "lr": rate}
        return trained


@dataclass(frozen=True)
class Range:
    """Values that a search draws from, uniformly or uniformly in their logarithm."""

    low: float
    high: float
    log: bool = True


@dataclass(frozen=True)
class Search(Method):
    """Trial after trial, for the given time; the best of all, unfinished ones included.

    A trial that is pruned, or cut short when time is up, counts with its best measurement so far.
    """

    space: dict[str, Range]
    sampler: Callable[..., optuna.samplers.BaseSampler]
    pruner: Callable[[], optuna.pruners.BasePruner]

    @override
    def __call__(self, task: Task, seed: int, budget: float) -> Trained:
        """Search."""
        began = clock()
        found: list[Trained] = []

        def objective(trial: optuna.Trial) -> float:
            values = {
                name: trial.suggest_float(name, drawn.low, drawn.high, log=drawn.log)
                for name, drawn in self.space.items()
            }
            watch = Watch(trial, began + budget)
            module = task.make(values, tuned=False)
            found.append(train(task, module, values, [watch]))
            if watch.ended:
                raise optuna.TrialPruned
            return found[-1].kept.best_error

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=self.sampler(seed=seed), pruner=self.pruner())
        while clock() < began + budget:
            study.optimize(objective, n_trials=1)
        best = min(found, key=lambda trained: trained.kept.best_error)
        return replace(best, seconds=clock() - began, trials=len(found))


@dataclass
class Watch(L.Callback):
    """Reports a trial's validation errors, and ends it where it is hopeless or time is up."""

    trial: optuna.Trial
    deadline: float
    ended: bool = False

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """End the trial where time is up."""
        self.ended |= clock() > self.deadline
        trainer.should_stop |= self.ended

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report; end the trial where the pruner says so."""
        self.trial.report(trainer.callback_metrics["val_error"].item(), trainer.global_step)
        self.ended |= self.trial.should_prune()


def train(
    task: Task, module: L.LightningModule, values: Values, callbacks: Sequence[L.Callback] = ()
) -> Trained:
    """Train a module; give it the weights of its best validation error."""
    kept = KeepBest()
    stopping = []
    if task.patience is not None:
        stopping = [EarlyStopping("val_error", patience=task.patience, check_finite=False)]
    trainer = L.Trainer(
        max_steps=task.steps,
        check_val_every_n_epoch=None,
        val_check_interval=task.check_every,
        num_sanity_val_steps=0,
        callbacks=[*callbacks, kept, *stopping],
        logger=False,
        accelerator=task.accelerator,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = clock()
    trainer.fit(module, task.train, task.validation)
    if kept.best:
        module.load_state_dict(kept.best)
    return Trained(module.cpu().eval(), kept, clock() - began, values)


def _numbers(values: dict[str, Tensor]) -> Values:
    return {name: value.item() for name, value in values.items()}
