"""Hessian products on some examples of a batch, below the cost of exact ones."""

import random
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

__all__ = ["CurvatureSample"]

_TOLERANCE = 0.01
"""Of the largest loss: above the rounding of bfloat16, below what a sum or a batch term changes."""

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@final
class CurvatureSample:
    """Draws the examples of each micro-batch that Hessian products are taken on.

    The mean over examples that are drawn without replacement is an unbiased estimate of the mean
    over all of them, and so is every derivative of it. What is drawn depends on the seed, the
    process and the place in the run, and on no other random numbers.

    Args:
        fraction: Share of the examples, in (0, 1).
        rank: Number of the process; each draws for itself.

    Attributes:
        is_checked: Whether the loss has been found to be a mean.

    Example:
        >>> sample = CurvatureSample(0.5, rank=0)
        >>> sample.draw([torch.arange(4), "name"], 0, 0)
        [tensor([...]), 'name']
    """

    def __init__(self, fraction: float, rank: int) -> None:
        self.fraction = fraction
        self.is_checked = False
        self._rank = rank
        self._seed = torch.initial_seed()

    def state_dict(self) -> dict[str, Any]:
        """Return what further draws depend on."""
        return {"seed": self._seed, "is_checked": self.is_checked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where another one stood.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._seed, self.is_checked = state["seed"], state["is_checked"]

    def draw(self, batch: Any, *place: int) -> Any:
        """Draw examples of a batch.

        Args:
            batch: Tensors whose first axis is that of the examples, in any collection.
            place: Where the run stands.

        Returns:
            The batch with the drawn examples alone, at least one.

        Raises:
            MisconfigurationException: If no tensor tells how many examples there are.
        """
        size = _size(batch)
        count = max(1, round(self.fraction * size))
        key = repr((self._seed, self._rank, *place))
        return _take(batch, sorted(random.Random(key).sample(range(size), count)), size)

    def check(self, batch: Any, module: LightningModule, loss: Callable[[Any], Tensor]) -> None:
        """Refuse a loss that is not a mean over examples, at most with terms that see none.

        Args:
            batch: A batch; one of a single example tells nothing.
            module: The module; random layers like dropout are off meanwhile.
            loss: Gives the loss ``[]`` of a batch or of a part of it.

        Raises:
            MisconfigurationException: If the loss is not the mean of those of two halves.
        """
        modes = [(submodule, submodule.training) for submodule in module.modules()]
        if any(is_training and isinstance(sub, _BATCH_NORMS) for sub, is_training in modes):
            raise MisconfigurationException(
                f"`curvature_fraction` must be 1 with batch normalization, got {self.fraction}: "
                "its statistics are those of the whole batch."
            )
        size = _size(batch)
        if size < 2:
            return
        halves = [range(size // 2), range(size // 2, size)]
        module.eval()
        try:
            whole = loss(batch).item()
            parts = [loss(_take(batch, half, size)).item() for half in halves]
        finally:
            for submodule, is_training in modes:
                submodule.training = is_training
        mean = sum(len(half) / size * part for half, part in zip(halves, parts, strict=True))
        if abs(mean - whole) > _TOLERANCE * max(map(abs, [whole, *parts])):
            raise MisconfigurationException(
                f"`curvature_fraction` must be 1 for this loss, got {self.fraction}: of a batch it "
                f"is {whole:.6g}, but the mean of its halves' is {mean:.6g}. Parts of a batch can "
                "stand for it where the loss is a mean over its examples, without noise of its own."
            )
        self.is_checked = True


def _size(batch: Any) -> int:
    """Return how many examples a batch has: the length of its first tensor that has axes."""
    lengths: list[int] = []
    try:
        apply_to_collection(batch, Tensor, lambda x: lengths.append(len(x)) if x.dim() else None)
    except ValueError as error:
        raise MisconfigurationException(
            "`curvature_fraction` must be 1 for batches with frozen dataclasses, of which no "
            "examples can be taken. Unfreeze them, or use dicts or tuples."
        ) from error
    if not lengths:
        raise MisconfigurationException(
            f"`curvature_fraction` must be 1 for a batch without tensors, got a {type(batch)}."
        )
    return lengths[0]


def _take(batch: Any, rows: Sequence[int], size: int) -> Any:
    """Copy some rows of tensors that have a row for each of the `size` examples, and all others."""

    def take(x: Tensor) -> Tensor:
        if x.dim() and len(x) == size:
            return x[torch.tensor(rows, device=x.device)]
        return x.clone()

    return apply_to_collection(batch, Tensor, take)
