"""A torchmetrics metric as the outer objective."""

import inspect
import sys
from collections.abc import Iterable
from typing import Any, NoReturn, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric

from lightning_rtho.callbacks._detached import DetachedWeights

__all__ = ["MetricObjective"]


@final
class MetricObjective:
    """A metric M as a differentiable function to be minimized: E = M, or -M where more is better.

    Works on a copy: the metric it is given, and what that has accumulated, stay as they are.

    Args:
        metric: The metric.

    Attributes:
        sign: E / M: -1 for a metric that is to be maximized, else 1.

    Raises:
        TypeError: If it is not a metric.
        ValueError: If it is not differentiable, or does not say whether more or less is better.

    Example:
        >>> from torchmetrics import MeanSquaredError
        >>> preds = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> MetricObjective(MeanSquaredError())([(preds, torch.tensor([1.0, 1.0]))])
        tensor(2., grad_fn=<...>)
    """

    def __init__(self, metric: Metric) -> None:
        if not isinstance(metric, Metric):
            raise TypeError(
                f"`objective` must be a torchmetrics metric, got {metric!r}. Pass an instance such "
                "as `torchmetrics.MeanSquaredError()`, or leave it out and return the loss from "
                "`validation_step`."
            )
        self._name = type(metric).__name__
        if metric.is_differentiable is not True:
            raise ValueError(
                f"`objective` must be a differentiable metric, got `{self._name}`, whose "
                f"`is_differentiable` is {metric.is_differentiable}. {_advice(metric)}"
            )
        if metric.higher_is_better is None:
            raise ValueError(
                f"`objective` must say whether more is better, got `{self._name}`, whose "
                "`higher_is_better` is None. Pass an instance of a subclass that sets it: False "
                "to minimize the metric, True to maximize it."
            )
        self.sign = -1 if metric.higher_is_better else 1
        self._metric = metric.clone()
        self._metric.reset()

    def match(self, module: LightningModule) -> None:
        """Move to the device of a module, and to double precision where it has that.

        Args:
            module: The module.
        """
        self._metric.to(module.device)
        if module.dtype is torch.float64:  # `to` leaves the precision of metrics alone
            self._metric.set_dtype(torch.float64)

    def __call__(self, pairs: Iterable[tuple[Any, Any]]) -> Tensor:
        """Evaluate E over all batches together, with its graph.

        Args:
            pairs: Predictions and targets of each batch.

        Returns:
            E ``[]``.

        Raises:
            MisconfigurationException: If it is not a scalar that depends on the predictions, or
                depends on them otherwise than its graph shows.
        """
        metric, methods = self._metric, type(self._metric)
        predicted = list(pairs)
        with DetachedWeights(()) as watch:
            # Methods of the instance are wrapped, to run without gradients and to wait for others.
            for preds, target in predicted:
                methods.update(metric, preds, target)
            value = methods.compute(metric)
            if isinstance(value, Tensor) and watch.entries_of(value):
                self._refuse("detaches a part of what it makes of them")
        metric.reset()
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise MisconfigurationException(
                f"`objective` must be a metric with one value, got `{self._name}`, which computes "
                f"{value!r}. Let its options average over outputs or classes."
            )
        if not value.requires_grad:
            self._refuse(
                "has no graph: the metric, or the step that makes the predictions, detaches or "
                "rounds them"
            )
        return self.sign * value.reshape(())

    def _refuse(self, reason: str) -> NoReturn:
        """Refuse a metric whose derivative would be wrong."""
        raise MisconfigurationException(
            "`objective` must be a metric that depends on the predictions differentiably, got "
            f"`{self._name}`, which {reason}. Return a differentiable loss from `validation_step`, "
            "without `objective`."
        )


def _advice(metric: Metric) -> str:
    """Name the differentiable metrics of the same subpackage."""
    family = sys.modules.get(type(metric).__module__.rpartition(".")[0])
    found = sorted(
        name
        for name, cls in vars(family).items()
        if inspect.isclass(cls) and issubclass(cls, Metric) and cls.is_differentiable is True
    )
    others = (
        f"Differentiable ones of its family: {', '.join(found)}. Or return" if found else "Return"
    )
    return f"{others} a differentiable loss from `validation_step`, without `objective`."
