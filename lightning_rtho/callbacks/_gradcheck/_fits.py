"""Short fits of copies of a module, all alike but for the hyperparameters."""

import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric
from typing_extensions import override

from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._metric import MetricObjective
from lightning_rtho.callbacks._objective import ValidationObjective
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from lightning_rtho.callbacks._replay_schedule import ReplaySchedule
from lightning_rtho.hyperparameters import declared_hyperparameters
from lightning_rtho.schedule import Schedule

__all__ = ["Fits", "StoredBatches"]

_REPLACED = frozenset({
    "barebones",
    "check_val_every_n_epoch",
    "default_root_dir",
    "devices",
    "fast_dev_run",
    "limit_train_batches",
    "limit_val_batches",
    "logger",
    "max_epochs",
    "max_time",
    "min_epochs",
    "min_steps",
    "num_nodes",
    "overfit_batches",
    "plugins",
    "precision",
    "profiler",
    "strategy",
    "val_check_interval",
})
"""Settings of a trainer that say how long, how precisely, where and how visibly it runs."""

_DROPPED = (Checkpoint, EarlyStopping, HypergradientCallback, ProgressBar, ReplaySchedule)


class StoredBatches:
    """The first batches of a loader, each time as they came.

    Args:
        loader: The loader.
        count: How many batches; fewer if there are no more.

    Raises:
        ValueError: If there are several loaders, or there is no batch.
    """

    def __init__(self, loader: Iterable[Any], count: int) -> None:
        if isinstance(loader, (list, tuple)) and any(isinstance(x, DataLoader) for x in loader):
            if len(loader) > 1:
                raise ValueError(
                    f"`hypergradcheck` wants one loader each for training and validation, got "
                    f"{len(loader)}. Pass one of them."
                )
            loader = loader[0]
        self._batches = list(islice(loader, count))
        if not self._batches:
            raise ValueError("`hypergradcheck` needs at least one batch, got an empty loader.")

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(copy.deepcopy(self._batches))


class Fits:
    """Makes fits in float64 that differ in nothing but hyperparameters and callbacks.

    Args:
        module: The module, of which each fit trains a copy.
        train: Batches to train on.
        val: Batches of the outer objective.
        trainer_kwargs: Settings of the trainer.
        steps: Optimizer steps.
        objective: The metric that is the outer objective; None for a loss of the module's own.
    """

    def __init__(
        self,
        module: LightningModule,
        train: StoredBatches,
        val: StoredBatches,
        trainer_kwargs: Mapping[str, Any],
        steps: int,
        objective: Metric | None = None,
    ) -> None:
        self._module, self._train, self.val, self.steps = module, train, val, steps
        self._metric = objective
        self._settings = {k: v for k, v in trainer_kwargs.items() if k not in _REPLACED}
        callbacks = self._settings.pop("callbacks", None) or []
        callbacks = [callbacks] if isinstance(callbacks, Callback) else callbacks
        self._callbacks = [c for c in callbacks if not isinstance(c, _DROPPED)]
        self._random_state = read_random_state()

    @property
    def observing(self) -> dict[str, Any]:
        """Arguments by which a callback measures at the last step and moves nothing."""
        return {
            "hyper_batch_size": self.steps,
            "outer_optimizer": None,
            "dataloader": self.val,
            "outer_batches": len(self.val),
            "objective": self._metric,
        }

    def fit(self, *callbacks: Callback) -> None:
        """Train a copy of the module.

        Args:
            callbacks: Callbacks beside those of the settings.
        """
        module = _copy(self._module)
        for hyper in declared_hyperparameters(module).values():
            hyper.data = hyper.data.double()
            hyper.assign(hyper.plain)
        settings: dict[str, Any] = {"accelerator": "cpu", **copy.deepcopy(self._settings)}
        settings |= {
            "callbacks": [*copy.deepcopy(self._callbacks), *callbacks],
            "devices": 1,
            "enable_checkpointing": False,
            "enable_model_summary": False,
            "enable_progress_bar": False,
            "logger": False,
            "max_epochs": -1,
            "max_steps": self.steps,
            "num_sanity_val_steps": 0,
            "precision": "64-true",
        }
        with _quiet():
            write_random_state(self._random_state)
            Trainer(**settings).fit(module, self._train, self.val)

    def objective_at(self, values: Mapping[str, Tensor]) -> float:
        """Return the outer objective after a fit.

        Args:
            values: Natural values of hyperparameters, by name, each ``[*H]``.

        Returns:
            The outer objective.
        """
        metric = None if self._metric is None else MetricObjective(self._metric)
        final = _FinalObjective(self.steps, self.val, metric)
        self.fit(ReplaySchedule(Schedule(start=values)), final)
        assert final.value is not None
        return final.value if metric is None else metric.sign * final.value


def _copy(module: LightningModule) -> LightningModule:
    """Copy a module without the trainer that it may have been fitted by."""
    trainer = module._trainer  # private: `module.trainer` raises where there is none
    module.trainer = None
    try:
        copied = copy.deepcopy(module)
    finally:
        module.trainer = trainer
    # Private: copies lose the hooks of their weights, which torch shows in no other way.
    for param, twin in zip(module.parameters(), copied.parameters(), strict=True):
        for hook in (param._backward_hooks or {}).values():
            twin.register_hook(hook)
        for hook in (param._post_accumulate_grad_hooks or {}).values():
            twin.register_post_accumulate_grad_hook(hook)
    return copied


class _FinalObjective(Callback):
    """Evaluates the outer objective when the last step is made."""

    def __init__(self, steps: int, val: StoredBatches, metric: MetricObjective | None) -> None:
        self._steps, self._val, self._metric = steps, val, metric
        self.value: float | None = None

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Evaluate."""
        if trainer.global_step >= self._steps and self.value is None:
            objective = ValidationObjective(
                trainer, pl_module, self._val, len(self._val), self._metric
            )
            objective.advance()
            self.value = objective(list(pl_module.parameters()), []).value.item()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep dozens of trainers from announcing themselves."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
