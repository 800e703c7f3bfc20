"""Gradient clipping by Lightning, taken down where it happens."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho.linearization import ClipByNorm, ClipByValue, GradientClip
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["NotedClipping"]


class NotedClipping:
    """Stands in for a module's ``clip_gradients``, by which every clipping of Lightning goes.

    That is the trainer's own, one of another value in ``configure_gradient_clipping``, and one in
    manual optimization.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._noted: dict[Optimizer, tuple[GradientClip, dict[Tensor, Tensor]]] = {}

    def start(self) -> None:
        """Stand in for the method."""
        vars(self._module)["clip_gradients"] = self._clip_gradients

    def stop(self) -> None:
        """Give the method back."""
        vars(self._module).pop("clip_gradients", None)
        self._noted = {}

    def take(
        self, optimizer: DifferentiableOptimizer
    ) -> tuple[GradientClip | None, Mapping[Tensor, Tensor]]:
        """Return how the gradients of the coming update were clipped, and what they were before.

        Args:
            optimizer: The optimizer.

        Returns:
            The clipping and the gradients, each ``[*P]``; None and nothing if they were not.
        """
        return self._noted.pop(optimizer, (None, {}))

    def _clip_gradients(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        known = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        trainer = self._module.trainer
        limit = trainer.gradient_clip_val if gradient_clip_val is None else gradient_clip_val
        clip = _clipping(limit, gradient_clip_algorithm or trainer.gradient_clip_algorithm)
        if isinstance(known, DifferentiableOptimizer) and clip is not None:
            raw = {p: p.grad.detach().clone() for p in known.params if p.grad is not None}
            self._noted[known] = clip, raw
        type(self._module).clip_gradients(
            self._module, optimizer, gradient_clip_val, gradient_clip_algorithm
        )


def _clipping(limit: Any, algorithm: str | None) -> GradientClip | None:
    """Return what Lightning does by these settings; it refuses those that are none itself."""
    if not isinstance(limit, int | float) or limit <= 0:
        return None
    by_value = algorithm is not None and algorithm.lower() == "value"
    return ClipByValue(float(limit)) if by_value else ClipByNorm(float(limit))
