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
        gradients: Gradients, or tangents of them, that it keeps beside training states.
        place: Where it keeps all that, if that is not beside the weights.
    """

    name: str
    cost: Cost
    reach: str
    gradients: int = 0
    place: str = ""


def summary_of(
    tuned: Mapping[str, Hyperparameter],
    optimizers: Sequence[DifferentiableOptimizer],
    plan: Plan,
    *,
    evaluations: float = 0.0,
    keeps_best: bool = False,
    other: Plan | None = None,
) -> str:
    """Write down what is tuned, how, and what it will cost.

    A hyperparameter that stands in no optimizer has to act in the loss. Whether one that does acts
    there as well is not known before the first step. What a step needs while its second derivatives
    are computed, and graphs that are kept, depend on the network: they are named, not counted.

    Args:
        tuned: Hyperparameters by name, each ``[*H]``.
        optimizers: The module's optimizers.
        plan: The method.
        evaluations: Validation gradients a step.
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
        >>> print(summary_of({"lr": lr}, [sgd], plan, evaluations=0.1))
        name | value | domain     | acts as
        -----+-------+------------+--------
        lr   | 0.1   | Positive() | lr
        RTHO() looks back over the whole run.
        Time: 3.1 x the gradient of a plain step, if validation batches are as large as its own.
        Memory: keeps 2 MB: 1 training state of 2 MB. Second derivatives within a step come on top.
    """
    rows = [
        (name, _value(hyper), repr(hyper.domain), _place(hyper, optimizers))
        for name, hyper in tuned.items()
    ]
    lines = [
        *_table([("name", "value", "domain", "acts as"), *rows]),
        f"{plan.name} looks back over {plan.reach}.",
        f"Time: {plan.cost.ratio + evaluations:.1f} x the gradient of a plain step, if validation "
        "batches are as large as its own.",
        f"Memory: keeps {_memory(plan, optimizers, keeps_best)}. {_uncounted(plan)} on top.",
    ]
    if other is not None and other.cost.ratio < plan.cost.ratio:
        lines.append(
            f"{other.name} would take {other.cost.ratio + evaluations:.1f} x, but keep "
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


def _memory(plan: Plan, optimizers: Sequence[DifferentiableOptimizer], keeps_best: bool) -> str:
    """Say what is kept beside what plain training keeps."""
    state_size = sum(optimizer.state_size() for optimizer in optimizers)
    weights = [w for optimizer in optimizers for w in optimizer.params if w.requires_grad]
    gradient_size = sum(weight.nbytes for weight in weights)
    total = (plan.cost.states + keeps_best) * state_size + plan.gradients * gradient_size
    parts = [f"{_count(plan.cost.states, 'training state')} of {_size(state_size)}"]
    if plan.gradients:
        parts.append(f"{_count(plan.gradients, 'gradient')} of {_size(gradient_size)}")
    if plan.place:
        parts[-1] += f" on {plan.place}"
    if keeps_best:
        parts.append("a copy of the best state so far")
    return f"{_size(total)}: {', '.join(parts)}"


def _uncounted(plan: Plan) -> str:
    """Name what depends on the network."""
    if plan.cost.graphs:
        steps = _count(plan.cost.graphs, "step")
        return f"The graphs of {steps} and second derivatives within one come"
    return "Second derivatives within a step come"


def _count(number: float, noun: str) -> str:
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def _size(count: float) -> str:
    """Show a number of bytes."""
    if count < 1e5:
        return f"{count / 1e3:.3g} kB"
    return f"{count / 1e6:.3g} MB" if count < 1e8 else f"{count / 1e6:,.0f} MB"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of a table whose first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    head, *body = [
        " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return [head, "-+-".join("-" * width for width in widths), *body]
