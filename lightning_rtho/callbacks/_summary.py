"""The table that is printed before a run: what is tuned, how, and what it will cost."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_rtho.hypergradient import Cost
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["Plan", "summary_of"]


class Plan(NamedTuple):
    """A method as it would follow a run.

    Attributes:
        name: The call that makes it.
        cost: What it costs.
        reach: How far it looks back.
        place: Where it keeps training states, if that is not beside the weights.
    """

    name: str
    cost: Cost
    reach: str
    place: str = ""


def summary_of(
    tuned: Mapping[str, Hyperparameter],
    optimizers: Sequence[DifferentiableOptimizer],
    plan: Plan,
    *,
    keeps_best: bool = False,
    other: Plan | None = None,
) -> str:
    """Write down what is tuned, how, and what it will cost.

    A hyperparameter that stands in no optimizer has to act in the loss. Whether one that does acts
    there as well is not known before the first step.

    Args:
        tuned: Hyperparameters by name, each ``[*H]``.
        optimizers: The module's optimizers.
        plan: The method.
        keeps_best: Whether the best training state is kept to go back to.
        other: The method that could take its place, if one could.

    Returns:
        The text, of several lines.

    Example:
        >>> import torch
        >>> from lightning_rtho import Positive
        >>> from lightning_rtho.hypergradient import forward_cost
        >>> lr = Hyperparameter(0.1, Positive())
        >>> weight = torch.zeros(500_000, requires_grad=True)
        >>> sgd = DifferentiableOptimizer(torch.optim.SGD([weight], lr=lr))
        >>> plan = Plan("RTHO()", forward_cost(1), "the whole run")
        >>> print(summary_of({"lr": lr}, [sgd], plan))
        name | value | domain     | acts as
        -----+-------+------------+--------
        lr   | 0.1   | Positive() | lr
        RTHO() looks back over the whole run.
        Time: 3.0 x the gradient of a plain step (9 forward passes rather than 3).
        Memory: 2 MB above plain training, 1 training state of 2 MB.
    """
    rows = [
        (name, _value(hyper), repr(hyper.domain), _place(hyper, optimizers))
        for name, hyper in tuned.items()
    ]
    state_size = sum(optimizer.state_size() for optimizer in optimizers)
    lines = [
        *_table([("name", "value", "domain", "acts as"), *rows]),
        f"{plan.name} looks back over {plan.reach}.",
        f"Time: {plan.cost.ratio:.1f} x the gradient of a plain step ({plan.cost.passes:.3g} "
        "forward passes rather than 3).",
        f"Memory: {_memory(plan, state_size, keeps_best)}.",
    ]
    if other is not None and other.cost.ratio < plan.cost.ratio:
        lines.append(
            f"{other.name} would take {other.cost.ratio:.1f} x, but keep "
            f"{_count(other.cost.states, 'training state')} and look back over {other.reach}."
        )
    return "\n".join(lines)


def _value(hyper: Hyperparameter) -> str:
    """Show a value; of one with a shape its mean."""
    shown = f"{hyper.plain.mean().item():.4g}"
    return shown if hyper.dim() == 0 else f"{shown}, mean of {list(hyper.shape)}"


def _place(hyper: Hyperparameter, optimizers: Sequence[DifferentiableOptimizer]) -> str:
    """Say where a hyperparameter acts."""
    places = []
    for number, optimizer in enumerate(optimizers, start=1):
        for setting in sorted(optimizer.tuned_settings):
            groups = [g for g, other in optimizer.acting_as(setting).items() if other is hyper]
            if not groups:
                continue
            place = setting
            if len(optimizer.param_groups) > 1:
                numbers = ", ".join(str(group + 1) for group in groups)
                place += f" of group{'s' if len(groups) > 1 else ''} {numbers}"
            if len(optimizers) > 1:
                place += f" in optimizer {number}"
            places.append(place)
    return "; ".join(places) or "loss"


def _memory(plan: Plan, state_size: int, keeps_best: bool) -> str:
    """Say what is kept beside what plain training keeps."""
    total = (plan.cost.states + keeps_best) * state_size
    text = f"{_megabytes(total)} above plain training, "
    text += f"{_count(plan.cost.states, 'training state')} of {_megabytes(state_size)}"
    if plan.place:
        text += f" on {plan.place}"
    if keeps_best:
        text += " and a copy of the best one so far"
    if plan.cost.graphs:
        text += f", and besides the graphs of {_count(plan.cost.graphs, 'step')}"
    return text


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def _megabytes(size: float) -> str:
    """Show a number of bytes."""
    megabytes = size / 1e6
    return f"{megabytes:,.0f} MB" if megabytes >= 100 else f"{megabytes:.3g} MB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [head, "-+-".join("-" * width for width in widths), *body]
