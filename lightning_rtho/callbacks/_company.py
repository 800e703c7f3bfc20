"""What other callbacks must not make of a run that goes back."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

__all__ = ["forget_what_is_given_up", "let_wait"]


def let_wait(trainer: Trainer) -> None:
    """Let early stopping wait for what comes, whatever the next validation says.

    Args:
        trainer: The trainer.
    """
    for stopping in trainer.early_stopping_callbacks:
        stopping.wait_count = -2  # the next validation counts one, which no patience is below


def forget_what_is_given_up(trainer: Trainer, module: LightningModule) -> None:
    """Let other callbacks begin anew: what a run did before it went back does not count.

    Early stopping begins with the next validation. Averages of weights, into which lost ones have
    gone, begin with those that the module has now.

    Args:
        trainer: The trainer.
        module: The module, gone back.
    """
    for stopping in trainer.early_stopping_callbacks:
        stopping.wait_count = 0
        worst = math.inf if stopping.mode == "min" else -math.inf
        stopping.best_score = torch.full_like(stopping.best_score, worst)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        # Private: Lightning's averaging callbacks have no other way to begin anew.
        average = getattr(callback, "_average_model", None)
        holder = average if isinstance(average, AveragedModel) else callback
        count = getattr(holder, "n_averaged", None)
        if average is not None and isinstance(count, Tensor) and count > 0:
            count.zero_()
            with torch.no_grad():
                for kept, weight in zip(average.parameters(), module.parameters(), strict=False):
                    kept.copy_(weight)
