"""What can't be differentiated rightly is refused, before a wrong number is used."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

# Private: torch exports the functions that install these, not their types.
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils.checkpoint import CheckpointError

from lightning_rtho.callbacks._loss_scale import gradient_scaler
from lightning_rtho.hypergradient import GradientMismatchError
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = [
    "check_materialized",
    "check_modules",
    "check_optimizers",
    "check_package",
    "check_settings",
    "note_what_helps",
    "refusals_explained",
    "warn_of_warmup",
]


def check_settings(trainer: Trainer, module: LightningModule) -> None:
    """Check the settings of trainer and module that are known before the data.

    Args:
        trainer: The trainer.
        module: The module.

    Raises:
        MisconfigurationException: If a setting cannot be followed.
    """
    check_package(module)
    if trainer.world_size > 1 and not module.automatic_optimization:
        raise MisconfigurationException(
            "Manual optimization is not followed over several processes, got "
            f"{trainer.world_size}. Use `Trainer(devices=1)`."
        )
    if is_overridden("backward", module):
        raise MisconfigurationException(
            f"`{type(module).__name__}.backward` is overridden, so the gradient that the optimizer "
            "sees cannot be followed. Remove the override."
        )
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        raise MisconfigurationException(
            f"`strategy` must be that of one device or DDP, got {type(trainer.strategy).__name__}. "
            "Use `Trainer(devices=1)` or `Trainer(strategy='ddp')`."
        )
    # Private: the strategy hands out its options in no other way.
    if getattr(trainer.strategy, "_ddp_kwargs", {}).get("static_graph"):
        raise MisconfigurationException(
            "`static_graph=True` lets processes drift apart without a word where gradients are "
            "computed twice. Use `DDPStrategy(static_graph=False)`."
        )


def check_package(module: Any) -> None:
    """Check that a module is one of the package that the callbacks are made for.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If it is not, as one of ``pytorch_lightning``.
    """
    if not isinstance(module, LightningModule):
        raise MisconfigurationException(
            f"`{type(module).__name__}` must be a `LightningModule` of `lightning.pytorch`, got "
            "one of another package. Replace `import pytorch_lightning as pl` by "
            "`import lightning.pytorch as pl`: the classes of the two do not mix."
        )


_NO_HOOKS = "saved tensor hooks"  # in torch's words, here and below
_NO_TRANSFORMS = (_NO_HOOKS, "data pointer on an invalid python storage")


def check_materialized(module: nn.Module) -> None:
    """Check that all weights and buffers have their shapes.

    Args:
        module: The module, about to train.

    Raises:
        MisconfigurationException: If a lazy layer has seen no batch.
    """
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        if is_lazy(tensor):
            raise MisconfigurationException(
                f"`{name}` has no shape yet, and would get it where the outer objective is tried "
                "before training. Let lazy layers see a batch before, as in Lightning's sanity "
                "check (`num_sanity_val_steps`)."
            )


def note_what_helps(error: BaseException) -> None:
    """Say of an error in a training step what makes up for it, if it comes by way of us.

    Args:
        error: The error.
    """
    # As torch writes of an argument; what is computed from a hyperparameter is a `Number`.
    if isinstance(error, TypeError) and re.search(r"not (Hyperparameter|Number)\b", str(error)):
        error.add_note(
            "A live hyperparameter stands where torch takes plain numbers alone, of which it knows "
            "no derivative. Write the operation out, as `torch.where(x > 0, x, h * x)` for a slope "
            "h, or let it be a number."
        )
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_TRANSFORMS):
        error.add_note(
            "`TRHO(tape=KeepGraph())` keeps graphs by hooks beside which torch takes no "
            "`torch.func`. Use `RTHO`, or `TRHO()` without it."
        )


@contextmanager
def refusals_explained() -> Iterator[None]:
    """Turn what the mathematics below refuses into an error about the user's setting.

    Raises:
        MisconfigurationException: If an operation has no second derivative, the optimizer's
            gradient is not the loss's, or a part of a step cannot be computed again as it was.
        RuntimeError: If it is another, as it came.
    """
    try:
        yield
    except GradientMismatchError as error:
        raise MisconfigurationException(str(error)) from error
    except CheckpointError as error:
        raise MisconfigurationException(
            "What runs in `torch.utils.checkpoint.checkpoint` must compute the same each time it "
            "runs. Batch normalization does not, since it averages its statistics every time: "
            "leave it out of what is checkpointed, or use layer or group normalization."
        ) from error
    except RuntimeError as error:
        message = str(error)
        if "backward through the graph a second time" in message:
            raise MisconfigurationException(
                "The loss depends on something that was computed before its training step, from a "
                "hyperparameter (as in `on_after_batch_transfer`) or by `stop_gradient` in an "
                "earlier step. Compute it inside of `training_step`."
            ) from error
        if "modified by an inplace operation" in message:
            raise MisconfigurationException(
                "Something that a loss depends on was changed in place between its backward pass "
                "and the optimizer's step, as weights are by sharpness-aware minimization by hand, "
                "which cannot be followed. Let optimizers alone move weights."
            ) from error
        if _NO_HOOKS in message:
            raise MisconfigurationException(
                "`training_step` uses `torch.func` beside a network that something other than an "
                "optimizer moves, and torch cannot make such a step again. Use `RTHO`, without "
                "`curvature_fraction`."
            ) from error
        if "derivative for" not in message and "differentiable" not in message:
            raise
        raise MisconfigurationException(
            "Hypergradients need the second derivative of `training_step`, and an operation in it "
            f"has none: {message.rstrip('.')}. Write it with other operations, or with a "
            "differentiable backward pass."
        ) from error


def check_modules(trainer: Trainer, module: LightningModule) -> None:
    """Check the layers of the module.

    Args:
        trainer: The trainer.
        module: The module.

    Raises:
        MisconfigurationException: If a layer cannot be followed.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.EmbeddingBag):
            raise MisconfigurationException(
                f"`{name}` is an EmbeddingBag, which has no second derivative. Use `nn.Embedding` "
                "and sum over the bag."
            )
        if isinstance(layer, nn.Embedding):
            _check_embedding(trainer, name, layer)
            _warn_of_shared_padding(module, name, layer)
        if trainer.world_size > 1 and isinstance(layer, nn.SyncBatchNorm):
            raise MisconfigurationException(
                f"`{name}` normalizes over all processes, which has no second derivative. Use "
                "`Trainer(sync_batchnorm=False)`, or layer or group normalization."
            )
        averages = getattr(layer, "track_running_stats", False)
        if averages and not isinstance(layer, _BatchNorm):
            raise MisconfigurationException(
                f"`{name}` keeps running statistics, which are followed for batch normalization "
                f"alone. Use `{type(layer).__name__}(..., track_running_stats=False)`."
            )
        if isinstance(layer, _SpectralNorm) or any(
            isinstance(hook, SpectralNorm) for hook in layer._forward_pre_hooks.values()
        ):
            raise MisconfigurationException(
                f"`{name}` is normalized by its spectral norm, whose power iteration cannot be "
                "followed. Remove the normalization, or bound the weight in the loss."
            )


def _check_embedding(trainer: Trainer, name: str, layer: nn.Embedding) -> None:
    if layer.max_norm is not None:
        raise MisconfigurationException(
            f"`{name}` shortens its weights whenever it runs, which cannot be followed. Use "
            "`Embedding(..., max_norm=None)` and bound them in the loss."
        )
    if layer.scale_grad_by_freq:
        raise MisconfigurationException(
            f"`{name}` gives a gradient that is not that of the loss. Use "
            "`Embedding(..., scale_grad_by_freq=False)`."
        )
    if layer.sparse and trainer.world_size > 1:
        raise MisconfigurationException(
            f"`{name}` has sparse gradients, which are not followed over several processes. Use "
            "`Embedding(..., sparse=False)`, or `Trainer(devices=1)`."
        )


def _warn_of_shared_padding(module: nn.Module, name: str, layer: nn.Embedding) -> None:
    if layer.padding_idx is None:
        return
    owners = [o for o in module.modules() if layer.weight in {*o._parameters.values()}]
    if len(owners) > 1:
        rank_zero_warn(
            f"`{name}` shares its weight, and gives the row `padding_idx` no gradient by "
            "reading it: hypergradients take that for one that is zero. They are exact "
            "where what is read there has no part in a loss, as where it is masked."
        )


def warn_of_warmup(optimizers: Iterable[DifferentiableOptimizer]) -> None:
    """Warn of learning rates that are to be tuned while a schedule holds them down.

    Args:
        optimizers: The optimizers, before their first step.
    """
    if any(optimizer.is_held_down for optimizer in optimizers):
        rank_zero_warn(
            "A schedule holds the learning rate down at first, as a warmup does, so that a higher "
            "base seems good meanwhile. Set `start_step` to the end of the warmup."
        )


def check_optimizers(trainer: Trainer) -> None:
    """Check the optimizers that the module configured.

    Args:
        trainer: The trainer.

    Raises:
        MisconfigurationException: If one unscales gradients itself.
    """
    if gradient_scaler(trainer) is not None and any(
        getattr(optimizer, "_step_supports_amp_scaling", False) for optimizer in trainer.optimizers
    ):
        raise MisconfigurationException(
            "`fused=True` lets the optimizer free gradients of the loss scale out of sight, which "
            "cannot be followed. Use `fused=False` with `precision='16-mixed'`."
        )
