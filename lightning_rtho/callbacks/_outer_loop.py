"""What is done where a hyper-batch ends: measure, judge, move."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rtho.callbacks._checks import refusals_explained
from lightning_rtho.callbacks._detached import DetachedWeights
from lightning_rtho.callbacks._objective import ValidationObjective
from lightning_rtho.callbacks._own_backward import FunctionCheck
from lightning_rtho.callbacks._run import FollowedRun
from lightning_rtho.callbacks._safeguard import Safeguard
from lightning_rtho.hypergradient import Fault, OuterGradient
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.linearization import graph_nodes
from lightning_rtho.outer import HyperparameterDescent, relative_slopes

__all__ = ["Outcome", "OuterLoop"]


class Outcome(NamedTuple):
    """What an outer update came to.

    Attributes:
        objective: E before it; NaN where it was not asked for.
        hypergradient: dE/dlambda with respect to natural values ``[m]``; NaN where a run was lost.
        sensitivity: See :class:`OuterUpdate`.
        action: What the safeguard did in its place: ``"lowered"``, ``"restored"`` or None.
        times: How often it has done that in this run.
        restored_step: Optimizer steps after which the state was kept that was restored.
    """

    objective: float
    hypergradient: Tensor
    sensitivity: float
    action: Literal["lowered", "restored"] | None = None
    times: int = 0
    restored_step: int | None = None


class OuterLoop:
    """Moves the hyperparameters of a run that is followed, every few of its steps.

    Args:
        run: The run.
        objective: The outer objective.
        tuned: The hyperparameters by name, each ``[*H]``, m entries in all.
        hyper_batch_size: Optimizer steps between updates.
        descent: What moves them; None leaves them where they are.
        safeguard: What takes a run back that is lost; None lets it be.
        look: Called with every hypergradient ``[m]``, before anything is moved or forgotten.

    Attributes:
        run: The run.
        descent: What moves the hyperparameters.
        safeguard: What takes a run back.
        nonfinite_steps: Steps so far whose derivative was not finite.
    """

    def __init__(
        self,
        run: FollowedRun,
        objective: ValidationObjective,
        tuned: Mapping[str, Hyperparameter],
        hyper_batch_size: int,
        descent: HyperparameterDescent | None,
        safeguard: Safeguard | None,
        look: Callable[[Tensor], None],
    ) -> None:
        self.run, self.descent, self.safeguard = run, descent, safeguard
        self.nonfinite_steps = self._seen_steps = 0
        self._objective, self._tuned, self._look = objective, tuned, look
        self._check_functions = FunctionCheck("The outer objective")
        self._has_warned_of_direct_part = self._has_warned_of_detached = False
        self._is_first_update = True
        self._hyper_batch_size = self._next_update = hyper_batch_size

    @property
    def is_climbing(self) -> bool:
        """Whether learning rates go up whatever the hypergradient says."""
        return self.descent is not None and self.descent.is_climbing

    def try_objective(self) -> None:
        """Evaluate the outer objective once, so that its errors come before a weight moves.

        Warns of weights that it hides from its graph.

        Raises:
            MisconfigurationException: If nothing that the run moves has a part in it.
        """
        trained = set(self.run.trained)
        moving = [weight for weight in trained if weight.requires_grad]
        params = self.run.method.params
        before = [param.detach().clone() for param in params]
        try:
            self._objective.look_ahead()  # whose workers shall not inherit the watch
            outer = self._evaluate_watched(DetachedWeights(moving))
        except MisconfigurationException:
            raise
        except Exception as error:
            error.add_note(
                "This was raised where the outer objective was tried before training. Steps for it "
                "run with gradients, and without the hooks of Lightning's validation: detach what "
                "is taken out as a number, make in `__init__` what they need, or define "
                "`outer_step(batch, batch_idx)`."
            )
            raise
        if not all(map(torch.equal, params, before)):
            with torch.no_grad():
                for param, value in zip(params, before, strict=True):
                    param.copy_(value)
            raise MisconfigurationException(
                "The outer objective writes to weights, so that to evaluate it would change the "
                "training run. Let `validation_step` (or `outer_step`) and the layers that it runs "
                "leave them alone, as `F.embedding(..., max_norm=...)` does not. Layers that take "
                "their first weights from a batch have to see one before, as in Lightning's sanity "
                "check (`num_sanity_val_steps`)."
            )
        weights = zip(params, outer.params, strict=True)
        parts = [gradient for weight, gradient in weights if weight in trained]
        if all(part is None for part in (*parts, *outer.hypers, *outer.statistics)):
            raise MisconfigurationException(
                "The outer objective depends on no weight that the optimizer trains, as where "
                "`validation_step` evaluates an average of the weights: hypergradients would be 0. "
                "Define `outer_step(batch, batch_idx)` that evaluates the trained weights."
            )

    def begin(self) -> None:
        """Let the state in which a run begins be one to go back to."""
        if self.safeguard is not None and not self.safeguard.has_begun and not self.run.steps:
            self._objective.look_ahead()
            self.safeguard.begin(self._evaluate().value.item())

    def after_batch(self, step: int) -> Outcome | None:
        """Make an update where one is due.

        Args:
            step: Optimizer steps made so far, as the trainer counts them.

        Returns:
            What it came to; None where there was none.
        """
        if self.run.steps == self._seen_steps:  # still accumulating, or not followed any more
            return None
        self._seen_steps = self.run.steps
        if self.safeguard is not None and self.safeguard.has_lost_weights():
            outcome = self._go_back(math.nan)
            if outcome is not None:
                self._next_update = self.run.steps + self._hyper_batch_size
                return outcome
        if self.run.steps < self._next_update:
            return None
        self._next_update += self._hyper_batch_size
        return self._update(step)

    def _evaluate_watched(self, watch: DetachedWeights) -> OuterGradient:
        """Evaluate the outer objective and warn of what it hides from its graph."""
        entries: list[Any] = []

        def look(loss: Tensor) -> None:
            entries.extend(watch.entries_of(loss))
            self._check_functions([*graph_nodes([loss])])

        with watch:
            outer = self._evaluate(look=look)
        if entries and not self._has_warned_of_detached:
            self._has_warned_of_detached = True
            rank_zero_warn(
                "The outer objective uses values that depend on the weights but were detached "
                "(`detach` or `torch.no_grad` in `validation_step`, in `outer_step`, or in a step "
                "of training that wrote to a buffer). Hypergradients take them for constants, "
                "which they are not. Compute them with gradients."
            )
        return outer

    def _evaluate(self, **options: Any) -> OuterGradient:
        return self._objective(self.run.method.params, self.run.method.hypers, **options)

    def _update(self, step: int) -> Outcome | None:
        """Measure the hypergradient and move the hyperparameters; None where they are frozen."""
        method, safeguard = self.run.method, self.safeguard
        self.run.check_hyperparameters()
        with self.run.hyperparameters_at_rest():
            self._objective.advance()
        # Training has left behind by now what it leaves behind for validation.
        watch = self.run.detached if self._is_first_update else None
        self._is_first_update = False
        outer = self._evaluate() if watch is None else self._evaluate_watched(watch)
        self._warn_of_direct_part(outer)
        value, is_finite = outer.value.item(), outer.is_finite
        gone_back = self._go_back(value)
        if gone_back is not None:
            return gone_back
        with refusals_explained():
            hypergradient = method.hypergradient(outer)
        sensitivity = method.sensitivity(relative_slopes([*self._tuned.values()]))
        self._look(hypergradient)
        if safeguard is not None and is_finite and (action := safeguard.calms(value, sensitivity)):
            return self._safeguarded(safeguard, action, value, hypergradient, sensitivity)
        if self._freezes(step, is_finite, hypergradient):
            return None
        if safeguard is not None:
            safeguard.go_on(value)
        if self.descent is not None:
            self._move(self.descent, hypergradient, value)
        return Outcome(value, hypergradient, sensitivity)

    def _warn_of_direct_part(self, outer: OuterGradient) -> None:
        """Say that the outer objective moves hyperparameters by what it makes of them itself."""
        if self._has_warned_of_direct_part:
            return
        pairs = zip(self._tuned, outer.hypers, strict=True)
        names = [name for name, part in pairs if part is not None and bool(part.any())]
        if names:
            self._has_warned_of_direct_part = True
            rank_zero_warn(
                f"The outer objective depends on {' and '.join(f'`{name}`' for name in names)} "
                "itself, not only by way of the weights, and is lowered by that as well. That is "
                "right for a part of the model, as a temperature. Leave penalties and the weights "
                "of losses out of what `validation_step` returns, or define `outer_step(batch, "
                "batch_idx)` without them."
            )

    def _go_back(self, value: float) -> Outcome | None:
        """Go back to an earlier state if the run is lost."""
        safeguard = self.safeguard

        def evaluate_again() -> float:
            return self._evaluate().value.item()

        if safeguard is None or not safeguard.goes_back(value, evaluate_again):
            return None
        unknown = torch.full((self.run.method.entries,), math.nan, dtype=torch.float64)
        return self._safeguarded(safeguard, "restored", value, unknown, math.nan)

    def _safeguarded(
        self,
        safeguard: Safeguard,
        action: Literal["lowered", "restored"],
        value: float,
        hypergradient: Tensor,
        sensitivity: float,
    ) -> Outcome:
        """Tell what was done in the place of an update."""
        restored_step = None
        if action == "restored":
            self.run.method.take_faults()  # they are those of the run that is given up
            restored_step = safeguard.best_step
        times = safeguard.counts[action]
        return Outcome(value, hypergradient, sensitivity, action, times, restored_step)

    def _move(self, descent: HyperparameterDescent, hypergradient: Tensor, value: float) -> None:
        """Move the hyperparameters, and the history with them."""
        method = self.run.method
        old = descent.jacobian() if method.keeps_history else None
        descent.step(hypergradient, value)
        if old is not None:
            method.transport(old, descent.jacobian())

    def _freezes(self, step: int, is_outer_finite: bool, hypergradient: Tensor) -> bool:
        """Note what is not finite; tell whether hyperparameters stay where they are for it."""
        method, last = self.run.method, step - 1  # counted as the methods count
        faults = method.take_faults()
        is_known = any(fault.step == last for fault in faults)
        is_broken = is_outer_finite and not bool(hypergradient.isfinite().all())
        if not is_outer_finite:
            faults.append(Fault(last, "outer objective or its gradient"))
        elif is_broken and not faults:
            faults.append(Fault(last, "hypergradient"))
        if is_broken or len(faults) >= self._hyper_batch_size:
            method.reset()
        if faults and not self.nonfinite_steps:
            rank_zero_warn(
                f"The {faults[0].cause} is not finite at step {faults[0].step + 1}. In such steps "
                "the hyperparameters and their hypergradients keep their values; the log counts "
                "them as `nonfinite_steps`, this is said once."
            )
        self.nonfinite_steps += len(faults)
        return is_known or is_broken or not is_outer_finite

    def state_dict(self) -> dict[str, Any] | None:
        """Return where the run stands, in tensors, numbers, lists and dicts, uncopied.

        Returns:
            The state; None in the midst of a step, which cannot be gone on from.
        """
        run = self.run.state_dict()
        if run is None:
            return None
        return {
            **run,
            "next_update": self._next_update,
            "nonfinite_steps": self.nonfinite_steps,
            "objective": self._objective.state_dict(),
            "descent": None if self.descent is None else self.descent.state_dict(),
            "safeguard": None if self.safeguard is None else self.safeguard.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stood.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self.run.load_state_dict(state)
        self._next_update, self.nonfinite_steps = state["next_update"], state["nonfinite_steps"]
        self._objective.load_state_dict(state["objective"])
        if self.descent is not None and state["descent"] is not None:
            self.descent.load_state_dict(state["descent"])
        if self.safeguard is not None and state["safeguard"] is not None:
            self.safeguard.load_state_dict(state["safeguard"])
