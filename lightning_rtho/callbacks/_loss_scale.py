"""What a loss is multiplied by before backward, so that small float16 gradients do not vanish."""

from typing import Any

from lightning.pytorch import Trainer

__all__ = ["gradient_scaler", "loss_scale"]


def gradient_scaler(trainer: Trainer) -> Any | None:
    """Return what scales the loss of a trainer; None where nothing does.

    Args:
        trainer: The trainer.
    """
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: Trainer) -> float:
    """Return the factor by which the trainer scales the loss before backward.

    Args:
        trainer: The trainer.

    Returns:
        The factor; 1 without a gradient scaler.
    """
    scaler = gradient_scaler(trainer)
    return 1.0 if scaler is None else float(scaler.get_scale())
