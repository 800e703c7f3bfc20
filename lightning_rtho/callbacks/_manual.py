"""Manual optimization: what a ``training_step`` does between its forward passes and updates."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from lightning_rtho.linearization import graph_nodes

__all__ = ["ManualStep"]


class ManualStep:
    """Stands in for those methods of a module that a manual ``training_step`` shapes updates by.

    Toggling an optimizer no longer freezes the weights of the others, on whose history the toggled
    one's gradient depends, but still keeps gradients from them.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._toggled: set[Tensor] | None = None
        self._updated: dict[Tensor, int] = {}

    def start(self) -> None:
        """Stand in for the methods."""
        self._updated = {}
        vars(self._module).update(
            toggle_optimizer=self._toggle_optimizer,
            untoggle_optimizer=self._untoggle_optimizer,
        )

    def stop(self) -> None:
        """Give the methods back."""
        for name in ("toggle_optimizer", "untoggle_optimizer"):
            vars(self._module).pop(name, None)

    def takes_gradient(self, param: Tensor) -> bool:
        """Tell whether backward passes give a weight a gradient now.

        Args:
            param: The weight ``[*P]``.

        Returns:
            Whether no optimizer is toggled, or one that trains it is.
        """
        return self._toggled is None or param in self._toggled

    def note_update(self, params: Sequence[Tensor]) -> None:
        """Take down that weights are about to change.

        Args:
            params: The weights, each ``[*P]``.
        """
        self._updated |= dict.fromkeys(params, _now())

    def check_order(self, loss: Tensor) -> None:
        """Refuse a loss that was computed before weights that it depends on were updated.

        Args:
            loss: The loss, about to be differentiated ``[]``.

        Raises:
            MisconfigurationException: If it was.
        """
        for node in graph_nodes([loss]):
            for following, _ in node.next_functions:
                weight = getattr(following, "variable", None)
                if weight is not None and _number(node) < self._updated.get(weight, 0):
                    raise MisconfigurationException(
                        "`manual_backward` got a loss that was computed before an optimizer moved "
                        "weights it depends on, so its gradient is one of weights that are gone. "
                        "Compute the loss after that step."
                    )

    def _toggle_optimizer(self, optimizer: Any) -> None:
        self._toggled = {param for group in optimizer.param_groups for param in group["params"]}

    def _untoggle_optimizer(self, optimizer: Any) -> None:
        self._toggled = None


def _now() -> int:
    """Number that the graph's next node gets."""
    with torch.enable_grad():
        return _number(torch.zeros((), requires_grad=True).clone().grad_fn)


def _number(node: Any) -> int:
    # Private: a graph tells in no other way in which order it was made.
    number: int = node._sequence_nr()
    return number
