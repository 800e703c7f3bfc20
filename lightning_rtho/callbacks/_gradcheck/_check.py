"""Hypergradients of the user's own module against finite differences of whole runs."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torchmetrics import Metric

from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._gradcheck._causes import likely_causes
from lightning_rtho.callbacks._gradcheck._differences import Differences
from lightning_rtho.callbacks._gradcheck._fits import Fits, StoredBatches
from lightning_rtho.callbacks._gradcheck._result import (
    HypergradcheckError,
    HypergradcheckResult,
    HypergradcheckRow,
)
from lightning_rtho.callbacks._gradcheck._trace import StepTrace
from lightning_rtho.callbacks._rtho import RTHO
from lightning_rtho.callbacks._selection import Selection
from lightning_rtho.callbacks._trho import TRHO
from lightning_rtho.hypergradient import GradientMismatchError

__all__ = ["hypergradcheck"]

_VALIDATION_BATCHES = 2

_NOISE = 1e-9
"""Changes of the objective, relative to itself, that differences of float64 runs cannot see."""


def hypergradcheck(
    module: LightningModule,
    train_dataloaders: Iterable[Any],
    val_dataloaders: Iterable[Any],
    *,
    trainer_kwargs: Mapping[str, Any] | None = None,
    hyperparameters: Selection = None,
    objective: Metric | None = None,
    steps: int = 4,
    rtol: float = 1e-4,
    raise_exception: bool = True,
) -> HypergradcheckResult:
    """Check the hypergradients of a module, as ``torch.autograd.gradcheck`` checks a function.

    Copies of the module train for a few steps in float64: once with `RTHO` and once with `TRHO`,
    then with each hyperparameter a little smaller and larger, at four step sizes. A table with a
    row for each hyperparameter is printed. Where hypergradients differ from central differences
    the likely causes are named: a ``detach``, a custom autograd function, weights or gradients
    changed behind the optimizer's back, random numbers that are not those of torch's, numpy's and
    Python's global generators, or a run that is not smooth, where it is the differences that are
    wrong. The module and the random state are left as they were, and nothing is logged or saved.
    The cost is 8 short fits for each hyperparameter and at most 4 more.

    Args:
        module: The module.
        train_dataloaders: Where the training batches come from: a loader, or a list of batches.
        val_dataloaders: Where the two batches of the outer objective come from.
        trainer_kwargs: Settings of the trainer: accumulation, clipping, callbacks. Those that say
            how long, how precisely and where it runs or what it logs are not taken over.
        hyperparameters: As `RTHO`.
        objective: As `RTHO`.
        steps: Optimizer steps of each run.
        rtol: Relative difference that is taken for agreement.
        raise_exception: Whether to raise if hypergradients differ.

    Returns:
        What was found.

    Raises:
        HypergradcheckError: If hypergradients differ, or the callbacks refuse the module.
        TypeError: If `objective` is no metric.
        ValueError: If `steps` is less than 1, there are several loaders or no batches, or
            `objective` is not differentiable.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Net(BoringModel):
        ...     def validation_step(self, batch, batch_idx):
        ...         return self.step(batch)
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.DataLoader(torch.randn(8, 32), batch_size=2)
        >>> hypergradcheck(Net(), data, data, hyperparameters=["lr"]).passed
        hyperparameter      value       forward       reverse   differences   step
        lr                    0.1 ...  ok
        True
    """
    if steps < 1:
        raise ValueError(
            f"`steps` must be at least 1, got {steps}. It counts the optimizer steps of each run."
        )
    settings = dict(trainer_kwargs or {})
    with isolate_rng():
        train = StoredBatches(train_dataloaders, steps * settings.get("accumulate_grad_batches", 1))
        val = StoredBatches(val_dataloaders, _VALIDATION_BATCHES)
        fits = Fits(module, train, val, settings, steps, objective)
        try:
            result = _compare(fits, hyperparameters, module.automatic_optimization, rtol)
        except MisconfigurationException as refusal:
            result = HypergradcheckResult((), (f"the callback refuses the module. {refusal}",))
    print(result)
    if raise_exception and not result.passed:
        raise HypergradcheckError(result)
    return result


@dataclass(frozen=True)
class _Observation:
    """What a callback has measured: hypergradients by name, each ``[*H]``, and the objective."""

    hypergradients: Mapping[str, Tensor]
    objective: float

    def along(self, name: str, direction: Tensor) -> float:
        """Return the derivative along a direction ``[*H]``."""
        return float((self.hypergradients[name].double().cpu() * direction).sum())

    def size(self, name: str, direction: Tensor) -> float:
        """Return the size of the derivative's parts along a direction ``[*H]``."""
        return float((self.hypergradients[name].double().cpu() * direction).norm())


def _compare(
    fits: Fits, selection: Selection, automatic: bool, rtol: float
) -> HypergradcheckResult:
    """Make all runs and compare them."""
    callback = RTHO(selection, **fits.observing)
    trace = StepTrace()
    forward = _observe(fits, callback, trace)
    reverse = _observe_reverse(fits, selection, forward) if automatic else None
    start = callback.schedule.start
    objective = fits.objective_at(start)
    rows, kinked = [], False
    for number, name in enumerate(start):
        row, has_kink = _check(fits, start, name, number, objective, (forward, reverse), rtol)
        rows.append(row)
        kinked |= has_kink and not row.agrees
    if all(row.agrees for row in rows):
        return HypergradcheckResult(tuple(rows))
    replayed = all(
        abs(observed.objective - objective) <= _NOISE * abs(objective)
        for observed in (forward, reverse)
        if observed is not None
    )
    again = fits.objective_at(start)
    causes = likely_causes(trace, kinked, replayed, (objective, again))
    return HypergradcheckResult(tuple(rows), tuple(causes))


def _observe(fits: Fits, callback: HypergradientCallback, *others: StepTrace) -> _Observation:
    """Compute the hypergradients of one run."""
    fits.fit(callback, *others)
    if not callback.schedule:
        raise MisconfigurationException(
            "It measured no hypergradient: the run ended early, or its loss is not finite."
        )
    return _Observation(callback.hypergradients, callback.schedule[-1].outer_objective)


def _observe_reverse(fits: Fits, selection: Selection, forward: _Observation) -> _Observation:
    """Compute them by reverse mode; NaN where a step that runs again has another gradient."""
    try:
        return _observe(fits, TRHO(selection, **fits.observing))
    except MisconfigurationException as refusal:
        # Forward mode, which runs no step twice, has met no such gradient.
        if not isinstance(refusal.__cause__, GradientMismatchError):
            raise
    unknown = {k: torch.full_like(v, math.nan) for k, v in forward.hypergradients.items()}
    return _Observation(unknown, math.nan)


def _check(
    fits: Fits,
    start: Mapping[str, Tensor],
    name: str,
    number: int,
    objective: float,
    observations: tuple[_Observation, _Observation | None],
    rtol: float,
) -> tuple[HypergradcheckRow, bool]:
    """Compare one hyperparameter; tell also whether the run has a kink there."""
    forward, reverse = observations
    direction = _direction(start[name], seed=number)
    by_forward = forward.along(name, direction)
    by_reverse = None if reverse is None else reverse.along(name, direction)
    analytic = [value for value in (by_forward, by_reverse) if value is not None]
    tolerance = rtol * forward.size(name, direction) + _NOISE * abs(objective)
    along = partial(_objective_along, fits, start, name, direction)
    found = Differences.of(along, objective, analytic, tolerance)
    tolerance = max(tolerance, rtol * abs(found.value) + _NOISE * abs(objective))
    unit = direction.item() if direction.dim() == 0 else 1.0
    row = HypergradcheckRow(
        name=name,
        value=start[name].mean().item(),
        forward=by_forward / unit,
        reverse=None if by_reverse is None else by_reverse / unit,
        differences=found.value / unit,
        step=found.step,
        agrees=all(abs(value - found.value) <= tolerance for value in analytic),
    )
    return row, found.has_kink(tolerance)


def _direction(value: Tensor, seed: int) -> Tensor:
    """Return the direction ``[*H]`` to move a value in: each entry by its size, up or down."""
    value = value.double().cpu()
    size = torch.where(value == 0, 1.0, value.abs())
    if value.dim() == 0:
        return size
    signs = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(seed))
    return size * (2 * signs - 1)


def _objective_along(
    fits: Fits, start: Mapping[str, Tensor], name: str, direction: Tensor, t: float
) -> float:
    """Return the outer objective of a run with one value moved by t times a direction ``[*H]``."""
    return fits.objective_at({**start, name: start[name].cpu() + t * direction})
