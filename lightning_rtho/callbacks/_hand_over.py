"""Gradients that are known before backward, handed to the weights in its place."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

__all__ = ["GradientHandOver"]

_LOOK_EVERY = 10


class GradientHandOver:
    """Lets backward take gradients that are there already, rather than compute them again.

    It stands in for ``LightningModule.backward``, for one backward pass each time. Weights may
    share the memory of the gradients that they are given, without a copy, once a step has shown
    that nobody writes to them, not even the optimizer, as foreach SGD with Nesterov's momentum. In
    every tenth step they do not, since writing through ``grad.data`` shows in values alone.
    Where someone waits for the gradients of other tensors, or ours are rounded otherwise, backward
    runs after all, and leaves the graph to us.

    Args:
        module: The module.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._given: dict[Tensor, tuple[Tensor, int]] = {}
        self._passes = 0
        self._is_shared = False
        self._is_written_to: bool | None = None  # in the first step
        self._first_step: list[tuple[Tensor, int]] = []

    def give(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        *,
        may_share: bool,
        others: Callable[[], Sequence[Tensor] | None],
    ) -> None:
        """Let the coming backward pass hand gradients over.

        Args:
            pairs: Weights and what they get, each ``[*P]``.
            may_share: Whether the step's gradient is that of this loss alone, as it is.
            others: Gives other leaves that shall have their gradients, each ``[*X]``; None where
                the backward pass need not run.
        """
        self._passes += 1
        may_share = may_share and self._passes % _LOOK_EVERY > 0 and self._is_written_to is False
        backward = partial(self._backward, pairs, may_share, others)
        self._module.backward = backward  # type: ignore[method-assign]

    def _backward(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        may_share: bool,
        find_others: Callable[[], Sequence[Tensor] | None],
        loss: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Stand in for ``LightningModule.backward``."""
        restricted = sorted({"gradient", "inputs"} & kwargs.keys())
        if args or restricted:
            raise MisconfigurationException(
                f"`manual_backward` got `{restricted[0] if restricted else 'gradient'}`, which "
                "cannot be followed. Scale the loss, or toggle the optimizer whose weights shall "
                "move."
            )
        others = find_others()  # now: the module's own hook may just have asked for some
        self._is_shared = may_share and others is None and _may_be_shared(pairs)
        if others is not None:
            inputs = [*(param for param, _ in pairs), *others]
            torch.autograd.backward(loss, inputs=inputs, retain_graph=True)
        elif self._is_shared:
            for param, gradient in pairs:
                param.grad = gradient
        elif pairs:
            # What a hook writes to is not what we know of the gradient.
            given = [(p, g.clone() if p._backward_hooks else g) for p, g in pairs]
            params, gradients = zip(*given, strict=True)
            torch.autograd.backward(params, gradients)
        # Now: the next who might write to them is another callback.
        self._given |= {p: (p.grad, p.grad._version) for p, _ in pairs if p.grad is not None}

    def end_backward(self) -> None:
        """Give backward back to the module."""
        vars(self._module).pop("backward", None)

    def skip_step(self) -> None:
        """Forget what was given for a step that is not made."""
        self._given = {}

    def are_traced(self, params: Sequence[Tensor]) -> bool | None:
        """Tell whether gradients are what was given; the next step begins anew.

        Args:
            params: The weights that the optimizer is about to move, each ``[*P]``.

        Returns:
            Whether they are the tensors that were given, as they were; None if they are others,
            which may be equal.
        """
        given, self._given = self._given, {}
        is_written_to = any(
            param.grad is not grad or grad._version != version
            for param, (grad, version) in given.items()
        )
        if self._is_written_to is None and given:  # the first step may have had no loss
            self._is_written_to = is_written_to
            self._first_step = [(p.grad, p.grad._version) for p in params if p.grad is not None]
        if not self._is_shared:
            return None
        if is_written_to:
            return False
        return True if all(param in given for param in params) else None

    def after_update(self) -> None:
        """Look whether the optimizer has written to the gradients of the first step."""
        if any(grad._version != version for grad, version in self._first_step):
            self._is_written_to = True
        self._first_step = []


def _may_be_shared(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Tell whether weights may have these gradients themselves, each its own."""
    if not all(_fits(*pair) for pair in pairs):
        return False
    memory = {gradient.untyped_storage().data_ptr() for _, gradient in pairs}
    return len(memory) == len(pairs)


def _fits(param: Tensor, gradient: Tensor) -> bool:
    """Tell whether a gradient may be what autograd would make of it, without a copy."""
    return (
        param.grad is None
        and gradient.stride() == param.stride()
        and gradient.dtype == param.dtype
        and gradient.device == param.device
        # Private: torch tells in no other way that someone waits for gradients.
        and not param._backward_hooks
        and not getattr(param, "_post_accumulate_grad_hooks", None)
    )
