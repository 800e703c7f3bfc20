"""The callback: when to record, to advance, to update. What is done then lies below."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_rtho.callbacks._checks import check_optimizers, check_schedulers, check_settings
from lightning_rtho.callbacks._objective import ValidationObjective, check_validation_step
from lightning_rtho.callbacks._replay import TrainingStepReplay
from lightning_rtho.callbacks._selection import Selection, select_hyperparameters
from lightning_rtho.hypergradient import (
    AbstractHypergradient,
    GradientMismatchError,
    OptimizerStep,
    OuterGradient,
)
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.linearization import (
    ClipByNorm,
    ClipByValue,
    GradientClip,
    RunningStatistics,
    TracedLoss,
)
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import HyperparameterDescent, OuterOptimizerCallable

__all__ = ["HypergradientCallback", "OuterUpdate"]


@dataclass(frozen=True)
class OuterUpdate:
    """One outer update: what was measured, and the values that training goes on with.

    Attributes:
        step: Optimizer steps made so far.
        values: Natural values after the update, by name, each ``[*H]``.
        hypergradients: dE/dlambda with respect to natural values, by name, each ``[*H]``.
        outer_objective: Outer objective before the update.
    """

    step: int
    values: dict[str, Tensor]
    hypergradients: dict[str, Tensor]
    outer_objective: float


class HypergradientCallback(Callback):
    """What `RTHO` and `TRHO` share: following a fit and moving hyperparameters along it."""

    def __init__(
        self,
        hyperparameters: Selection,
        *,
        hyper_batch_size: int,
        outer_optimizer: OuterOptimizerCallable | None,
        dataloader: Iterable[Any] | None,
        outer_batches: int,
        start_step: int,
        stop_step: int | None,
    ) -> None:
        _check_count("hyper_batch_size", hyper_batch_size, 1, "optimizer steps between updates")
        _check_count("outer_batches", outer_batches, 1, "validation batches in one evaluation")
        _check_count("start_step", start_step, 0, "optimizer steps before the first followed one")
        if stop_step is not None:
            _check_count("stop_step", stop_step, start_step + 1, "optimizer steps until the last")
        if isinstance(hyperparameters, str):
            raise TypeError(
                f"`hyperparameters` must be a list of names or a dict of domains, got "
                f"{hyperparameters!r}. Pass [{hyperparameters!r}]."
            )
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                "`outer_optimizer` must be a function from a list of raw tensors to a torch "
                f"optimizer, or None, got {outer_optimizer!r}. Pass for example "
                "`lambda raw: torch.optim.Adam(raw, lr=0.1)`."
            )
        self.hyper_batch_size = hyper_batch_size
        self.start_step = start_step
        self.stop_step = stop_step
        self.schedule: list[OuterUpdate] = []
        self._selection = hyperparameters
        self._outer_optimizer = outer_optimizer
        self._dataloader = dataloader
        self._outer_batches = outer_batches
        self._tuned: dict[str, Hyperparameter] = {}
        self._run: _Run | None = None
        self._warnings = WarningCache()

    @abstractmethod
    def _make_hypergradient(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> AbstractHypergradient:
        """Make the method that follows the run."""

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Present natural values by name, each ``[*H]``; empty before ``fit``."""
        return {name: hyper.plain.clone() for name, hyper in self._tuned.items()}

    @property
    def hypergradients(self) -> dict[str, Tensor]:
        """Last dE/dlambda with respect to natural values, by name, each ``[*H]``."""
        return dict(self.schedule[-1].hypergradients) if self.schedule else {}

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that cannot be followed."""
        if stage == "fit":
            check_settings(trainer, pl_module)
            check_validation_step(pl_module)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the hyperparameters and put the differentiable optimizer in place."""
        check_optimizers(trainer)
        inner = trainer.optimizers[0]
        self._tuned = select_hyperparameters(self._selection, pl_module, inner)
        optimizer = DifferentiableOptimizer(inner)
        trainer.optimizers = [optimizer]
        check_schedulers(trainer, optimizer)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the run; evaluate the outer objective once, so that errors come now."""
        optimizer = _differentiable(trainer)
        optimizer.write_hyperparameters()
        self.schedule = []
        self._run = _Run(self, trainer, pl_module, optimizer)
        self._run.measure(peek=True)

    # During training

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take down what the coming training step depends on."""
        if self._run is not None:
            self._run.before_batch(batch, batch_idx)

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Linearize the loss; where that gives the gradient, backward needs not compute it."""
        if self._run is not None:
            self._run.before_backward(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give backward back to the module."""
        if self._run is not None:
            self._run.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take down the gradients before they are clipped."""
        if self._run is not None:
            self._run.before_clipping()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Update the hyperparameters where a hyper-batch ends."""
        if self._run is None:
            return
        try:
            update_is_due = self._run.end_batch()
            measured = self._run.measure() if update_is_due else None
        except GradientMismatchError as error:
            raise MisconfigurationException(
                f"{error} Something between backward and the optimizer's step changes gradients, "
                "or `training_step` does not compute the same loss twice. Clip by "
                "`Trainer(gradient_clip_val=...)` and scale the loss rather than its gradient."
            ) from error
        if measured is not None:
            self._update(trainer, *measured)
        self._show(trainer, pl_module)

    def _update(self, trainer: Trainer, outer: OuterGradient, hypergradient: Tensor | None) -> None:
        """Move the hyperparameters and write down what was done."""
        assert self._run is not None
        assert hypergradient is not None
        if not (bool(hypergradient.isfinite().all()) and bool(outer.value.isfinite())):
            self._run.method.reset()
            self._warnings.warn(
                f"{type(self).__name__}: outer objective or hypergradient is not finite at step "
                f"{trainer.global_step}. The hyperparameters keep their values, the weights "
                "theirs; this is said once."
            )
            return
        if self._run.descent is not None:
            self._run.descent.step(hypergradient)
            self._run.optimizer.write_hyperparameters()
        parts = hypergradient.split([hyper.numel() for hyper in self._tuned.values()])
        self.schedule.append(
            OuterUpdate(
                step=trainer.global_step,
                values=self.hyperparameters,
                hypergradients={
                    name: part.reshape(hyper.shape)
                    for (name, hyper), part in zip(self._tuned.items(), parts, strict=True)
                },
                outer_objective=outer.value.item(),
            )
        )
        for logger in trainer.loggers:
            logger.log_metrics(_metrics(self.schedule[-1]), step=trainer.global_step)

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hyperparameters on the progress bar and among the callback metrics."""
        if not self.schedule or trainer.barebones:
            return
        for name, value in _metrics(self.schedule[-1]).items():
            on_bar = name.startswith("hyperparameter/")
            # The loggers have had it at its own step; `log` would wait for `log_every_n_steps`.
            pl_module.log(name, value, prog_bar=on_bar, logger=False, on_step=True, on_epoch=False)

    # After training

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing behind."""
        self._end(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind."""
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._run is not None:
            self._run.end()
            self._run = None
        trainer.optimizers = [
            o.optimizer if isinstance(o, DifferentiableOptimizer) else o for o in trainer.optimizers
        ]


class _Run:
    """One fit: the objects that follow it and where it stands."""

    def __init__(
        self,
        callback: HypergradientCallback,
        trainer: Trainer,
        module: LightningModule,
        optimizer: DifferentiableOptimizer,
    ) -> None:
        self.trainer, self.module, self.optimizer = trainer, module, optimizer
        self.callback = callback
        self.tuned = callback._tuned
        hypers = list(self.tuned.values())
        for hyper in hypers:
            hyper.requires_grad_(False)
            if hyper.dim() > 0:
                hyper.data = hyper.data.to(module.device)
        offsets = [0]
        for hyper in hypers:
            offsets.append(offsets[-1] + hyper.numel())
        self.columns = {id(hyper): offset for hyper, offset in zip(hypers, offsets, strict=False)}
        self.method = callback._make_hypergradient(optimizer.params, hypers)
        self.objective = ValidationObjective(
            trainer, module, callback._dataloader, callback._outer_batches
        )
        self.statistics = RunningStatistics(module)
        make_optimizer = callback._outer_optimizer
        self.descent = make_optimizer and HyperparameterDescent(hypers, make_optimizer)
        acting = {id(hyper) for hyper in optimizer.hyperparameters}
        self.unseen = {name: hyper for name, hyper in self.tuned.items() if id(hyper) not in acting}
        self.clip = _clip(trainer)
        self.raw_grads: dict[Tensor, Tensor] = {}
        self.replay: TrainingStepReplay | None = None
        self.followed_steps = 0
        self.stepped = False
        optimizer.before_update = self.before_update

    @property
    def following(self) -> bool:
        """Whether the step that is being made is followed."""
        start, stop = self.callback.start_step, self.callback.stop_step
        return self.trainer.global_step >= start and (
            stop is None or self.trainer.global_step < stop
        )

    def before_batch(self, batch: Any, batch_idx: int) -> None:
        self.replay = None
        for hyper in self.tuned.values():
            hyper.requires_grad_(self.following)
        if self.following:
            self.method.start()
            self.replay = TrainingStepReplay(
                self.trainer, self.module, batch, batch_idx, self.statistics
            )
            self.statistics.start()

    def before_backward(self, loss: Tensor) -> None:
        if self.replay is None:
            return
        self.replay.keep_changed_buffers()
        self._look_for_unseen(loss)
        traced = TracedLoss(loss, self.statistics.collect())
        gradients = self.method.record(traced, self.replay)
        if gradients is not None:
            pairs = [
                (p, g) for p, g in zip(self.method.params, gradients, strict=True) if g is not None
            ]
            self.module.backward = partial(_accumulate, pairs)  # type: ignore[method-assign]

    def _look_for_unseen(self, loss: Tensor) -> None:
        """Strike off the hyperparameters on which the loss depends."""
        if self.unseen and loss.requires_grad:
            found = torch.autograd.grad(
                loss, list(self.unseen.values()), retain_graph=True, allow_unused=True
            )
            self.unseen = {
                name: hyper
                for (name, hyper), gradient in zip(self.unseen.items(), found, strict=True)
                if gradient is None
            }

    def after_backward(self) -> None:
        vars(self.module).pop("backward", None)
        for hyper in self.tuned.values():
            hyper.grad = None

    def before_clipping(self) -> None:
        if self.replay is not None and self.clip is not None:
            self.raw_grads = {
                p: p.grad.detach().clone() for p in self.method.params if p.grad is not None
            }

    def before_update(self) -> None:
        if self.replay is None:
            return
        if self.unseen:
            name = next(iter(self.unseen))
            raise MisconfigurationException(
                f"`{name}` is declared as a hyperparameter but used nowhere: neither the optimizer "
                "nor the loss of the first training step depends on it. Use it there, or name the "
                f"hyperparameters to tune, as in `{type(self.callback).__name__}(['lr'])`."
            )
        transitions = self.optimizer.transitions(self.columns)
        params = self.method.params
        raw = [self.raw_grads.get(params[t.index], t.grad) for t in transitions]
        self.method.advance(OptimizerStep(transitions, raw, self.clip))
        self.optimizer.carry_derivative_buffers(transitions)
        self.followed_steps += 1
        self.stepped = True

    def end_batch(self) -> bool:
        """Return whether a hyper-batch has just ended."""
        stepped, self.stepped = self.stepped, False
        return stepped and self.followed_steps % self.callback.hyper_batch_size == 0

    def measure(self, *, peek: bool = False) -> tuple[OuterGradient, Tensor | None]:
        """Evaluate the outer objective and, unless only peeking, the hypergradient."""
        outer = self.objective(self.method.params, self.method.hypers, peek=peek)
        return outer, None if peek else self.method.hypergradient(outer)

    def end(self) -> None:
        """Let go of the run."""
        self.after_backward()
        self.statistics.collect()
        self.method.reset()
        self.optimizer.before_update = None
        for hyper in self.tuned.values():
            hyper.requires_grad_(False)


def _accumulate(
    pairs: Sequence[tuple[Tensor, Tensor]], loss: Tensor, *args: Any, **kwargs: Any
) -> None:
    """Stand in for ``LightningModule.backward`` where the gradients are known already."""
    if pairs:
        params, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(params, gradients)


def _differentiable(trainer: Trainer) -> DifferentiableOptimizer:
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, DifferentiableOptimizer)
    return optimizer


def _clip(trainer: Trainer) -> GradientClip | None:
    """Return the clipping that the trainer was set to."""
    limit = trainer.gradient_clip_val
    if not limit:
        return None
    return ClipByValue(limit) if trainer.gradient_clip_algorithm == "value" else ClipByNorm(limit)


def _metrics(update: OuterUpdate) -> dict[str, float]:
    """Return the scalars of an update; of a hyperparameter with a shape its mean."""
    metrics = {"outer_objective": update.outer_objective}
    for kind, values in (
        ("hyperparameter", update.values),
        ("hypergradient", update.hypergradients),
    ):
        metrics |= {f"{kind}/{name}": value.mean().item() for name, value in values.items()}
    return metrics


def _check_count(argument: str, value: int, least: int, meaning: str) -> None:
    """Check an integer argument."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{argument}` must be an integer of at least {least}, got {value!r}. It counts "
            f"{meaning}."
        )
