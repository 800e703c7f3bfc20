"""Running statistics of batch normalization: training state that no optimizer moves.

A model is validated with the statistics that its training forward passes left behind, so they
carry a part of the outer objective's dependence on the hyperparameters.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

__all__ = ["RunningStatistics", "StatisticUpdate", "TracedLoss"]


@dataclass(frozen=True)
class StatisticUpdate:
    """What one forward pass does to one running statistic r: r' = (1 - factor) r + factor s(w).

    Attributes:
        buffer: Position of r among all running statistics.
        factor: Weight of the new statistic.
        statistic: s, with its graph ``[*B]``.
    """

    buffer: int
    factor: float
    statistic: Tensor


@dataclass(frozen=True)
class TracedLoss:
    """Loss of one micro-batch and what computing it did to the running statistics.

    Attributes:
        value: The loss ``[]`` with its graph.
        updates: Updates of running statistics, in the order in which they were made.
        scale: What `value` is multiplied by, to keep small float16 gradients from vanishing; the
            optimizer's gradient is freed of it.
        is_shared: Whether parts of its graph may be those of another loss, too.
    """

    value: Tensor
    updates: tuple[StatisticUpdate, ...] = ()
    scale: float = 1.0
    is_shared: bool = False


@final
class RunningStatistics:
    """The running means and variances of a module's batch-normalization layers.

    Args:
        module: The module; its layers may be trained, frozen or absent.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> statistics = RunningStatistics(norm)
        >>> statistics.start()
        >>> _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> [(update.factor, update.statistic.tolist()) for update in statistics.collect()]
        [(0.1, [2.0]), (0.1, [2.0])]
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None
        ]
        self._handles: list[RemovableHandle] = []
        self._updates: list[StatisticUpdate] = []

    @property
    def buffers(self) -> list[Tensor]:
        """Running mean and variance of each layer in turn, each ``[*B]``."""
        pairs = [(norm.running_mean, norm.running_var) for norm in self._norms]
        return [buffer for pair in pairs for buffer in pair if buffer is not None]

    def start(self) -> None:
        """Watch the coming forward passes."""
        self.collect()
        self._handles = [
            norm.register_forward_pre_hook(self._watch, with_kwargs=True) for norm in self._norms
        ]

    def collect(self) -> tuple[StatisticUpdate, ...]:
        """Stop watching and return the updates seen."""
        for handle in self._handles:
            handle.remove()
        updates, self._updates, self._handles = tuple(self._updates), [], []
        return updates

    def _watch(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Compute what the layer is about to average into its buffers, differentiably."""
        assert isinstance(norm, _BatchNorm)
        if not norm.training:
            return
        factor = norm.momentum
        if factor is None:  # the mean over all batches so far
            assert norm.num_batches_tracked is not None
            factor = 1 / (norm.num_batches_tracked.item() + 1)
        assert norm.running_mean is not None
        x = _input(*args, **kwargs).to(norm.running_mean.dtype)
        axes = [axis for axis in range(x.dim()) if axis != 1]
        first = 2 * next(i for i, known in enumerate(self._norms) if known is norm)
        self._updates += [
            StatisticUpdate(first, factor, x.mean(axes)),
            StatisticUpdate(first + 1, factor, x.var(axes)),
        ]

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """Let forward passes in evaluation mode depend differentiably on the statistics.

        Yields:
            Copies of the statistics that require grad, each ``[*B]``; torch's own kernel has no
            derivative by them.
        """
        leaves = [buffer.detach().clone().requires_grad_() for buffer in self.buffers]

        def normalize(
            norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> Tensor:
            assert isinstance(norm, _BatchNorm)
            if norm.training:
                return output
            first = 2 * next(i for i, known in enumerate(self._norms) if known is norm)
            shape = [1, -1, *[1] * (output.dim() - 2)]
            mean, var = (leaf.reshape(shape) for leaf in leaves[first : first + 2])
            normal: Tensor = (_input(*args, **kwargs) - mean) * torch.rsqrt(var + norm.eps)
            if norm.affine:
                normal = normal * norm.weight.reshape(shape) + norm.bias.reshape(shape)
            return normal.to(output.dtype)

        handles = [norm.register_forward_hook(normalize, with_kwargs=True) for norm in self._norms]
        try:
            yield leaves
        finally:
            for handle in handles:
                handle.remove()


def _input(input: Tensor) -> Tensor:
    """Return the argument of a layer, whether it was called with its name or without."""
    return input
