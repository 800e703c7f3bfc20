"""What can't be differentiated rightly is refused, before a wrong number is used."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["check_optimizers", "check_settings"]


def check_settings(trainer: Trainer, module: LightningModule) -> None:
    """Check the settings of trainer and module that are known before the data.

    Args:
        trainer: The trainer.
        module: The module.

    Raises:
        MisconfigurationException: If a setting cannot be followed.
    """
    if not module.automatic_optimization:
        raise MisconfigurationException(
            "Manual optimization is not supported, got `automatic_optimization=False`. Let "
            "Lightning call backward and `optimizer.step` to tune hyperparameters."
        )
    if is_overridden("backward", module):
        raise MisconfigurationException(
            f"`{type(module).__name__}.backward` is overridden, so the gradient that the optimizer "
            "sees cannot be followed. Remove the override."
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        raise MisconfigurationException(
            f"`strategy` must keep training on one device, got {type(trainer.strategy).__name__}. "
            "Use `Trainer(devices=1)`."
        )


def check_optimizers(trainer: Trainer) -> None:
    """Check the optimizers that the module configured.

    Args:
        trainer: The trainer.

    Raises:
        MisconfigurationException: If there is not exactly one, or it unscales gradients itself.
    """
    if len(trainer.optimizers) != 1:
        raise MisconfigurationException(
            f"`configure_optimizers` must return one optimizer, got {len(trainer.optimizers)}."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None and getattr(trainer.optimizers[0], "_step_supports_amp_scaling", False):
        raise MisconfigurationException(
            "`fused=True` lets the optimizer free gradients of the loss scale out of sight, which "
            "cannot be followed. Use `fused=False` with `precision='16-mixed'`."
        )
