"""Noticing that a loss depends on the weights in a way that its graph does not show."""

import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["DetachedWeights"]


class DetachedWeights(TorchFunctionMode):
    """Watches a forward pass and tells where detached values enter the loss.

    Values that depend on weights, but by ``detach`` or ``torch.no_grad`` carry no graph, are
    followed until they meet a tensor that does, also from one pass to a later one.

    Args:
        weights: The weights that move, also those that a forward pass freezes, each ``[*P]``.
        report: Called once, where the first such value enters; by default it warns.

    Attributes:
        has_told: Whether it has been called.
    """

    def __init__(
        self, weights: Collection[Tensor], report: Callable[[], None] | None = None
    ) -> None:
        super().__init__()
        self._report = _warn if report is None else report
        self._detached = {id(weight): weakref.ref(weight) for weight in weights}
        self.has_told = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function and follow what it makes of detached values."""
        if self.has_told or func is Tensor.requires_grad_:  # which begins a graph and enters none
            return func(*args, **(kwargs or {}))
        inputs = list(_tensors(_read(func, args, kwargs or {})))
        has_detached = any(map(self._is_detached, inputs))  # before `func` writes to one of them
        has_graph = any(x.requires_grad for x in inputs)
        if func is F.batch_norm and (kwargs or {})["training"] and self._is_detached(args[0]):
            self._tell()  # which enters running statistics
        output = func(*args, **(kwargs or {}))
        if not (has_detached or has_graph):
            return output
        for result in _tensors((output,)):
            if not result.is_floating_point():
                continue
            if not result.requires_grad:
                self._detached[id(result)] = weakref.ref(result)
            elif torch.is_grad_enabled() and has_detached:
                self._tell()
        return output

    def _tell(self) -> None:
        if not self.has_told:
            self.has_told = True
            self._report()

    def _is_detached(self, x: Tensor) -> bool:
        known = self._detached.get(id(x))
        return known is not None and known() is x and not x.requires_grad


def _read(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of which a function reads more than shape, type and device."""
    name = getattr(func, "__name__", "")
    if name.endswith("_like") or name.startswith("new_"):
        return (*args[1:], *kwargs.values())
    return args[:1] if name in _TAKES_AFTER else (*args, *kwargs.values())


_TAKES_AFTER = frozenset({"expand_as", "reshape_as", "to", "type_as", "view_as"})
"""Functions that take shape or type from what follows their first argument."""


def _tensors(tree: tuple[Any, ...]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, also those in lists and tuples."""
    for item in tree:
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (list, tuple)):
            yield from _tensors(tuple(item))


def _warn() -> None:
    rank_zero_warn(
        "`training_step` uses values that depend on the weights but were detached "
        "(`detach`, `torch.no_grad` or frozen weights). Hypergradients take them for "
        "constants, which they are not. Use `lightning_rtho.stop_gradient(x)` for "
        "`x.detach()` within a step if they shall be exact; what is carried from one step to the "
        "next, as in a buffer, cannot be followed."
    )
