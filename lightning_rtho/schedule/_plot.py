"""Drawing a schedule."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["plot"]

_LINES = 10
"""Entries of one hyperparameter that are drawn."""


def plot(state: Mapping[str, Any]) -> Any:
    """Draw a column for each hyperparameter and one for the outer objective.

    Args:
        state: The state of a `Schedule`.

    Returns:
        The ``matplotlib.figure.Figure``.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no update to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "`plot` needs matplotlib: pip install 'lightning-rtho[examples]'."
        ) from None
    updates = state["updates"]
    if not updates:
        raise ValueError("A schedule without updates cannot be drawn. Run `trainer.fit` first.")
    names = list(updates[0]["values"])
    steps = [update["step"] for update in updates]
    figure = Figure(figsize=(4 * (len(names) + 1), 6), layout="constrained")
    axes = figure.subplots(2, len(names) + 1, sharex=True, squeeze=False)
    for column, name in enumerate(names):
        values = [update["values"][name] for update in updates]
        at = steps
        if name in state["start"]:
            at, values = [0, *steps], [state["start"][name], *values]
        _draw(axes[0, column], at, values, drawstyle="steps-post")
        _draw(axes[1, column], steps, [update["hypergradients"][name] for update in updates])
        axes[0, column].set_title(name)
        axes[1, column].set_title(f"dE/d({name})")
        axes[1, column].axhline(0, color="0.7", linewidth=0.8, zorder=0)
        if state["domains"].get(name) == "Positive()":
            axes[0, column].set_yscale("log")
    axes[1, -1].remove()
    objective = axes[0, -1]
    objective.set_subplotspec(objective.get_gridspec()[:, -1])  # both rows
    objective.tick_params(labelbottom=True)
    objective.plot(steps, [update["outer_objective"] for update in updates])
    objective.set_title("Outer objective E")
    for ax in figure.axes:
        ax.grid(alpha=0.25)
    figure.supxlabel("Optimizer step", fontsize="medium")
    return figure


def _draw(axes: Any, steps: list[int], values: list[Tensor], **style: Any) -> None:
    """Draw the first entries of values over steps."""
    lines = [value.detach().cpu().flatten()[:_LINES].tolist() for value in values]
    axes.plot(steps, lines, **style)
