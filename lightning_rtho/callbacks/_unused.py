"""Hyperparameters that act nowhere: one that was declared and forgotten, or written over."""

from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.linearization import unheard
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["UnusedHyperparameters"]


class UnusedHyperparameters:
    """Those that have been seen to act neither in an optimizer nor in a loss.

    Args:
        module: The module, which declares them.
        tuned: Hyperparameters by name, each ``[*H]``.
        optimizers: Where some of them act.
    """

    def __init__(
        self,
        module: nn.Module,
        tuned: Mapping[str, Hyperparameter],
        optimizers: Sequence[DifferentiableOptimizer],
    ) -> None:
        self._left, self._optimizers = dict(tuned), optimizers
        names = {id(hyper): name for name, hyper in tuned.items()}
        self._places = [
            (names[id(value)], holder, attribute, value)
            for holder in module.modules()
            for attribute, value in vars(holder).items()
            if id(value) in names
        ]
        self._replaced: set[str] = set()
        self._has_looked = False
        self._strike_off_settings()

    def warn_of_replaced(self) -> None:
        """Warn of one whose attribute holds something else by now."""
        for name, holder, attribute, hyper in self._places:
            present = vars(holder).get(attribute)
            if present is not hyper and name not in self._replaced:
                self._replaced.add(name)
                rank_zero_warn(
                    f"`{name}` is tuned, but its attribute holds {present!r} by now: what is tuned "
                    "acts there no more. Leave the attribute to the callback, or name the "
                    "hyperparameters to tune, as in `RTHO(['lr'])`."
                )

    def _strike_off_settings(self) -> None:
        """Strike off those that stand in a group of an optimizer by now."""
        acting = {id(h) for optimizer in self._optimizers for h in optimizer.hyperparameters}
        self._left = {name: h for name, h in self._left.items() if id(h) not in acting}

    def look_into(self, loss: Tensor) -> None:
        """Strike off those on which a loss depends.

        Args:
            loss: The loss ``[]``, with its graph.
        """
        self._has_looked = True
        if self._left and loss.requires_grad:
            with unheard():
                found = torch.autograd.grad(
                    loss, list(self._left.values()), retain_graph=True, allow_unused=True
                )
            pairs = zip(self._left.items(), found, strict=True)
            self._left = {name: hyper for (name, hyper), gradient in pairs if gradient is None}

    def refuse(self) -> None:
        """Refuse one that is left, once there was a loss.

        Raises:
            MisconfigurationException: If there is one.
        """
        self._strike_off_settings()
        if self._left and self._has_looked:
            name = next(iter(self._left))
            raise MisconfigurationException(
                f"`{name}` is declared as a hyperparameter but used nowhere: neither the optimizer "
                "nor a loss before the first outer update depends on it. Use it there, inside of "
                "`training_step` and not as a number (`math.exp(h)`, `float(h)`) nor under "
                "`detach` or `torch.no_grad`, or name the hyperparameters to tune, as in "
                "`RTHO(['lr'])`. A learning rate has to be the optimizer's, itself and not times "
                "something, nor a scheduler's alone. For one that acts in later steps alone, as "
                "in a group that is added or a term that is switched on, set `start_step` to "
                "where it does, or write `0 * h` into the loss before."
            )
