"""The callback: when to record, to advance, to update. What is done then lies below."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_rtho.callbacks._bar import ReadableBar
from lightning_rtho.callbacks._checks import (
    check_materialized,
    check_modules,
    check_optimizers,
    check_settings,
    note_what_helps,
    refusals_explained,
    warn_of_warmup,
)
from lightning_rtho.callbacks._company import forget_what_is_given_up, let_wait
from lightning_rtho.callbacks._coupling import decoupled_coordinates, learning_rates
from lightning_rtho.callbacks._curvature import CurvatureSample
from lightning_rtho.callbacks._diagnostics import Diagnostic, Diagnostics
from lightning_rtho.callbacks._loss_scale import gradient_scaler
from lightning_rtho.callbacks._metric import MetricObjective
from lightning_rtho.callbacks._metrics import log_metrics, metrics_of, show_metrics
from lightning_rtho.callbacks._objective import ValidationObjective, check_outer_steps
from lightning_rtho.callbacks._outer_loop import Outcome, OuterLoop
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from lightning_rtho.callbacks._run import FollowedRun, schedulers_of
from lightning_rtho.callbacks._safeguard import Safeguard
from lightning_rtho.callbacks._selection import Selection, select_hyperparameters, warn_of_vanished
from lightning_rtho.callbacks._signals import signals_deferred
from lightning_rtho.callbacks._summary import Plan, summary_of
from lightning_rtho.hypergradient import AbstractHypergradient
from lightning_rtho.hyperparameters import Hyperparameter, declared_hyperparameters
from lightning_rtho.optim import DifferentiableOptimizer, adopt_settings
from lightning_rtho.outer import (
    HyperparameterDescent,
    OuterOptimizerCallable,
    Ramp,
    adam,
)
from lightning_rtho.schedule import OuterUpdate, Schedule

__all__ = ["HypergradientCallback"]


class HypergradientCallback(Callback):
    """What `RTHO` and `TRHO` share: following a fit and moving hyperparameters along it."""

    _known_diagnostics: ClassVar[tuple[Diagnostic, ...]]

    def __init__(
        self,
        hyperparameters: Selection,
        *,
        hyper_batch_size: int,
        outer_optimizer: OuterOptimizerCallable | None,
        dataloader: Iterable[Any] | None,
        outer_batches: int,
        objective: Metric | None,
        curvature_fraction: float,
        start_step: int,
        stop_step: int | None,
        safeguard: bool,
        summary: bool,
        diagnostics: Sequence[Diagnostic],
    ) -> None:
        _check_count("hyper_batch_size", hyper_batch_size, 1, "optimizer steps between updates")
        _check_count("outer_batches", outer_batches, 1, "validation batches in one evaluation")
        _check_count("start_step", start_step, 0, "optimizer steps before the first followed one")
        if stop_step is not None:
            _check_count("stop_step", stop_step, start_step + 1, "optimizer steps until the last")
        if not 0 < curvature_fraction <= 1:
            raise ValueError(
                f"`curvature_fraction` must lie in (0, 1], got {curvature_fraction}. It is the "
                "share of a batch's examples that Hessian products are taken on; 1 is exact."
            )
        is_ordered = isinstance(hyperparameters, Sequence | Mapping | None)
        if isinstance(hyperparameters, str) or not is_ordered:
            raise TypeError(
                f"`hyperparameters` must be a list of names or a dict of domains, got "
                f"{hyperparameters!r}. Pass a list, as in `['lr']`."
            )
        if outer_optimizer is not None and not callable(outer_optimizer):
            raise TypeError(
                "`outer_optimizer` must be a function from a list of raw tensors to a torch "
                f"optimizer, or None, got {outer_optimizer!r}. Pass for example "
                "`lambda raw: torch.optim.Adam(raw, lr=0.1)`."
            )
        self.hyper_batch_size = hyper_batch_size
        self.curvature_fraction = curvature_fraction
        self.start_step = start_step
        self.stop_step = stop_step
        self.safeguard = safeguard
        self.summary = summary
        self._diagnostics = Diagnostics(diagnostics, self._known_diagnostics, type(self).__name__)
        self.schedule = Schedule()
        self._selection = hyperparameters
        self._outer_optimizer = outer_optimizer
        self._dataloader = dataloader
        self._outer_batches = outer_batches
        self._metric = None if objective is None else MetricObjective(objective)
        self._tuned: dict[str, Hyperparameter] = {}
        self._declared: frozenset[str] = frozenset()
        self._loop: OuterLoop | None = None
        self._bar: ReadableBar | None = None
        self._resumed: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None

    @abstractmethod
    def _make_hypergradient(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> AbstractHypergradient:
        """Make the method that follows the run."""

    @abstractmethod
    def _plans(self, trainer: Trainer, entries: int) -> tuple[Plan, Plan | None]:
        """Return what this method costs for so many hyperparameter entries, and what the other."""

    @property
    def hyperparameters(self) -> dict[str, Tensor]:
        """Present natural values by name, each ``[*H]``; empty before ``fit``."""
        return {name: hyper.plain.clone() for name, hyper in self._tuned.items()}

    @property
    def hypergradients(self) -> dict[str, Tensor]:
        """Last dE/dlambda with respect to natural values, by name, each ``[*H]``."""
        return dict(self.schedule[-1].hypergradients) if self.schedule else {}

    @property
    def _sign(self) -> int:
        """What turns the minimized E into what is written down: -1 for a metric M = -E, else 1."""
        return 1 if self._metric is None else self._metric.sign

    @property
    def _can_go_back(self) -> bool:
        """Whether a run that is lost goes back to a state that is kept."""
        return self.safeguard and self._sign > 0

    def _follows(self, trainer: Trainer) -> bool:
        """Tell whether the coming step is followed."""
        last = math.inf if self.stop_step is None else self.stop_step
        # Private: averages of weights have their batch statistics computed in an epoch of its own.
        trains = not trainer.fit_loop._skip_backward
        return trains and self.start_step <= trainer.global_step < last

    def _updates(self, trainer: Trainer) -> float:
        """Return how many outer updates are left if the run is not ended early; else 0."""
        last = _last_step(trainer)
        if self.stop_step is not None:
            last = min(last, self.stop_step)
        if math.isinf(last):
            return 0
        return max(last - max(self.start_step, trainer.global_step), 0) / self.hyper_batch_size

    # Before training

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that cannot be followed."""
        if stage == "fit":
            self._forget()
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            if sum(isinstance(other, HypergradientCallback) for other in callbacks) > 1:
                raise MisconfigurationException(
                    "`callbacks` must hold one hypergradient callback, got several. Let one of "
                    "them tune all hyperparameters."
                )
            check_settings(trainer, pl_module)
            if self.curvature_fraction < 1 and not pl_module.automatic_optimization:
                raise MisconfigurationException(
                    "`curvature_fraction` must be 1 with manual optimization, got "
                    f"{self.curvature_fraction}: it runs training steps again, which would make "
                    "their updates again."
                )
            check_outer_steps(pl_module, self._metric)
            self._declared = frozenset(declared_hyperparameters(pl_module))

    def _forget(self) -> None:
        """Begin without what an earlier fit has left; Lightning then loads what it resumes from."""
        self.schedule = Schedule()
        self._resumed = self._ended = self._random_state = None

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the hyperparameters and put the differentiable optimizer in place."""
        check_modules(trainer, pl_module)
        check_optimizers(trainer)
        self._tuned = select_hyperparameters(self._selection, pl_module, trainer.optimizers)
        if self._selection is None:  # so that all that are declared by now are tuned
            warn_of_vanished(self._declared - self._tuned.keys())
        if self._resumed is not None:
            self._take_back_values(self._resumed)
            self._take_back_random_state(trainer, self._resumed)
        trainer.optimizers = [
            DifferentiableOptimizer(inner, schedulers_of(trainer, inner), [*self._tuned.values()])
            for inner in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the run; evaluate the outer objective once, so that errors come now."""
        check_materialized(pl_module)
        optimizers = _differentiable(trainer)
        if self._resumed is None:  # a checkpoint of a run without us may have set others
            adopt_settings(optimizers)
        for optimizer in optimizers:
            optimizer.write_hyperparameters()
        self.schedule = Schedule(
            start=self.hyperparameters,
            domains={name: repr(hyper.domain) for name, hyper in self._tuned.items()},
        )
        self._loop, self._ended = self._make_loop(trainer, pl_module, optimizers), None
        if self._resumed is not None:
            self.schedule = Schedule.from_state_dict(self._resumed["schedule"])
            if "run" in self._resumed:
                self._loop.load_state_dict(self._resumed["run"])
        elif self._loop.descent is not None and trainer.global_step == self.start_step == 0:
            warn_of_warmup(optimizers)
        self._resumed = None
        with signals_deferred():
            self._loop.try_objective()
        if self.summary:
            self._print_summary(trainer, pl_module)
        if self.schedule:  # of the run that is resumed
            show_metrics(trainer, metrics_of(self.schedule[-1]))
        self._bar = ReadableBar(trainer.progress_bar_callback, prefix="hyperparameter/")
        self._diagnostics.start(trainer)
        self._loop.run.begin(partial(self._follows, trainer))

    def _make_loop(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizers: Sequence[DifferentiableOptimizer],
    ) -> OuterLoop:
        """Make what follows the run and moves the hyperparameters."""
        objective = ValidationObjective(
            trainer, module, self._dataloader, self._outer_batches, self._metric
        )
        sample = None
        if self.curvature_fraction < 1:
            sample = CurvatureSample(self.curvature_fraction, trainer.global_rank)
        run = FollowedRun(
            trainer, module, optimizers, self._tuned, self._make_hypergradient, sample
        )
        hypers = list(self._tuned.values())
        descent = safeguard = None
        if self._outer_optimizer is not None:
            # Of a checkpoint without the run nobody knows where its climb stood.
            is_known = self._resumed is None or "run" in self._resumed
            can_climb = is_known and self._can_go_back and not run.method.keeps_history
            descent = HyperparameterDescent(
                hypers,
                self._outer_optimizer,
                decoupled_coordinates(hypers, optimizers),
                learning_rates(hypers, optimizers) if self._outer_optimizer is adam else (),
                Ramp(self._updates(trainer) if can_climb else 0),
            )
        if descent is not None and self.safeguard:
            safeguard = Safeguard(
                module,
                run.method,
                optimizers,
                hypers,
                descent,
                judges_objective=self._can_go_back,
            )
        look = partial(self._diagnose, trainer, run)
        return OuterLoop(
            run, objective, self._tuned, self.hyper_batch_size, descent, safeguard, look
        )

    def _print_summary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print what is tuned, how, and what it will cost."""
        plan, other = self._plans(trainer, sum(hyper.numel() for hyper in self._tuned.values()))
        text = summary_of(
            self._tuned,
            _differentiable(trainer),
            plan,
            evaluations=self._outer_batches / self.hyper_batch_size,
            keeps_best=self._outer_optimizer is not None and self._can_go_back,
            other=other if pl_module.automatic_optimization else None,
        )
        rank_zero_info(f"\n{text}")

    # During training

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take down what the coming training step depends on."""
        if self._random_state is not None:
            if batch_idx > 0:  # resumed within an epoch, whose beginning drew anew
                write_random_state(self._random_state)
            self._random_state = None
        if self._loop is not None:
            follow = self._follows(trainer)
            if follow:
                with signals_deferred():
                    self._loop.begin()
            self._loop.run.before_batch(batch_idx, follow=follow)

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Begin a new gradient; a step that was prepared and not made has been skipped."""
        if self._loop is None:
            return
        with refusals_explained():
            skipped = self._loop.run.take_back_skipped_step()
        if skipped == 1:
            has_scaler = gradient_scaler(trainer) is not None
            why = ", since its scaled gradient overflowed" if has_scaler else ""
            rank_zero_warn(
                f"{type(self).__name__}: step {trainer.global_step} was skipped{why}. "
                "Hypergradients skip it too; this is said once."
            )

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Linearize the loss; where that gives the gradient, backward need not compute it."""
        if self._loop is not None:
            with refusals_explained():
                self._loop.run.before_backward(loss)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give backward back to the module."""
        if self._loop is not None:
            self._loop.run.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take down how gradients will be clipped."""
        if self._loop is not None:
            self._loop.run.before_clipping()

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
        if self._loop is None:
            return
        self._loop.run.after_batch()
        known = self._loop.nonfinite_steps
        with signals_deferred():
            outcome = self._loop.after_batch(trainer.global_step)
            if outcome is not None:
                self._write_down(trainer, pl_module, self._loop, outcome)
        if self._loop.nonfinite_steps > known:
            log_metrics(trainer, {"nonfinite_steps": self._loop.nonfinite_steps})
        if self._loop.is_climbing:
            let_wait(trainer)
        self._loop.run.await_batch()

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End what lasts as long as a step, where ``on_train_batch_start`` has ended the epoch."""
        if self._loop is not None:
            self._loop.run.await_batch()

    def _write_down(
        self, trainer: Trainer, module: LightningModule, loop: OuterLoop, outcome: Outcome
    ) -> None:
        """Hand the new values to the optimizers; write the update down and log it."""
        if loop.descent is not None:
            for optimizer in _differentiable(trainer):
                optimizer.write_hyperparameters()
        if outcome.action == "restored":
            forget_what_is_given_up(trainer, module)
        update = OuterUpdate(
            step=trainer.global_step,
            values={name: value.cpu() for name, value in self.hyperparameters.items()},
            hypergradients=self._natural(outcome.hypergradient),
            outer_objective=self._sign * outcome.objective,
            sensitivity=outcome.sensitivity,
            safeguard=outcome.action,
            restored_step=outcome.restored_step,
        )
        self.schedule.append(update)
        metrics = metrics_of(update)
        show_metrics(trainer, metrics)
        if outcome.action is not None:
            metrics[f"safeguard/{outcome.action}"] = outcome.times
        log_metrics(trainer, metrics)

    def _natural(self, hypergradient: Tensor) -> dict[str, Tensor]:
        """Turn dE/dlambda ``[m]`` into what is written down, by name, each ``[*H]``."""
        parts = (self._sign * hypergradient).split([h.numel() for h in self._tuned.values()])
        return {
            name: part.reshape(hyper.shape)
            for (name, hyper), part in zip(self._tuned.items(), parts, strict=True)
        }

    def _diagnose(self, trainer: Trainer, run: FollowedRun, hypergradient: Tensor) -> None:
        """Log what else is asked for of an update, before anything is moved or forgotten."""
        if not self._diagnostics:
            return
        tangents = dict(zip(run.parameter_names, run.method.weight_tangents(), strict=True))
        hypergradients = self._natural(hypergradient)
        scalars = self._diagnostics.scalars(hypergradients, self.hypergradients, tangents)
        log_metrics(trainer, scalars)
        self._diagnostics.write_histograms(trainer, hypergradients, tangents)

    # Checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run goes on from, in tensors, numbers, lists and dicts."""
        state: dict[str, Any] = {
            "hyperparameters": self.hyperparameters,
            "schedule": self.schedule.state_dict(),
        }
        run = self._ended if self._loop is None else _state_of(self._loop)
        if run is not None:
            state["run"] = run
        # On the host, where there is room for a copy.
        copied: dict[str, Any] = apply_to_collection(
            state, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True)
        )
        return copied

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there are optimizers to apply it to.

        That of a run that had not begun, as `LearningRateFinder` writes and reads it, says nothing.
        """
        has_begun = "run" in state_dict or state_dict["schedule"]["start"]
        self._resumed = state_dict if has_begun else None

    def _take_back_values(self, state: dict[str, Any]) -> None:
        """Give the hyperparameters the values that they had."""
        saved, tuned = state["hyperparameters"], self._tuned
        if saved and saved.keys() != tuned.keys():
            raise MisconfigurationException(
                f"The checkpoint was written with the hyperparameters {sorted(saved)}, but the "
                f"callback tunes {sorted(tuned)}. Resume with the same, or without `ckpt_path`."
            )
        for name, value in saved.items():
            tuned[name].assign(value)
        if saved:  # in whose order everything else was written
            self._tuned = {name: tuned[name] for name in saved}

    def _take_back_random_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Go on with the random numbers; a checkpoint holds those of one process.

        Lightning does not, so one who only observes does not either.
        """
        moves = self._outer_optimizer is not None
        if moves and "run" in state and trainer.world_size == 1:
            self._random_state = state["run"]["random"]
            write_random_state(self._random_state)

    # After training

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing behind but what a checkpoint of where the run stood needs."""
        note_what_helps(exception)
        self._end(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind but what a checkpoint of the end needs."""
        is_dry = bool(getattr(trainer, "fast_dev_run", False))
        if self._loop is not None and not self.schedule and not is_dry:
            steps, advice = self._loop.run.steps, ""
            if steps:
                advice = f" Lower `hyper_batch_size`, which is {self.hyper_batch_size}."
            elif self.start_step:
                advice = f" Lower `start_step`, which is {self.start_step}, or train for longer."
            rank_zero_warn(
                f"{type(self).__name__} made no update in {steps} followed steps.{advice}"
            )
        if self._loop is not None and self._loop.is_climbing:
            rank_zero_warn(
                f"The run has ended at step {trainer.global_step}, in its range test: its weights "
                "are those of rates that were tried. Train for longer, let nothing end the run "
                "before (`EarlyStopping(check_finite=False)`), or pass `safeguard=False`."
            )
        self._end(trainer)

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End a fit that made no step, since the run that it goes on with had been ended."""
        if self._resumed is not None:
            self.schedule = Schedule.from_state_dict(self._resumed["schedule"])
            self._ended, self._resumed = self._resumed.get("run"), None
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._loop is not None:
            # Checkpoints that are written at the end of a run, or on an exception, come after this.
            self._ended = _on_host(self._loop)
            self._loop.run.end()
        if self._bar is not None:
            self._bar.end()
        self._loop = self._bar = None
        trainer.optimizers = [
            o.optimizer if isinstance(o, DifferentiableOptimizer) else o for o in trainer.optimizers
        ]


def _last_step(trainer: Trainer) -> float:
    """Return where a run ends if not earlier; -1 where the loader's length is not known."""
    last = trainer.estimated_stepping_batches
    batches, epochs = trainer.num_training_batches, trainer.max_epochs or 0
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:  # Lightning counts on as many micro-batches as now
        if isinstance(callback, GradientAccumulationScheduler) and math.isfinite(batches):
            steps = [
                math.ceil(batches / callback.get_accumulate_grad_batches(epoch))
                for epoch in range(epochs)
            ]
            last = min(last, sum(steps)) if steps else last
    return last


def _differentiable(trainer: Trainer) -> list[DifferentiableOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, DifferentiableOptimizer)]


def _state_of(loop: OuterLoop) -> dict[str, Any] | None:
    """Return where a run stands, uncopied; None in the midst of a step."""
    state = loop.state_dict()
    return None if state is None else {**state, "random": read_random_state()}


def _on_host(loop: OuterLoop) -> dict[str, Any] | None:
    """Return where a run stands, on the host; None if that cannot be had any more."""
    try:
        state: dict[str, Any] | None = apply_to_collection(
            _state_of(loop), Tensor, lambda tensor: tensor.detach().cpu()
        )
    except Exception:  # whatever has ended the run, as a device that has failed
        return None
    return state


def _check_count(argument: str, value: int, least: int, meaning: str) -> None:
    """Check an integer argument."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{argument}` must be an integer of at least {least}, got {value!r}. It counts "
            f"{meaning}."
        )
