"""What a window of training steps leaves behind, to be read backwards."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_rtho.hypergradient._base import OptimizerStep, Recollection, Replay
from lightning_rtho.hypergradient._kept_step import without_gradients
from lightning_rtho.linearization import Linearization, TracedLoss

__all__ = ["RecordedStep", "Tape"]


class RecordedStep(NamedTuple):
    """One optimizer step of the past.

    Attributes:
        step: The step, with copies of its tensors.
        linearizations: One for each micro-batch of its gradient, from last to first, to be read
            once: some are made as they are asked for.
        is_sampled: Whether they are of samples, whose gradients are not the step's.
    """

    step: OptimizerStep
    linearizations: Iterable[Linearization]
    is_sampled: bool = False

    def after_update(self) -> "RecordedStep":
        """Let the gradients go, once they are pulled back through the update and need no check."""
        if self.step.is_traced is None:
            return self
        return self._replace(step=without_gradients(self.step))


class Tape(ABC):
    """Records a window of optimizer steps.

    Attributes:
        needs_replay: Whether it computes losses again.
    """

    needs_replay: ClassVar[bool]

    @abstractmethod
    def start(self, params: Sequence[Tensor], buffers: Iterable[Tensor]) -> None:
        """Prepare for a forward pass.

        Args:
            params: All weights, each ``[*P]``.
            buffers: What forward passes may overwrite, each ``[*B]``.
        """

    @abstractmethod
    def record(
        self,
        loss: TracedLoss,
        replay: Replay | None,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
    ) -> list[Tensor | None] | None:
        """Keep what is needed to linearize a loss later.

        Args:
            loss: The loss with its graph.
            replay: Computes it again; may be None unless :attr:`needs_replay`.
            params: Weights, each ``[*P]``.
            hypers: Hyperparameters, each ``[*H]``.

        Returns:
            The gradients by the weights, each ``[*P]``, if they were computed.
        """

    @abstractmethod
    def advance(self, step: OptimizerStep, params: Sequence[Tensor]) -> None:
        """Keep what an optimizer step, about to be made, was.

        Args:
            step: The step.
            params: All weights, each ``[*P]``.
        """

    @abstractmethod
    def backward(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> Iterator[RecordedStep]:
        """Yield the steps from last to first and let them go; the weights end as they began.

        Args:
            params: All weights, each ``[*P]``.
            hypers: Hyperparameters, at the values they had in the window, each ``[*H]``.
        """

    @abstractmethod
    def __len__(self) -> int:
        """Number of steps."""

    @abstractmethod
    def clear(self) -> None:
        """Forget all steps; let go of what was held, and of memory for the next."""

    @abstractmethod
    def state_dict(self) -> list[dict[str, Any]] | None:
        """Return the steps so far, in plain values; None if they cannot be had."""

    @abstractmethod
    def load_state_dict(
        self,
        state: list[dict[str, Any]] | None,
        recollection: Recollection,
        device: torch.device,
    ) -> None:
        """Take in the steps of another tape.

        Args:
            state: What :meth:`state_dict` returned; None leaves the window empty.
            recollection: What belongs to the state but is not in it.
            device: Where the weights are.
        """
