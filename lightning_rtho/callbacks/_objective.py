"""The outer objective of a Lightning module: its validation loss on batches of our own."""

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from lightning_rtho.callbacks._isolation import isolated
from lightning_rtho.callbacks._kernels import native_recurrent_kernels
from lightning_rtho.hypergradient import OuterGradient
from lightning_rtho.linearization import RunningStatistics
from lightning_rtho.outer import CyclingBatches, outer_gradient

__all__ = ["ValidationObjective", "check_validation_step"]


def check_validation_step(module: LightningModule) -> None:
    """Check that the module defines an outer objective.

    Args:
        module: The module.

    Raises:
        MisconfigurationException: If it has neither ``validation_step`` nor ``outer_step``.
    """
    if not (hasattr(module, "outer_step") or is_overridden("validation_step", module)):
        raise MisconfigurationException(
            f"`{type(module).__name__}` defines no `validation_step`: there is no outer objective "
            "to take the hypergradient of. Define one that returns the validation loss, or define "
            "`outer_step(batch, batch_idx)`."
        )


class ValidationObjective:
    """E_val: the loss that ``validation_step`` returns, in eval mode, on the next batches.

    Args:
        trainer: The trainer, with its data set up.
        module: The module.
        dataloader: Where the batches come from; None takes the trainer's validation loader.
        batches: Number of batches averaged over in one evaluation.

    Raises:
        MisconfigurationException: If there are no validation data.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        dataloader: Iterable[Any] | None,
        batches: int,
    ) -> None:
        self._trainer, self._module = trainer, module
        self._statistics = RunningStatistics(module)
        source = dataloader if dataloader is not None else _validation_loader(trainer)
        seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        self._stream = CyclingBatches(source, seed, trainer.global_rank, trainer.world_size)
        self._batches = batches
        self._seen: list[Any] = []

    def __call__(
        self,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
        *,
        peek: bool = False,
        again: bool = False,
    ) -> OuterGradient:
        """Evaluate the objective and its derivatives; the training run does not notice.

        Args:
            params: Weights, each ``[*P]``.
            hypers: Hyperparameters, natural values, each ``[*H]``.
            peek: Whether the next evaluation shall see the same batches.
            again: Whether this one shall see those of the last.

        Returns:
            Value and derivatives.

        Raises:
            MisconfigurationException: If there is no validation batch, or the step returns no loss
                that depends on the weights.
        """
        before = self._stream.state_dict()
        with (
            isolated(self._trainer, self._module, RunningStage.VALIDATING),
            native_recurrent_kernels(self._module),
        ):
            try:
                if not again:
                    self._seen = [next(self._stream) for _ in range(self._batches)]
                losses = [partial(self._loss, *pair) for pair in zip(self._seen, count())]
                with self._statistics.differentiable() as statistics:
                    outer = outer_gradient(losses, params, hypers, statistics)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from error
            if peek:
                self._stream.load_state_dict(before)
        return outer

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream of validation batches stands."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream stood.

        Args:
            state: What :meth:`state_dict` returned.
        """
        with isolate_rng():
            self._stream.load_state_dict(state)

    def _loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss ``[]`` of one batch."""
        trainer, module = self._trainer, self._module
        batch = trainer.precision_plugin.convert_input(batch)
        # Private: the one way to call the hook where it is defined, on module or data module.
        batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
        output: Any
        outer_step = getattr(module, "outer_step", None)
        if outer_step is not None:
            with trainer.precision_plugin.val_step_context():
                output = outer_step(batch, batch_idx)
            step = "outer_step"
        else:
            args = [batch]
            if is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2):
                args.append(batch_idx)
            output = trainer.strategy.validation_step(*args)
            step = "validation_step"
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"`{step}` must return the validation loss, a scalar tensor or a dict with the key "
                f"'loss', got {_describe(output)}. Add `return loss` to it."
            )
        return loss.reshape(())


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        return f"a dict with the keys {sorted(output)}"
    return repr(output)


def _validation_loader(trainer: Trainer) -> Iterable[Any]:
    """Return the loader that the trainer validates on, as the user passed or returned it."""
    # Private: `trainer.val_dataloaders` is None until Lightning's first validation run, and setting
    # it up early would move the random state of a run whose loader hook draws from it.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders: Any = None
    if source.instance is not None and source.is_defined() and trainer.limit_val_batches != 0:
        with isolate_rng():
            loaders = source.dataloader()
    if isinstance(loaders, CombinedLoader):
        loaders = loaders.flattened
    if isinstance(loaders, dict):
        loaders = list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        if len(loaders) > 1:
            raise MisconfigurationException(
                f"`dataloader` must say which validation data the outer objective is taken on: "
                f"the trainer has {len(loaders)} validation loaders. Pass one of them to the "
                "callback as `dataloader=...`."
            )
        loaders = loaders[0] if loaders else None
    if loaders is None:
        raise MisconfigurationException(
            "The outer objective needs validation data, got none. Pass `val_dataloaders` to "
            "`trainer.fit`, define `val_dataloader`, or give the callback `dataloader=...`."
        )
    found: Iterable[Any] = loaders
    return found
