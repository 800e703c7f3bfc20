"""Hyperparameters on a progress bar, readable however small they are."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme

__all__ = ["ReadableBar"]


class ReadableBar:
    """Lets a bar show hyperparameters to three significant digits.

    Lightning's Rich bar shows every metric to three decimals, so a rate of 1e-4 as 0.000. Its TQDM
    bar shows three significant digits, a bar with a format of its own what its user asked for: both
    are left alone. What a bar shows is what ``get_metrics`` returns, which Lightning lets be
    replaced; text stands on the bar as it is.

    Args:
        bar: The trainer's progress bar, or None.
        prefix: What the names of hyperparameters begin with.
    """

    def __init__(self, bar: ProgressBar | None, prefix: str) -> None:
        self._bar = bar if isinstance(bar, RichProgressBar) and _is_fixed_point(bar) else None
        self._prefix = prefix
        if self._bar is not None:
            self._own = self._bar.get_metrics
            self._bar.get_metrics = self._get_metrics  # type: ignore[method-assign]

    def _get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = self._own(trainer, pl_module)
        return {
            name: f"{value:.3g}"
            if name.startswith(self._prefix) and isinstance(value, float)
            else value
            for name, value in metrics.items()
        }

    def end(self) -> None:
        """Give the bar its own method back."""
        if self._bar is not None:
            vars(self._bar).pop("get_metrics", None)


def _is_fixed_point(bar: RichProgressBar) -> bool:
    return bar.theme.metrics_format == RichProgressBarTheme().metrics_format
