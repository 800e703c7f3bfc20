"""What is done where a run has become chaotic or is lost: lower the rate, go back."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_rtho._numerics import are_finite
from lightning_rtho.callbacks._coupling import learning_rates
from lightning_rtho.callbacks._snapshot import (
    distance_from,
    drop_what_stands_still,
    move_snapshot,
    restore_snapshot,
    take_snapshot,
)
from lightning_rtho.hypergradient import AbstractHypergradient
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import Backtracking, HyperparameterDescent

__all__ = ["Safeguard"]

_CHAOS = 10.0
"""Sensitivity from which on a hypergradient means nothing.

Most that learn stay below 5; where the rate is so large that they do not, 100 is passed within
150 steps, and hypergradients are random meanwhile. What is between 10 and 20 comes of such a time
that is over: the run has recovered, its history has not.
"""

_CALMING = 2.0
"""What a learning rate is divided by where the run is chaotic."""

_RETREAT = 10.0
"""What it is divided by where the run is lost.

Rates just below the lowest one that is lost still do harm to a network, which lasts; the best lie
about ten times lower, and are soon found from below.
"""


class Safeguard:
    """Lowers the learning rates of a run that is chaotic, and takes a run that is lost back.

    Both begin anew, without history and with a fresh outer optimizer. A run is on trial as long as
    its rates climb and in the updates after it: where it sets out too fast, it begins again. Where
    no learning rate is among the hyperparameters, there is no trial, a fresh history is all for a
    chaotic run, and a lost one goes back only if hyperparameters have moved since: otherwise it is
    not their doing.

    Args:
        module: The module.
        method: What follows the run.
        optimizers: The module's optimizers.
        hypers: The hyperparameters, each ``[*H]``.
        descent: What moves them.
        judges_objective: Whether the outer objective tells a lost run. How far it has risen is
            measured by its size, which means nothing for one that may be of either sign.

    Attributes:
        best_step: Optimizer steps after which the best state was kept.
        counts: How often each of the two was done.
    """

    def __init__(
        self,
        module: LightningModule,
        method: AbstractHypergradient,
        optimizers: Sequence[DifferentiableOptimizer],
        hypers: Sequence[Hyperparameter],
        descent: HyperparameterDescent,
        *,
        judges_objective: bool,
    ) -> None:
        self._module, self._method, self._optimizers = module, method, optimizers
        self._judges_objective = judges_objective
        self._hypers, self._descent = list(hypers), descent
        self._rates = [self._hypers[i] for i in learning_rates(hypers, optimizers)]
        self._backtracking = Backtracking()
        self._best: dict[str, Any] = {}
        self._best_values: list[Tensor] = []
        self._moving: set[str] | None = None  # weights that are moved, but by no optimizer
        self.best_step = 0
        self.counts = {"lowered": 0, "restored": 0}
        self._warned: set[str] = set()

    @property
    def has_begun(self) -> bool:
        """Whether there is a state to go back to."""
        return self._backtracking.has_begun

    def begin(self, value: float) -> None:
        """Take the present state for the start, if the objective tells a lost run.

        Args:
            value: Its outer objective.
        """
        if self._judges_objective:
            self._backtracking.begin(value, on_trial=bool(self._rates))
        if self.has_begun:
            self._keep(value)

    def go_on(self, value: float) -> None:
        """Go on with the run; keep its state if it is the best by some way, or has other weights.

        Args:
            value: Its outer objective.
        """
        if self.has_begun and self._moving is None:
            self._moving = drop_what_stands_still(self._best, self._module, self._method.params)
        if not self.has_begun:
            self.begin(value)
        elif self._has_grown() or self._backtracking.is_worth_keeping(value):
            self._keep(value)
        if not self._descent.is_climbing:  # which may go on for longer than the trial
            self._backtracking.go_on()

    @property
    def _is_trying(self) -> bool:
        """Whether rates climb, or are on trial after that."""
        descent, trial = self._descent, self._backtracking.trial
        return descent.is_climbing or (descent.has_climbed and trial > 0)

    def has_lost_weights(self) -> bool:
        """Tell whether weights have become infinite or NaN on a climb or in the trial after it.

        Then the run is lost, and the user's code need not stand them.

        Returns:
            Whether they have; later nobody looks, since that would wait for the device.
        """
        if not self.has_begun or not self._is_trying:
            return False
        return not bool(are_finite([param.detach() for param in self._method.params]))

    def goes_back(self, value: float, evaluate_again: Callable[[], float]) -> bool:
        """Go back to the best state, with a lower learning rate, if the run is lost.

        Args:
            value: Outer objective of the present state; NaN where it need not be known.
            evaluate_again: Gives that of the weights that stand in the module, on the same data.

        Returns:
            Whether it went back.
        """
        if not self.has_begun or self._has_grown() or not self._can_go_back():
            return False
        distance = distance_from(self._best, self._method.params)
        if not self._backtracking.suspects(value, distance):
            return False
        present = self._copy()
        self._restore(self._best)
        best = evaluate_again()
        if not self._backtracking.confirms(value, best, distance):
            self._restore(present)
            return False
        found = "weights were infinite or NaN"
        if value < best:
            found = (
                f"the weights had moved by {distance:.1f} times their length, but the outer "
                f"objective from {best:.3g} to no less than {value:.3g}"
            )
        elif not math.isnan(value):
            found = f"the outer objective was {value:.3g}"
        self._retreat(f"{found}, so the run went back to its best state so far")
        return True

    def _retreat(self, what: str) -> None:
        """Take the values of the best state, which has been restored, with a tenth of the rate.

        A rate that has climbed is taken as it is, also in the trial after that: the start's says
        nothing. Others are not taken above that of the best state.
        """
        is_climbing, has_climbed = self._descent.is_climbing, False
        for hyper, best in zip(self._hypers, self._best_values, strict=True):
            if not any(hyper is rate for rate in self._rates):
                hyper.assign(best)
            elif self._is_trying:
                has_climbed |= is_climbing and bool((hyper.plain > best).any())
            else:
                hyper.assign(hyper.plain.minimum(best))
        self._begin_anew(_RETREAT)
        self._backtracking.begin_again()
        if is_climbing:
            self._descent.end_climb()
        if has_climbed:  # as it was meant to
            self.counts["restored"] += 1
            rank_zero_info(
                f"The learning rate has climbed until the run was lost, at step "
                f"{self._module.global_step}; it begins again with a tenth of that rate."
            )
        else:
            self._note("restored", f"{what}, with a tenth of the learning rate")

    def calms(self, value: float, sensitivity: float) -> Literal["lowered", "restored"] | None:
        """Lower the learning rate if the run is chaotic, and begin again if it was so at once.

        Args:
            value: Outer objective of the present state.
            sensitivity: ||dw/du|| / ||w||; NaN where it is not known.

        Returns:
            What was done: the rate lowered and history begun anew from here, or the best state
            restored, which is the start; None where the run is calm.
        """
        if self._sets_out_too_fast(value, sensitivity):
            self._restore(self._best)
            found = f"the weights' sensitivity is {sensitivity:.3g} already"
            self._retreat(f"{found}, so the run began again")
            return "restored"
        if sensitivity > _CHAOS:
            self._begin_anew(_CALMING)
            found = (
                f"the weights' sensitivity is {sensitivity:.3g}, where hypergradients mean nothing"
            )
            self._note("lowered", f"{found}, so the learning rate was lowered")
            return "lowered"
        return None

    def _sets_out_too_fast(self, value: float, sensitivity: float) -> bool:
        too_fast = self._backtracking.sets_out_too_fast(value, sensitivity)
        return too_fast and not self._has_grown()

    def _note(self, kind: str, what: str) -> None:
        """Count, and warn the first time."""
        self.counts[kind] += 1
        if kind not in self._warned:
            self._warned.add(kind)
            rank_zero_warn(
                f"At step {self._module.global_step} {what}. The log counts this as "
                f"`safeguard/{kind}`, it is said once; `safeguard=False` turns it off."
            )

    def _can_go_back(self) -> bool:
        moved = [
            not torch.equal(hyper.plain, best)
            for hyper, best in zip(self._hypers, self._best_values, strict=True)
        ]
        return bool(self._rates) or any(moved)

    def _has_grown(self) -> bool:
        """Tell whether weights were added to the run since the best state."""
        return len(self._best["params"]) < len(self._method.params)

    def _begin_anew(self, factor: float) -> None:
        """Divide the learning rates; forget what history and outer optimizer have gathered."""
        for rate in self._rates:
            raw = rate.domain.to_raw(rate.plain / factor)
            rate.assign(rate.domain.from_raw(rate.domain.project(raw)))
        self._descent.restart()
        self._method.reset()

    def _keep(self, value: float) -> None:
        self._backtracking.best = value
        self._best, self.best_step = self._copy(), self._module.global_step
        self._best_values = [hyper.plain.clone() for hyper in self._hypers]

    def _copy(self) -> dict[str, Any]:
        return take_snapshot(self._module, self._method.params, self._optimizers, self._moving)

    def _restore(self, snapshot: dict[str, Any]) -> None:
        restore_snapshot(snapshot, self._module, self._method.params, self._optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run, the best state included."""
        return {
            "backtracking": self._backtracking.state_dict(),
            "best": self._best,
            "best_values": self._best_values,
            "best_step": self.best_step,
            "moving": None if self._moving is None else sorted(self._moving),
            "counts": self.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Args:
            state: The state; its weights are in the order of those that the method follows.
        """
        self._backtracking.load_state_dict(state["backtracking"])
        self._best = move_snapshot(state["best"], self._method.params)
        self._best_values = [
            value.to(hyper.device)
            for value, hyper in zip(state["best_values"], self._hypers, strict=False)  # or none
        ]
        self.best_step = state["best_step"]
        self._moving = None if state["moving"] is None else set(state["moving"])
        self.counts = state["counts"]
