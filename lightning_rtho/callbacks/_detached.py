"""Noticing that a loss depends on the weights in a way that its graph does not show."""

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any, Self
from unittest import mock

import torch
from torch import Tensor
from torch.func import debug_unwrap
from torch.nn import functional as F
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode,
    _pop_mode_temporarily,
    has_torch_function,
)

from lightning_rtho._numerics import tensors_in
from lightning_rtho.linearization import graph_nodes

__all__ = ["DetachedWeights"]


class DetachedWeights(TorchFunctionMode):
    """Watches a forward pass and tells where detached values enter the loss.

    Values that depend on weights, but by ``detach`` or ``torch.no_grad`` carry no graph, are
    followed until they meet a tensor that does, also from one pass to a later one.

    Args:
        weights: The weights that move, also those that a forward pass freezes, each ``[*P]``.
        place: Says where such a value meets a graph, asked there and then.

    Example:
        >>> w = torch.ones(2, requires_grad=True)
        >>> with DetachedWeights([w], lambda: "here") as watch:
        ...     noted = w.sum() - w.detach().sum()
        ...     loss = w.exp().sum()
        ...     watch.entries_of(loss), watch.entries_of(loss * noted)
        ([], ['here'])
    """

    def __init__(
        self, weights: Collection[Tensor], place: Callable[[], str | None] = lambda: None
    ) -> None:
        super().__init__()
        self._place = place
        self._weights = {id(weight): weakref.ref(weight) for weight in weights}
        self._detached = dict(self._weights)
        self._entries: dict[tuple[str, int], str | None] = {}
        self._beside_loss: list[str | None] = []
        self._hiding = mock.patch.object(
            torch.overrides, "has_torch_function", self._others_override
        )

    def __enter__(self) -> Self:
        """Begin the watch."""
        self._hiding.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """End the watch: what has entered is forgotten, not what is detached."""
        super().__exit__(*error)
        self._hiding.stop()
        self._entries, self._beside_loss = {}, []

    def forget(self) -> None:
        """Take what has been detached so far for constant."""
        self._detached = dict(self._weights)

    def entries_of(self, loss: Tensor) -> list[str | None]:
        """Return where detached values have entered a loss.

        Args:
            loss: The loss ``[]``, of which all was computed in the present watch.

        Returns:
            The places.
        """
        found = [*self._beside_loss]
        if self._entries:
            keys = map(_key, graph_nodes([loss]))
            found += [self._entries[key] for key in keys if key in self._entries]
        return found

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function and follow what it makes of detached values."""
        # Compiled functions are not looked into; to begin a graph is to enter none.
        if torch.compiler.is_compiling() or func is Tensor.requires_grad_:
            return func(*args, **(kwargs or {}))
        inputs = list(tensors_in(_read(func, args, kwargs or {})))
        has_detached = any(map(self._is_detached, inputs))  # before `func` writes to one of them
        has_graph = any(map(_has_graph, inputs))
        if func is F.batch_norm and (kwargs or {})["training"] and self._is_detached(args[0]):
            self._beside_loss.append(self._place())  # into running statistics
        output = func(*args, **(kwargs or {}))
        if not (has_detached or has_graph):
            return output
        results = [*tensors_in(args[:1] if func in _WRITES else (output,))]
        if getattr(func, "__name__", "").removesuffix("_") in _FLAT:
            for result in results:  # which may have been written to
                self._detached.pop(id(result), None)
            return output
        if func in _ONE_BY_ONE:
            for result, own in zip(results, inputs, strict=True):
                if self._is_detached(own):
                    self._detached[id(result)] = weakref.ref(result)
            return output
        # Of several, one without a graph is no value, as a permutation is none.
        lets_go = not any(map(_has_graph, results))
        has_past = has_detached or not all(map(self._is_beginning, inputs))
        is_hiding = func is F.gumbel_softmax and _is_hard(*args[1:], **(kwargs or {}))
        for result in results:
            if not result.is_floating_point():
                continue
            if lets_go and has_past:
                self._detached[id(result)] = weakref.ref(result)
            elif torch.is_grad_enabled() and (has_detached or is_hiding) and _has_graph(result):
                self._note_entry(result, is_written=any(result is x for x in inputs))
        return output

    def _others_override(self, tensors: Iterable[Any]) -> bool:
        """Tell whether any but the watch overrides functions of tensors."""
        # Transformers and attention ask for that, and compute in another way if so. Private, both:
        # what is public tells of modes and tensors together.
        if _get_current_function_mode() is not self:
            return has_torch_function(tensors)
        with _pop_mode_temporarily():
            return has_torch_function(tensors)

    def _note_entry(self, result: Tensor, *, is_written: bool) -> None:
        place = self._place()
        if debug_unwrap(result) is not result:  # in a function transform, with a graph of its own
            self._beside_loss.append(place)
        if result.grad_fn is None:  # as of what is mapped over a batch
            return
        self._entries[_key(result.grad_fn)] = place
        # Private: through a view its base has been written to, and has another node.
        base = result._base if is_written else None
        if base is not None and base.grad_fn is not None:
            self._entries[_key(base.grad_fn)] = place

    def _is_beginning(self, x: Tensor) -> bool:
        """Tell whether a tensor has no history, as one that shall get a gradient of its own."""
        plain = debug_unwrap(x)
        return type(plain) is Tensor and plain.is_leaf and not self._is_known(plain)

    def _is_detached(self, x: Tensor) -> bool:
        return self._is_known(x) and not _has_graph(x)

    def _is_known(self, x: Tensor) -> bool:
        """Tell whether a tensor is a weight, or was once detached."""
        known = self._detached.get(id(x))
        return known is not None and known() is x


def _has_graph(x: Tensor) -> bool:
    """Tell whether a tensor has a graph, itself or behind what a function transform makes of it."""
    return x.requires_grad or debug_unwrap(x).requires_grad


def _key(node: Any) -> tuple[str, int]:
    """Return what tells a node of a graph from others, also when nobody holds it any more."""
    # Private: torch's count of the nodes of a thread. To hold one, as identity needs, is to hold
    # its graph.
    return node.name(), node._sequence_nr()


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


def _is_hard(tau: float = 1, hard: bool = False, *_: Any, **__: Any) -> bool:
    """Tell of the arguments of ``gumbel_softmax`` whether it detaches a part within."""
    return hard


_FLAT = frozenset({"ceil", "fix", "floor", "round", "sgn", "sign", "trunc"})
"""Functions that do not depend on what they read but for where they jump."""


_ONE_BY_ONE = frozenset({
    *(torch.broadcast_tensors, torch.meshgrid),
    *(torch.atleast_1d, torch.atleast_2d, torch.atleast_3d),
})
"""Functions of several tensors each of whose results takes after its own."""


_WRITES = frozenset({Tensor.__setitem__, Tensor.data.__set__})  # type: ignore[attr-defined]
"""Functions that return nothing, but write to their first argument."""
