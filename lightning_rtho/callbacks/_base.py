"""The callback: when to record, to advance, to update. What is done then lies below."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import Metric
from typing_extensions import override

from lightning_rtho.callbacks._bar import ReadableBar
from lightning_rtho.callbacks._checks import (
    check_modules,
    check_optimizers,
    check_settings,
    refusals_explained,
)
from lightning_rtho.callbacks._company import forget_what_is_given_up, let_wait
from lightning_rtho.callbacks._coupling import decoupled_coordinates, learning_rates
from lightning_rtho.callbacks._curvature import CurvatureSample
from lightning_rtho.callbacks._diagnostics import Diagnostic, Diagnostics
from lightning_rtho.callbacks._metric import MetricObjective
from lightning_rtho.callbacks._objective import ValidationObjective, check_outer_steps
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from lightning_rtho.callbacks._run import FollowedRun, schedulers_of
from lightning_rtho.callbacks._safeguard import Safeguard
from lightning_rtho.callbacks._selection import Selection, select_hyperparameters
from lightning_rtho.callbacks._summary import Plan, summary_of
from lightning_rtho.hypergradient import AbstractHypergradient, Fault
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import (
    HyperparameterDescent,
    OuterOptimizerCallable,
    Ramp,
    adam,
    relative_slopes,
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
        self._run: FollowedRun | None = None
        self._objective: ValidationObjective | None = None
        self._descent: HyperparameterDescent | None = None
        self._sample: CurvatureSample | None = None
        self._safeguard: Safeguard | None = None
        self._bar: ReadableBar | None = None
        self._next_update = hyper_batch_size
        self._resumed: dict[str, Any] | None = None
        self._ended: dict[str, Any] | None = None
        self._random_state: dict[str, Any] | None = None
        self._nonfinite_steps = 0

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

    def _updates(self, trainer: Trainer) -> float:
        """Return how many outer updates are left if the run is not ended early; else 0."""
        last = trainer.estimated_stepping_batches  # -1 where the loader's length is not known
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

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the hyperparameters and put the differentiable optimizer in place."""
        check_modules(trainer, pl_module)
        check_optimizers(trainer)
        self._tuned = select_hyperparameters(self._selection, pl_module, trainer.optimizers)
        for hyper in self._tuned.values():
            if hyper.dim() > 0:
                hyper.data = hyper.data.to(pl_module.device)
        if self._resumed is not None:
            self._take_back_values(self._resumed)
            self._take_back_random_state(trainer, self._resumed)
        trainer.optimizers = [
            DifferentiableOptimizer(inner, schedulers_of(trainer, inner))
            for inner in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to follow the run; evaluate the outer objective once, so that errors come now."""
        optimizers = _differentiable(trainer)
        for optimizer in optimizers:
            optimizer.write_hyperparameters()
        self.schedule = Schedule(
            start=self.hyperparameters,
            domains={name: repr(hyper.domain) for name, hyper in self._tuned.items()},
        )
        self._next_update, self._ended = self.hyper_batch_size, None
        self._objective = ValidationObjective(
            trainer, pl_module, self._dataloader, self._outer_batches, self._metric
        )
        if self.curvature_fraction < 1:
            self._sample = CurvatureSample(self.curvature_fraction, trainer.global_rank)
        self._run = FollowedRun(
            trainer, pl_module, optimizers, self._tuned, self._make_hypergradient, self._sample
        )
        if self._outer_optimizer is not None:
            hypers = list(self._tuned.values())
            # Of a checkpoint without the run nobody knows where its climb stood.
            is_known = self._resumed is None or "run" in self._resumed
            can_climb = is_known and self._can_go_back and not self._run.method.keeps_history
            self._descent = HyperparameterDescent(
                hypers,
                self._outer_optimizer,
                decoupled_coordinates(hypers, optimizers),
                learning_rates(hypers, optimizers) if self._outer_optimizer is adam else (),
                Ramp(self._updates(trainer) if can_climb else 0),
            )
            if self.safeguard:
                self._safeguard = Safeguard(
                    pl_module,
                    self._run.method,
                    optimizers,
                    hypers,
                    self._descent,
                    judges_objective=self._sign > 0,
                )
        if self._resumed is not None:
            self._take_back_run(self._resumed)
        self._resumed = None
        self._objective(self._run.method.params, self._run.method.hypers, peek=True)
        if self.summary:
            self._print_summary(trainer, pl_module)
        self._bar = ReadableBar(trainer.progress_bar_callback, prefix="hyperparameter/")
        self._diagnostics.start(trainer)

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
        if self._run is not None:
            started = trainer.global_step >= self.start_step
            stopped = self.stop_step is not None and trainer.global_step >= self.stop_step
            if started and not stopped and self._safeguard is not None and not self._run.steps:
                self._begin_safeguard(self._safeguard)
            self._run.before_batch(batch, batch_idx, follow=started and not stopped)

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Begin a new gradient; a step that was prepared and not made has been skipped."""
        if self._run is not None and self._run.begin_step() == 1:
            rank_zero_warn(
                f"{type(self).__name__}: step {trainer.global_step} was skipped, since its scaled "
                "gradient overflowed. Hypergradients skip it too; this is said once."
            )

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Linearize the loss; where that gives the gradient, backward need not compute it."""
        if self._run is not None:
            with refusals_explained():
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
        self._run.after_batch()
        gives_up = self._safeguard is not None and self._safeguard.has_lost_weights()
        update_is_due = gives_up or self._run.steps >= self._next_update
        if gives_up and self._goes_back(trainer, self._run.method, math.nan):
            self._next_update = self._run.steps + self.hyper_batch_size
        elif update_is_due:
            self._next_update += self.hyper_batch_size
            self._update(trainer, self._run.method)
        if self._descent is not None and self._descent.is_climbing:
            let_wait(trainer)
        if update_is_due or batch_idx == 0:  # Lightning forgets metrics when an epoch begins
            self._show(trainer, pl_module)

    def _begin_safeguard(self, safeguard: Safeguard) -> None:
        """Let the run's first state be one to go back to."""
        if not safeguard.has_begun:
            assert self._run is not None
            assert self._objective is not None
            method = self._run.method
            outer = self._objective(method.params, method.hypers, peek=True)
            safeguard.begin(outer.value.item())

    def _update(self, trainer: Trainer, method: AbstractHypergradient) -> None:
        """Measure the hypergradient, move the hyperparameters, write down what was done."""
        assert self._objective is not None
        outer = self._objective(method.params, method.hypers)
        value, is_finite, safeguard = outer.value.item(), outer.is_finite(), self._safeguard
        if self._goes_back(trainer, method, value):
            return
        with refusals_explained():
            hypergradient = method.hypergradient(outer)
        sensitivity = method.sensitivity(relative_slopes(list(self._tuned.values())))
        if self._diagnostics:
            self._diagnose(trainer, hypergradient)
        if safeguard is not None and is_finite and (action := safeguard.calms(value, sensitivity)):
            self._write_down(trainer, value, hypergradient, sensitivity, action)
            return
        if self._is_frozen(trainer, method, is_finite, hypergradient):
            return
        if safeguard is not None:
            safeguard.look_at(value)
        if self._descent is not None:
            self._move(self._descent, method, hypergradient, value)
        self._write_down(trainer, value, hypergradient, sensitivity, None)

    def _goes_back(self, trainer: Trainer, method: AbstractHypergradient, value: float) -> bool:
        """Go back to an earlier state if the run is lost; write that down."""

        def evaluate_again() -> float:
            assert self._objective is not None
            return self._objective(method.params, method.hypers, again=True).value.item()

        if self._safeguard is None or not self._safeguard.goes_back(value, evaluate_again):
            return False
        unknown = torch.full((method.entries,), math.nan, dtype=torch.float64)
        self._write_down(trainer, value, unknown, math.nan, "restored")
        return True

    def _move(
        self,
        descent: HyperparameterDescent,
        method: AbstractHypergradient,
        hypergradient: Tensor,
        value: float,
    ) -> None:
        """Move the hyperparameters, and the history with them."""
        old = descent.jacobian() if method.keeps_history else None
        descent.step(hypergradient, value)
        if old is not None:
            method.transport(old, descent.jacobian())

    def _write_down(
        self,
        trainer: Trainer,
        value: float,
        hypergradient: Tensor,
        sensitivity: float,
        action: str | None,
    ) -> None:
        """Hand the new values to the optimizers; write the update down and log it."""
        if self._descent is not None:
            for optimizer in _differentiable(trainer):
                optimizer.write_hyperparameters()
        restored = self._safeguard if action == "restored" else None
        if restored is not None and self._run is not None:
            self._run.method.take_faults()
            forget_what_is_given_up(trainer, trainer.lightning_module)
        update = OuterUpdate(
            step=trainer.global_step,
            values={name: value.cpu() for name, value in self.hyperparameters.items()},
            hypergradients=self._natural(hypergradient),
            outer_objective=self._sign * value,
            sensitivity=sensitivity,
            safeguard=action,
            restored_step=None if restored is None else restored.best_step,
        )
        self.schedule.append(update)
        metrics = _metrics(update)
        if action is not None and self._safeguard is not None:
            metrics[f"safeguard/{action}"] = self._safeguard.counts[action]
        _log(trainer, metrics)

    def _natural(self, hypergradient: Tensor) -> dict[str, Tensor]:
        """Turn dE/dlambda ``[m]`` into what is written down, by name, each ``[*H]``."""
        parts = (self._sign * hypergradient).split([h.numel() for h in self._tuned.values()])
        return {
            name: part.reshape(hyper.shape)
            for (name, hyper), part in zip(self._tuned.items(), parts, strict=True)
        }

    def _diagnose(self, trainer: Trainer, hypergradient: Tensor) -> None:
        """Log what else is asked for of an update, before anything is moved or forgotten."""
        assert self._run is not None
        tangents = dict(
            zip(self._run.parameter_names, self._run.method.weight_tangents(), strict=True)
        )
        hypergradients = self._natural(hypergradient)
        _log(trainer, self._diagnostics.scalars(hypergradients, self.hypergradients, tangents))
        self._diagnostics.write_histograms(trainer, hypergradients, tangents)

    def _is_frozen(
        self,
        trainer: Trainer,
        method: AbstractHypergradient,
        is_outer_finite: bool,
        hypergradient: Tensor,
    ) -> bool:
        """Tell whether the hyperparameters stay, since something is not finite; count and warn."""
        last = trainer.global_step - 1  # counted as the methods count
        faults = method.take_faults()
        frozen = any(fault.step == last for fault in faults)
        if not is_outer_finite:
            faults.append(Fault(last, "outer objective or its gradient"))
            frozen = True
        elif not bool(hypergradient.isfinite().all()):
            faults += [] if frozen else [Fault(last, "hypergradient")]
            frozen = True
            method.reset()
        if len(faults) >= self.hyper_batch_size:
            method.reset()
        if faults and not self._nonfinite_steps:
            rank_zero_warn(
                f"{type(self).__name__}: {faults[0].cause} is not finite at step "
                f"{faults[0].step + 1}. In such steps the hyperparameters and their hypergradients "
                "keep their values; the log counts them as `nonfinite_steps`, this is said once."
            )
        self._nonfinite_steps += len(faults)
        if faults:
            _log(trainer, {"nonfinite_steps": self._nonfinite_steps})
        return frozen

    def _show(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the hyperparameters on the progress bar and among the callback metrics."""
        if not self.schedule or trainer.barebones:
            return
        for name, value in _metrics(self.schedule[-1]).items():
            on_bar = name.startswith("hyperparameter/")
            # The loggers have had it at its own step; `log` would wait for `log_every_n_steps`.
            pl_module.log(name, value, prog_bar=on_bar, logger=False, on_step=True, on_epoch=False)

    # Checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run goes on from, in tensors, numbers, lists and dicts."""
        state: dict[str, Any] = {
            "hyperparameters": self.hyperparameters,
            "schedule": self.schedule.state_dict(),
        }
        run = self._ended if self._run is None else self._run_state()
        if run is not None:
            state["run"] = run
        # On the host, where there is room for a copy.
        copied: dict[str, Any] = apply_to_collection(
            state, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True)
        )
        return copied

    def _run_state(self) -> dict[str, Any] | None:
        """Return where the run stands, uncopied; None in the midst of a step."""
        if self._run is None or self._objective is None or self._run.is_advancing:
            return None
        return {
            "steps": self._run.steps,
            "next_update": self._next_update,
            "nonfinite_steps": self._nonfinite_steps,
            "parameters": self._run.parameter_names,
            "derivative_buffers": self._run.derivative_buffers,
            "method": self._run.method.state_dict(),
            "objective": self._objective.state_dict(),
            "descent": None if self._descent is None else self._descent.state_dict(),
            "safeguard": None if self._safeguard is None else self._safeguard.state_dict(),
            "sample": None if self._sample is None else self._sample.state_dict(),
            "random": read_random_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until there are optimizers to apply it to."""
        self._resumed = state_dict

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

    def _take_back_random_state(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Go on with the random numbers; a checkpoint holds those of one process."""
        if "run" in state and trainer.world_size == 1:
            self._random_state = state["run"]["random"]
            write_random_state(self._random_state)

    def _take_back_run(self, state: dict[str, Any]) -> None:
        """Go on with the run where it stood."""
        self.schedule = Schedule.from_state_dict(state["schedule"])
        if "run" not in state:
            return
        assert self._run is not None
        assert self._objective is not None
        run = state["run"]
        self._run.steps, self._next_update = run["steps"], run["next_update"]
        self._nonfinite_steps = run["nonfinite_steps"]
        self._run.order_parameters(run["parameters"])
        self._run.derivative_buffers = run["derivative_buffers"]
        self._run.method.load_state_dict(run["method"], self._run.recollection())
        self._objective.load_state_dict(run["objective"])
        if self._sample is not None and run["sample"] is not None:
            self._sample.load_state_dict(run["sample"])
        if self._descent is not None and run["descent"] is not None:
            self._descent.load_state_dict(run["descent"])
        if self._safeguard is not None and run.get("safeguard") is not None:
            self._safeguard.load_state_dict(run["safeguard"])

    # After training

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave nothing behind but what a checkpoint of where the run stood needs."""
        self._end(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave nothing behind but what a checkpoint of the end needs."""
        if self._run is not None and not self.schedule:
            rank_zero_warn(
                f"{type(self).__name__} made no update in {self._run.steps} followed steps. Lower "
                f"`hyper_batch_size`, which is {self.hyper_batch_size}."
            )
        if self._descent is not None and self._descent.is_climbing:
            rank_zero_warn(
                f"The run has ended at step {trainer.global_step}, in its range test: its weights "
                "are those of rates that were tried. Train for longer, or pass `safeguard=False`."
            )
        self._end(trainer)

    def _end(self, trainer: Trainer) -> None:
        if self._run is not None:
            # Checkpoints that are written at the end of a run, or on an exception, come after this.
            self._ended = self._state_on_host()
            self._run.end()
        if self._bar is not None:
            self._bar.end()
        self._bar = None
        self._run = self._objective = self._descent = self._safeguard = self._sample = None
        trainer.optimizers = [
            o.optimizer if isinstance(o, DifferentiableOptimizer) else o for o in trainer.optimizers
        ]

    def _state_on_host(self) -> dict[str, Any] | None:
        """Return where the run stands, on the host; None if that cannot be had any more."""
        try:
            state: dict[str, Any] | None = apply_to_collection(
                self._run_state(), Tensor, lambda tensor: tensor.detach().cpu()
            )
        except Exception:  # whatever has ended the run, as a device that has failed
            return None
        return state


def _differentiable(trainer: Trainer) -> list[DifferentiableOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, DifferentiableOptimizer)]


def _metrics(update: OuterUpdate) -> dict[str, float]:
    """Return the scalars of an update; of a hyperparameter with a shape its mean."""
    metrics = {"outer_objective": update.outer_objective, "sensitivity": update.sensitivity}
    for kind, values in (
        ("hyperparameter", update.values),
        ("hypergradient", update.hypergradients),
    ):
        metrics |= {f"{kind}/{name}": value.mean().item() for name, value in values.items()}
    return _known(metrics)


def _known(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out what is not known."""
    return {name: value for name, value in metrics.items() if not math.isnan(value)}


def _log(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Hand what is known to every logger, at the present step."""
    known = _known(metrics)
    for logger in trainer.loggers if known else []:
        logger.log_metrics(known, step=trainer.global_step)


def _check_count(argument: str, value: int, least: int, meaning: str) -> None:
    """Check an integer argument."""
    if not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{argument}` must be an integer of at least {least}, got {value!r}. It counts "
            f"{meaning}."
        )
