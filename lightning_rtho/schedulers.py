"""Learning-rate schedulers under a tuned learning rate: the rate is the base that they shape.

Every schedule here is homogeneous: with all rates it was made of multiplied by r, each of its
rates is multiplied by r. So moving the base moves the whole schedule, past and future, and the
derivative of a scheduled rate by the base is their quotient.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler, swa_utils

__all__ = ["check_schedulers", "cycled_settings", "rescale", "separate_rates"]

_KNOWN = frozenset({
    lr_scheduler.ChainedScheduler,
    lr_scheduler.ConstantLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.CyclicLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.LambdaLR,
    lr_scheduler.LinearLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.OneCycleLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.ReduceLROnPlateau,
    lr_scheduler.SequentialLR,
    lr_scheduler.StepLR,
    swa_utils.SWALR,
})

_GROUP_RATES = ("lr", "initial_lr", "max_lr", "min_lr", "swa_lr")
"""Rates that schedulers keep in a parameter group."""

_LISTED_RATES = ("base_lrs", "max_lrs", "min_lrs", "_last_lr")
"""Rates that schedulers keep themselves, one a group."""


def _flatten(schedulers: Sequence[Any]) -> Iterator[Any]:
    """Yield the schedulers and those nested in them."""
    for scheduler in schedulers:
        yield scheduler
        # Private: `SequentialLR` and `ChainedScheduler` hand out their parts in no other way.
        yield from _flatten(getattr(scheduler, "_schedulers", ()))


def cycled_settings(schedulers: Sequence[Any]) -> set[str]:
    """Return the settings beside the learning rate that schedulers write to.

    Args:
        schedulers: The optimizer's schedulers.

    Returns:
        Names of settings.
    """
    cycles = any(getattr(scheduler, "cycle_momentum", False) for scheduler in _flatten(schedulers))
    return {"momentum", "beta1"} if cycles else set()


def check_schedulers(schedulers: Sequence[Any], one_rate: bool) -> None:
    """Check that a tuned learning rate can be the base of these schedules.

    Args:
        schedulers: The optimizer's schedulers.
        one_rate: Whether one hyperparameter is the learning rate of all groups.

    Raises:
        TypeError: If a scheduler is not known to be homogeneous.
        ValueError: If groups of different rates share one least rate that is not 0, or a cycle has
            lost its upper rate.
    """
    for scheduler in _flatten(schedulers):
        if not _is_known(type(scheduler)):
            raise TypeError(
                f"`lr` cannot be tuned under the scheduler `{type(scheduler).__name__}`, of which "
                "it is not known how it follows from its base. Use one of torch's own, such as "
                "LambdaLR, or derive it from one and leave its methods as they are."
            )
        if isinstance(scheduler, lr_scheduler.CyclicLR):
            pairs = zip(scheduler.max_lrs, scheduler.base_lrs, strict=True)
            if any(isinstance(high, Tensor) and high == low for high, low in pairs):
                raise ValueError(
                    "`max_lr` of CyclicLR must be a number where `lr` is tuned: torch writes "
                    "`base_lr` into the rate before it reads `max_lr`, so that nothing cycles. "
                    "Pass `max_lr=float(self.lr)`; the whole cycle follows the tuned rate."
                )
        if getattr(scheduler, "eta_min", 0) != 0 and not one_rate:
            raise ValueError(
                f"`eta_min` of {type(scheduler).__name__} must be 0 where parameter groups have "
                f"learning rates of their own, got {scheduler.eta_min}: it is shared by all of "
                "them and would have to scale with each. For one rate of all groups declare it, "
                "`self.lr = Hyperparameter(...)`, and pass it to the optimizer as `lr=self.lr`."
            )


def _is_known(kind: type) -> bool:
    """Tell whether a class of schedulers is homogeneous: a known one, or made as one is made."""
    known = next((base for base in kind.__mro__ if base in _KNOWN), None)
    return known is not None and all(
        getattr(kind, name) is getattr(known, name)
        for name, _ in inspect.getmembers(known, inspect.isfunction)
        if name != "__init__"
    )


def separate_rates(schedulers: Sequence[Any], groups: Sequence[dict[str, Any]]) -> None:
    """Give each group its own rate where all rates were written into one tensor, the last one last.

    So torch's LambdaLR does with functions for each of several groups that share a hyperparameter.

    Args:
        schedulers: The optimizer's schedulers.
        groups: The optimizer's parameter groups, whose rates are numbers by now.
    """
    if len(schedulers) == 1 and isinstance(schedulers[0], lr_scheduler.LambdaLR):
        (scheduler,) = schedulers
        parts = zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=False)
        for group, base, factor in parts:
            group["lr"] = float(base) * factor(scheduler.last_epoch)


def rescale(
    schedulers: Sequence[Any], groups: Sequence[dict[str, Any]], ratios: Sequence[float]
) -> None:
    """Multiply the base of every schedule, and with it the rates that follow from it.

    Args:
        schedulers: The optimizer's schedulers, each known to :func:`check_schedulers`.
        groups: The optimizer's parameter groups.
        ratios: New base over old base, one a group.
    """
    for group, ratio in zip(groups, ratios, strict=True):
        for key in _GROUP_RATES:
            if key in group:
                group[key] = float(group[key]) * ratio
    for scheduler in _flatten(schedulers):
        for name in _LISTED_RATES:
            rates = getattr(scheduler, name, None)
            if rates is not None:
                # Torch does not tell them of groups that are added later.
                scaled = [float(rate) * r for rate, r in zip(rates, ratios, strict=False)]
                setattr(scheduler, name, scaled)
        if hasattr(scheduler, "eta_min"):
            scheduler.eta_min *= ratios[0]
