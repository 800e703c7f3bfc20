"""The outer objective of a Lightning module: a loss or a metric on batches of our own."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import starmap
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

from lightning_rtho.callbacks._batches import cloned
from lightning_rtho.callbacks._isolation import isolated
from lightning_rtho.callbacks._kernels import differentiable_kernels
from lightning_rtho.callbacks._loss_scale import loss_scale
from lightning_rtho.callbacks._metric import MetricObjective
from lightning_rtho.distributed import from_first_rank, to_first_rank
from lightning_rtho.hypergradient import OuterGradient
from lightning_rtho.linearization import RunningStatistics, silenceable_hooks
from lightning_rtho.outer import CyclingBatches, NoBatchError, NoGraphError, outer_gradient

__all__ = ["ValidationObjective", "check_outer_steps"]


def check_outer_steps(module: LightningModule, metric: MetricObjective | None) -> None:
    """Check that the module defines what the outer objective is made of.

    Args:
        module: The module.
        metric: The metric that is the objective; None for a loss of the module's own.

    Raises:
        MisconfigurationException: If it has no ``outer_step`` and, for a loss, no
            ``validation_step``, or, for a metric, no ``forward``.
    """
    if hasattr(module, "outer_step"):
        return
    if metric is not None and not is_overridden("forward", module):
        raise MisconfigurationException(
            f"`{type(module).__name__}` defines no `forward`: there are no predictions for "
            "`objective`. Define one that takes the inputs of a batch, or define "
            "`outer_step(batch, batch_idx)` that returns predictions and targets."
        )
    if metric is None and not is_overridden("validation_step", module):
        raise MisconfigurationException(
            f"`{type(module).__name__}` defines no `validation_step`: there is no outer objective "
            "to take the hypergradient of. Define one that returns the validation loss, or define "
            "`outer_step(batch, batch_idx)`."
        )


class ValidationObjective:
    """E_val, in eval mode, on the next batches: a loss averaged over them, or a metric of all.

    The loss is what ``outer_step`` or else ``validation_step`` returns. The predictions and targets
    of a metric are what ``outer_step`` returns, or else ``module(inputs)`` and the targets of a
    batch of both. Its value over several batches holds the graphs of all of them at once; processes
    average theirs.

    Args:
        trainer: The trainer, with its data set up.
        module: The module.
        dataloader: Where the batches come from; None takes the trainer's validation loader.
        batches: Number of batches in one evaluation.
        metric: The metric; None for a loss.

    Raises:
        MisconfigurationException: If there are no validation data.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        dataloader: Iterable[Any] | None,
        batches: int,
        metric: MetricObjective | None = None,
    ) -> None:
        self._trainer, self._module, self._metric = trainer, module, metric
        if metric is not None:
            metric.match(module)
        self._statistics = RunningStatistics(module)
        step = module.validation_step
        self._tells_loader = is_param_in_hook_signature(step, "dataloader_idx", explicit=True)
        if dataloader is None and trainer.limit_val_batches == 0:
            raise MisconfigurationException(
                "The outer objective needs validation data, but `Trainer(limit_val_batches=0)` "
                "turns them off. Give the callback `dataloader=...`, or leave some batches."
            )
        self._dataloader, self._batches = dataloader, batches
        self._seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)
        self._load()
        self._seen: list[Any] = []

    def _load(self) -> None:
        """Begin the stream of validation batches."""
        trainer = self._trainer
        # Making the trainer's loaders may be costly.
        asks = self._dataloader is None or self._tells_loader
        loaders = _validation_loaders(trainer) if asks else []
        source = _only(loaders) if self._dataloader is None else self._dataloader
        # What Lightning's own validation would tell the module of these batches.
        places = (i for i, loader in enumerate(loaders) if loader is source)
        self._dataloader_idx = next(places, 0)
        if isinstance(source, CombinedLoader):
            source = _Joint(source)
        self._loaded_epoch = trainer.current_epoch
        # Batches drawn before their time, and where the stream stood before them.
        self._ahead: tuple[dict[str, Any], list[Any]] | None = None
        seed = self._seed + self._loaded_epoch  # another order than that of data loaded before
        self._stream = CyclingBatches(source, seed, trainer.global_rank, trainer.world_size)

    def _reload_where_due(self) -> None:
        """Begin the stream anew where Lightning makes its validation loaders anew."""
        epochs: int = self._trainer.reload_dataloaders_every_n_epochs  # type: ignore[attr-defined]
        age = self._trainer.current_epoch - self._loaded_epoch
        if self._dataloader is None and 0 < epochs <= age:
            self._load()

    def __call__(
        self,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
        *,
        look: Callable[[Tensor], None] = lambda loss: None,
    ) -> OuterGradient:
        """Evaluate objective and derivatives on the batches that were taken last.

        The training run does not notice.

        Args:
            params: Weights, each ``[*P]``.
            hypers: Hyperparameters, natural values, each ``[*H]``.
            look: Called with each loss ``[]`` or metric, with its graph.

        Returns:
            Value and derivatives.

        Raises:
            MisconfigurationException: If the step returns no loss that depends on the weights.
        """
        # Whose buffers DDP lets all processes run with.
        are_first_ranks = getattr(self._trainer.strategy.model, "broadcast_buffers", False)
        with (
            isolated(self._trainer, self._module, RunningStage.VALIDATING),
            differentiable_kernels(self._module),
            silenceable_hooks(),
        ):
            if are_first_ranks:
                _take_from_first_rank([*self._module.buffers()])
            try:
                with self._statistics.differentiable() as statistics:
                    scale = loss_scale(self._trainer)
                    losses = [partial(_looked_at, look, loss) for loss in self._losses()]
                    outer = outer_gradient(losses, params, hypers, statistics, scale)
            except NoGraphError as error:
                raise MisconfigurationException(str(error)) from error
        if are_first_ranks:
            outer.statistics = to_first_rank(outer.statistics, like=self._statistics.buffers)
        return outer

    def advance(self) -> None:
        """Take the next batches.

        Raises:
            MisconfigurationException: If there is no validation batch.
        """
        self._reload_where_due()
        self._seen = self._next_batches()

    def look_ahead(self) -> None:
        """Take the batches that the next :meth:`advance` will take, too.

        Raises:
            MisconfigurationException: If there is no validation batch.
        """
        self._reload_where_due()
        before = self._stream.state_dict() if self._ahead is None else self._ahead[0]
        self._seen = self._next_batches()
        self._ahead = before, self._seen

    def _next_batches(self) -> list[Any]:
        """Take those looked ahead at, or draw from the stream."""
        if self._ahead is not None:
            (_, batches), self._ahead = self._ahead, None
            return batches
        with isolated(self._trainer, self._module, RunningStage.VALIDATING):
            try:
                return [next(self._stream) for _ in range(self._batches)]
            except NoBatchError as error:
                raise MisconfigurationException(str(error)) from error

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream of validation batches stands, and of when its data are."""
        stream = self._stream.state_dict() if self._ahead is None else self._ahead[0]
        return {**stream, "loaded_epoch": self._loaded_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the stream stood.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._loaded_epoch, self._ahead = state["loaded_epoch"], None
        with isolate_rng():
            self._stream.load_state_dict(state)

    def _losses(self) -> list[Callable[[], Tensor]]:
        """Return functions whose mean is the objective on the batches last seen."""
        numbered = [(batch, batch_idx) for batch_idx, batch in enumerate(self._seen)]
        if self._metric is None:
            return [partial(self._loss, *pair) for pair in numbered]
        return [partial(self._metric, starmap(self._predict, numbered))]

    def _on_device(self, batch: Any) -> Any:
        """Return a batch as Lightning hands it to a step."""
        # A copy, since a step may write to what may have to be seen again.
        batch = self._trainer.precision_plugin.convert_input(cloned(batch))
        # Private: the one way to call the hook where it is defined, on module or data module.
        number = self._dataloader_idx
        batch = self._module._on_before_batch_transfer(batch, dataloader_idx=number)
        return self._trainer.strategy.batch_to_device(batch, dataloader_idx=number)

    def _predict(self, batch: Any, batch_idx: int) -> tuple[Any, Any]:
        """Predictions and targets of one batch."""
        batch = self._on_device(batch)
        outer_step = getattr(self._module, "outer_step", None)
        with self._trainer.precision_plugin.val_step_context():
            if outer_step is not None:
                return _pair(outer_step(batch, batch_idx), "`outer_step` must return two things")
            inputs, target = _pair(batch, "a validation batch must hold two things")
            return self._module(inputs), target

    def _loss(self, batch: Any, batch_idx: int) -> Tensor:
        """Loss ``[]`` of one batch."""
        trainer, module = self._trainer, self._module
        batch = self._on_device(batch)
        outer_step = getattr(module, "outer_step", None)
        args = [batch]
        if outer_step is not None:
            args.append(batch_idx)
        else:
            if is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2):
                args.append(batch_idx)
            if self._tells_loader:
                args.append(self._dataloader_idx)
        # Not through DDP, which would wait for a backward pass and hand buffers round.
        with trainer.precision_plugin.val_step_context():
            output: Any = (outer_step or module.validation_step)(*args)
        step = "validation_step" if outer_step is None else "outer_step"
        loss = output.get("loss") if isinstance(output, dict) else output
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise MisconfigurationException(
                f"`{step}` must return the validation loss, a scalar tensor or a dict with the key "
                f"'loss', got {_describe(output)}. Add `return loss` to it."
            )
        return loss.reshape(())


def _looked_at(look: Callable[[Tensor], None], compute: Callable[[], Tensor]) -> Tensor:
    """Compute a loss and let someone look at it."""
    loss = compute()
    look(loss)
    return loss


def _take_from_first_rank(buffers: Sequence[Tensor]) -> None:
    for buffer, first in zip(buffers, from_first_rank(buffers), strict=True):
        buffer.copy_(first)


def _pair(found: Any, requirement: str) -> tuple[Any, Any]:
    """Check that something is a pair."""
    if not isinstance(found, (list, tuple)) or len(found) != 2:
        raise MisconfigurationException(
            f"For `objective`, {requirement}, got {_describe(found)}. Let "
            "`outer_step(batch, batch_idx)` return predictions and targets."
        )
    return found[0], found[1]


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of shape {tuple(output.shape)}"
    if isinstance(output, dict):
        return f"a dict with the keys {sorted(output)}"
    if isinstance(output, (list, tuple)):
        return f"{len(output)} items"
    return repr(output)


class _Joint:
    """Batches that several loaders make together, by an iterator of their own.

    Args:
        loader: The loader, which Lightning may be iterating, too.
    """

    def __init__(self, loader: CombinedLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch, *_ in copy.copy(self._loader):
            yield batch


def _validation_loaders(trainer: Trainer) -> list[Any]:
    """Return the loaders that the trainer validates on, as the user passed or returned them."""
    # Private: `trainer.val_dataloaders` is None until Lightning's first validation run, and setting
    # it up early would move the random state of a run whose loader hook draws from it.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    loaders: Any = None
    if source.instance is not None and source.is_defined() and trainer.limit_val_batches != 0:
        with isolate_rng():
            loaders = source.dataloader()
    # Private: a `CombinedLoader` says in no other way whether its loaders take turns.
    if isinstance(loaders, CombinedLoader) and loaders._mode == "sequential":
        loaders = loaders.flattened
    if isinstance(loaders, dict):
        return list(loaders.values())
    if isinstance(loaders, (list, tuple)):
        return list(loaders)
    return [] if loaders is None else [loaders]


def _only(loaders: Sequence[Any]) -> Iterable[Any]:
    """Return the one validation loader that there is."""
    if len(loaders) > 1:
        raise MisconfigurationException(
            f"`dataloader` must say which validation data the outer objective is taken on: "
            f"the trainer has {len(loaders)} validation loaders. Pass one of them to the "
            "callback as `dataloader=...`."
        )
    if not loaders:
        raise MisconfigurationException(
            "The outer objective needs validation data, got none. Pass `val_dataloaders` to "
            "`trainer.fit`, define `val_dataloader`, or give the callback `dataloader=...`."
        )
    found: Iterable[Any] = loaders[0]
    return found
