"""What the loggers see of an outer update."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch import Trainer

from lightning_rtho.schedule import OuterUpdate

__all__ = ["log_metrics", "logged_step", "metrics_of", "show_metrics"]


def metrics_of(update: OuterUpdate) -> dict[str, float]:
    """Return the scalars of an update; of a hyperparameter with a shape its mean.

    Args:
        update: The update.

    Returns:
        The scalars by name; NaN where they are not known.
    """
    metrics = {"outer_objective": update.outer_objective}
    if not math.isnan(update.sensitivity):
        metrics["safeguard/sensitivity"] = update.sensitivity  # alone, the name is that of recall
    for kind, values in (
        ("hyperparameter", update.values),
        ("hypergradient", update.hypergradients),
    ):
        metrics |= {f"{kind}/{name}": value.mean().item() for name, value in values.items()}
    return metrics


def log_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand what is known to every logger, at the present step.

    Args:
        trainer: The trainer.
        metrics: Scalars by name; those that are NaN are not known.
    """
    known = {name: value for name, value in metrics.items() if not math.isnan(value)}
    for logger in trainer.loggers if known else []:
        logger.log_metrics(known, step=logged_step(trainer))


def show_metrics(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Let callbacks monitor what is known, and the progress bar show the hyperparameters.

    Written there directly, where it stays until the next update: `LightningModule.log` takes a
    millisecond for each name, and forgets it when an epoch ends.

    Args:
        trainer: The trainer.
        metrics: Scalars by name.
    """
    trainer.callback_metrics.update({name: torch.tensor(x) for name, x in metrics.items()})
    on_bar = {name: x for name, x in metrics.items() if name.startswith("hyperparameter/")}
    trainer.progress_bar_metrics.update(on_bar)


def logged_step(trainer: Trainer) -> int:
    """Return the step at which loggers are handed what a batch has come to.

    Args:
        trainer: The trainer, at the end of a batch or before the first.

    Returns:
        The optimizer's steps; where it is stepped by hand, any times a batch, batches: so Lightning
        counts what a module logs.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.total_batch_idx + 1
