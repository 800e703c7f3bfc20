"""Hooks on backward passes: they see those of the training, and none of our own."""

import weakref
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from itertools import chain
from operator import is_
from typing import Any, ClassVar, final
from unittest import mock

from torch import Tensor, nn
from torch.nn.modules import module as layers

__all__ = ["BackwardHooks", "silenceable_hooks", "unheard"]

Hook = Callable[..., Any]


@final
class BackwardHooks:
    """The hooks of layers, of all and of a module's, of weights, and of what forward passes make.

    From the beginning on those of layers and weights are called in passes of others alone, not in
    those that :func:`unheard` keeps from them; those of tensors, and later ones of layers, where
    they are registered in what is :meth:`watched`.

    Args:
        module: The module.
        weights: Its weights, each ``[*P]``.

    Attributes:
        are_waiting: Whether someone waits for the gradients of layers, or of tensors other than
            weights in what was watched last.
        have_changed: Whether a hook has returned another gradient than it was given; stays set
            until someone clears it.

    Example:
        >>> import torch
        >>> x = torch.ones(2, requires_grad=True)
        >>> hooks, seen = BackwardHooks(nn.Identity(), [x]), []
        >>> with hooks.watched([x]):
        ...     handle = x.register_hook(seen.append)
        >>> with unheard():
        ...     gradient = torch.autograd.grad(x.sum(), x)
        >>> x.sum().backward()
        >>> seen
        [tensor([1., 1.])]
    """

    def __init__(self, module: nn.Module, weights: Sequence[Tensor]) -> None:
        self._module = module
        self.are_waiting = self.have_changed = False
        self._take_in(weights)

    @contextmanager
    def watched(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Watch a training step, up to its end.

        Args:
            weights: The weights, among which there may be new ones, each ``[*P]``.

        Yields:
            Nothing.
        """
        self._take_in(weights)
        self.are_waiting = any(map(bool, self._of_layers()))
        with silenceable_hooks(self._note_change, self._note_waiting):
            yield

    def end(self, weights: Sequence[Tensor]) -> None:
        """Let every layer and weight have its own hooks again.

        Args:
            weights: The weights, each ``[*P]``.
        """
        for hooks in chain(self._of_layers(), _of_weights(weights)):
            for key, hook in hooks.items():
                while isinstance(hook, _SilenceableHook):
                    hook = hooks[key] = hook.original

    def _take_in(self, weights: Sequence[Tensor]) -> None:
        """Stand before hooks that there are."""
        for hooks in chain(self._of_layers(), _of_weights(weights)):
            for key, hook in hooks.items():
                if not isinstance(hook, _SilenceableHook):
                    hooks[key] = _SilenceableHook(hook, self._note_change)

    def _of_layers(self) -> Iterator[MutableMapping[int, Hook]]:
        # Private: layers hand out their hooks in no other way, nor does what holds those of all.
        yield layers._global_backward_hooks
        yield layers._global_backward_pre_hooks
        for layer in self._module.modules():
            yield layer._backward_hooks
            yield layer._backward_pre_hooks

    def _note_change(self) -> None:
        self.have_changed = True

    def _note_waiting(self) -> None:
        self.are_waiting = True


@contextmanager
def unheard() -> Iterator[None]:
    """Run backward passes of our own, in which hooks are not called and no gradient is retained.

    Yields:
        Nothing.
    """
    tensors = [tensor for reference in _Unheard.retained if (tensor := reference()) is not None]
    gradients = [tensor.grad for tensor in tensors]
    before, _Unheard.is_on = _Unheard.is_on, True
    try:
        yield
    finally:
        _Unheard.is_on = before
        for tensor, gradient in zip(tensors, gradients, strict=True):
            tensor.grad = gradient


@contextmanager
def silenceable_hooks(
    note_change: Callable[[], None] = lambda: None, note_waiting: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Let tensors and layers be given hooks that :func:`unheard` silences.

    Args:
        note_change: Called when one of them returns another gradient than it was given.
        note_waiting: Called when one is registered, or a gradient is asked for by ``retain_grad``.

    Yields:
        Nothing.
    """
    retain_grad = Tensor.retain_grad

    def silenceable(register: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(register)
        def stand_in(owner: Any, hook: Hook, *args: Any, **kwargs: Any) -> Any:
            note_waiting()
            return register(owner, _SilenceableHook(hook, note_change), *args, **kwargs)

        return stand_in

    def retain(tensor: Tensor) -> None:
        note_waiting()
        retain_grad(tensor)
        living = [reference for reference in _Unheard.retained if reference() is not None]
        _Unheard.retained = [*living, weakref.ref(tensor)]

    with ExitStack() as stack:
        for owner, name in _REGISTRATIONS:
            stand_in = silenceable(getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(mock.patch.object(Tensor, "retain_grad", retain))
        yield


_REGISTRATIONS: tuple[tuple[type, str], ...] = (
    (Tensor, "register_hook"),
    (nn.Module, "register_backward_hook"),
    (nn.Module, "register_full_backward_hook"),
    (nn.Module, "register_full_backward_pre_hook"),
)


class _Unheard:
    """Whether a pass of our own runs, and what it must not give gradients to.

    Global, read from here alone: backward passes run on threads of their own.
    """

    is_on: ClassVar[bool] = False
    retained: ClassVar[list[weakref.ref[Tensor]]] = []


class _SilenceableHook:
    """Calls a hook, but not in passes of our own.

    Args:
        hook: The hook.
        note_change: Called when it returns another gradient than it was given.
    """

    __slots__ = ("_note_change", "original")  # torch copies a hook's `__dict__` into its own

    def __init__(self, hook: Hook, note_change: Callable[[], None]) -> None:
        self.original, self._note_change = hook, note_change

    def __call__(self, *args: Any) -> Any:
        if _Unheard.is_on:
            return None
        returned = self.original(*args)
        # A tensor's hook gets a gradient, a layer's the layer and then those that it may change.
        if returned is not None and not _are_same(returned, args[min(1, len(args) - 1)]):
            self._note_change()
        return returned

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies of what has the hook have the hook alone."""
        return _itself, (self.original,)


def _itself(hook: Hook) -> Hook:
    return hook


def _are_same(returned: Any, given: Any) -> bool:
    """Tell whether a hook has returned the gradients that it was given, of a layer in tuples."""
    if isinstance(returned, tuple) and isinstance(given, tuple):
        return len(returned) == len(given) and all(map(is_, returned, given))
    if isinstance(given, tuple):
        return len(given) == 1 and returned is given[0]
    return returned is given


def _of_weights(weights: Sequence[Tensor]) -> Iterator[MutableMapping[int, Hook]]:
    # Private: torch tells in no other way that a tensor has hooks.
    for weight in weights:
        yield weight._backward_hooks or {}
