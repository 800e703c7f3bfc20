"""Running statistics of batch normalization: training state that no optimizer moves.

A model is validated with the statistics that its training forward passes left behind, so they
carry a part of the outer objective's dependence on the hyperparameters.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, final
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_rtho._numerics import version_of

__all__ = ["RunningStatistics", "StatisticUpdate"]


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


@final
class RunningStatistics:
    """The running means and variances of a module's batch-normalization layers.

    Args:
        module: The module; its layers may be trained, frozen or absent.

    Attributes:
        reads_past: Whether a forward pass since :meth:`start` has used statistics that were updated
            before, as a layer does that has been frozen: no derivative by them is followed.
        unwatched: A layer that has changed its statistics by itself, or is none of torch's and has
            let ``F.batch_norm`` change them, between :meth:`start` and :meth:`collect`: that is not
            followed; None if there is none.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> statistics = RunningStatistics(norm)
        >>> statistics.start()
        >>> _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> [(update.factor, update.statistic.tolist()) for update in statistics.collect()]
        [(0.1, [2.0]), (0.1, [2.0])]
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._norms = [
            layer
            for layer in module.modules()
            if isinstance(layer, _BatchNorm) and layer.running_mean is not None
        ]
        self._patch = ExitStack()
        self._traced = True
        self._before: list[tuple[Tensor, int | None]] = []
        self._means: list[Tensor | None] = []
        self._updates: list[StatisticUpdate] = []
        self._moved: set[int] = set()
        self.reads_past = False
        self.unwatched: nn.Module | None = None
        self._strangers: list[Tensor] = []

    @property
    def buffers(self) -> list[Tensor]:
        """Running mean and variance of each layer in turn, each ``[*B]``."""
        pairs = [(norm.running_mean, norm.running_var) for norm in self._norms]
        return [buffer for pair in pairs for buffer in pair if buffer is not None]

    def start(self, *, traced: bool = True) -> None:
        """Watch the coming forward passes.

        Args:
            traced: Whether the statistics that they give are computed, with their graphs; else
                updates tell which ones move, and hold the old in the place of the new.
        """
        self.collect()
        self._traced, self.reads_past = traced, False
        self._before = [(buffer, version_of(buffer)) for buffer in self.buffers]
        self._means = self._running_means()
        # Layers with a `forward` of their own call it, too, each as often as it likes.
        self._patch.enter_context(mock.patch.object(torch, "batch_norm", self._watched))
        self._patch.enter_context(mock.patch.object(torch, "instance_norm", self._watched_instance))

    def collect(self) -> tuple[StatisticUpdate, ...]:
        """Stop watching and return the updates seen."""
        self._patch.close()
        updates, self._updates = tuple(self._updates), []
        seen = {update.buffer for update in updates}
        self._moved |= seen
        # Asked for now: in a functional call others stand in the place of a layer's buffers.
        self.unwatched = self._owner_of_stranger() or self._changed_otherwise(seen)
        self._before, self._strangers = [], []
        return updates

    def forget(self) -> None:
        """Take the statistics for what they are from here on, whatever they came from."""
        self._moved = set()

    def _changed_otherwise(self, seen: Collection[int]) -> nn.Module | None:
        """Find a layer that averages by itself: its buffers changed, but were not seen to."""
        for i, (buffer, before) in enumerate(zip(self.buffers, self._before, strict=False)):
            norm = self._norms[i // 2]
            is_own = type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
            is_same = buffer is before[0] and version_of(buffer) == before[1]
            if is_own and i not in seen and not is_same:
                return norm
        return None

    def _note_stranger(self, mean: Tensor | None, averaged: Tensor) -> None:
        """Note a running mean that is none of ours, if what is averaged depends on weights."""
        if mean is not None and averaged.requires_grad:
            self._strangers.append(mean)

    def _owner_of_stranger(self) -> nn.Module | None:
        """Return a layer that has such a mean; others are passed in from elsewhere."""
        for mean in self._strangers:
            for layer in self._module.modules():
                if any(buffer is mean for buffer in layer._buffers.values()):
                    return layer
        return None

    def _running_means(self) -> list[Tensor | None]:
        """Return those of the layers themselves, where a functional call may put others."""
        return [norm.running_mean for norm in self._norms]

    def _watched(self, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize a batch; compute what is averaged into the buffers, differentiably."""
        call = _Call(*args, **kwargs)
        first = _first_buffer(call.running_mean, self._means)
        if first is not None and call.training:
            assert call.running_mean is not None
            assert call.running_var is not None
            mean, var = call.running_mean, call.running_var
            if self._traced:
                exact = call.input.to(mean.dtype)
                axes = [axis for axis in range(exact.dim()) if axis != 1]
                mean, var = exact.mean(axes), exact.var(axes)
            self._updates += [
                StatisticUpdate(first, call.momentum, mean),
                StatisticUpdate(first + 1, call.momentum, var),
            ]
        elif first in self._moved and torch.is_grad_enabled():
            self.reads_past = True
        elif first is None and call.training:
            self._note_stranger(call.running_mean, call.input)
        return _batch_norm(*call)

    def _watched_instance(self, *args: Any, **kwargs: Any) -> Tensor:
        """Normalize each example; note what is averaged into buffers, which nothing follows."""
        call = _InstanceCall(*args, **kwargs)
        if call.use_input_stats:
            self._note_stranger(call.running_mean, call.input)
        return _instance_norm(*call)

    @contextmanager
    def differentiable(self) -> Iterator[list[Tensor]]:
        """Let forward passes in evaluation mode depend differentiably on the statistics.

        Yields:
            Copies of the statistics that require grad, each ``[*B]``; torch's own kernel has no
            derivative by them.
        """
        leaves = [buffer.detach().clone().requires_grad_() for buffer in self.buffers]
        means = self._running_means()

        def normalize(*args: Any, **kwargs: Any) -> Tensor:
            call = _Call(*args, **kwargs)
            first = _first_buffer(call.running_mean, means)
            if first is None or call.training:
                return _batch_norm(*call)
            shape = [1, -1, *[1] * (call.input.dim() - 2)]
            mean, var = (leaf.reshape(shape) for leaf in leaves[first : first + 2])
            normal = (call.input - mean) * torch.rsqrt(var + call.eps)
            if call.weight is not None:
                normal = normal * call.weight.reshape(shape)
            if call.bias is not None:
                normal = normal + call.bias.reshape(shape)
            return normal.to(call.input.dtype)

        with mock.patch.object(torch, "batch_norm", normalize) if leaves else nullcontext():
            yield leaves


_batch_norm, _instance_norm = torch.batch_norm, torch.instance_norm


class _Call(NamedTuple):
    """Arguments of ``torch.batch_norm``, under their names there."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float
    cudnn_enabled: bool


class _InstanceCall(NamedTuple):
    """Arguments of ``torch.instance_norm``, likewise."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    use_input_stats: bool
    momentum: float
    eps: float
    cudnn_enabled: bool


def _first_buffer(mean: Tensor | None, means: Sequence[Tensor | None]) -> int | None:
    """Return the position of a layer's running mean among all statistics; None for another's."""
    return next((2 * i for i, known in enumerate(means) if known is mean), None)
