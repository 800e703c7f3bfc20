"""The derivative of an update, compiled to one pass over memory and written in place."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State, StateCotangent, StateTangent
from lightning_rtho.dynamics import Transition, UpdateRule
from lightning_rtho.linearization._step import dense, push, step_jvp, step_vjp

__all__ = ["fused_step_jvp", "fused_step_vjp", "is_large"]

_LARGE = 2**16
"""Entries of a parameter or a cohort from which on steps soon make up for seconds of compiling."""

_MOST_VERSIONS = 64
"""Versions of one function: a process meets many rules, sets of settings and numbers of columns."""


class _Compiled:
    """A function compiled when it is first called; the function itself where that fails."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._failed = False

    def __call__(self, *args: Any) -> Any:
        if not self._failed:
            try:
                # Private until torch 2.13 has `compile(recompile_limit=)`; 8 versions were too few.
                with torch._dynamo.config.patch(recompile_limit=_MOST_VERSIONS):
                    return self._compiled(*args)
            except torch.OutOfMemoryError:
                raise  # not the compiler's, and after tensors may have been overwritten
            except Exception as error:  # whatever a missing or broken compiler raises
                self._failed = True
                warnings.warn(
                    "The derivatives of the optimizer's update could not be compiled and run "
                    f"uncompiled, which is right but slower: {str(error).splitlines()[0]}",
                    stacklevel=2,
                )
        return self._function(*args)

    @functools.cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self._function, dynamic=True, fullgraph=True)


def fused_step_jvp(
    transition: Transition,
    state_dot: StateTangent,
    grad_dot: Tensor,
    hyper_dot: Hypers,
    keep: Tensor,
) -> StateTangent:
    """Push tangents through one update as :func:`step_jvp` does, in place where that is faster.

    Args:
        transition: The arguments of Phi.
        state_dot: Tangent of the state, each tensor ``[m, ...]``; may be overwritten.
        grad_dot: Tangent of the gradient ``[m, *P]``.
        hyper_dot: Tangents of the tuned settings, each ``[m]``.
        keep: Whether the tangent shall stay what it is, a boolean ``[]``.

    Returns:
        Tangent of the new state, each tensor ``[m, ...]``.
    """
    if not is_large(transition.grad):
        new_state_dot = step_jvp(transition, state_dot, grad_dot, hyper_dot)
        return _unless(keep, new_state_dot, state_dot)
    # Convolutions may leave tangents in another order of axes than the parameter's.
    state_dot = {name: value.contiguous() for name, value in state_dot.items()}
    added = _write_jvp(
        transition.rule,
        _flat_state(transition.state),
        _flat(transition.grad),
        transition.hyper,
        {name: _flat(value, 1) for name, value in state_dot.items()},
        _flat(grad_dot, 1),
        dense(hyper_dot, transition.hyper, len(grad_dot)),
        keep,
    )
    shape = grad_dot.shape
    return {
        **state_dot,
        **{
            name: value.reshape(shape) if value.dim() > 1 else value
            for name, value in added.items()
        },
    }


def fused_step_vjp(
    transition: Transition, new_state_bar: StateCotangent, memory: Tensor | None = None
) -> tuple[StateCotangent, Tensor, Hypers]:
    """Pull a cotangent back through one update as :func:`step_vjp` does, in place where large.

    Where the parameter :func:`is_large`, the new weights' cotangent is overwritten by that of the
    old, and the optimizer's buffers by their own cotangents: nobody needs them any more.

    Args:
        transition: The arguments of Phi; its buffers may be overwritten.
        new_state_bar: Cotangent of the new state; tensors that are missing are zero. That of the
            weights may be overwritten.
        memory: A cotangent of the gradient that nobody needs any more ``[*P]``, which that of a
            large parameter is written over; None takes new memory.

    Returns:
        Cotangents of the state ``[*P]`` or ``[]``, of the gradient ``[*P]`` and of the tuned
        settings ``[]``.
    """
    if not is_large(transition.grad) or not new_state_bar:  # a compiler has no use for no output
        return step_vjp(transition, new_state_bar)
    shape = transition.grad.shape
    tuned = {name: transition.hyper[name] for name in transition.columns}
    state, bars = _flat_state(transition.state), _flat_state(new_state_bar)
    grad = _flat(transition.grad)
    grad_bar = torch.empty_like(grad) if memory is None else _flat(memory)
    added, hyper_bar = _write_vjp(
        transition.rule, state, grad, transition.hyper, tuned, bars, grad_bar
    )
    written = {**state, "param": bars["param"]} if "param" in bars else state
    state_bar = {
        name: added[name] if name in added else written[name].reshape(shape) for name in state
    }
    return state_bar, grad_bar.reshape(shape), hyper_bar


def is_large(tensor: Tensor) -> bool:
    """Tell whether the derivative of a parameter's update is written in place.

    Args:
        tensor: The parameter, or anything of its shape ``[*P]``.

    Returns:
        Whether it is.
    """
    return tensor.numel() >= _LARGE


def _flat_state(state: State) -> State:
    """Flatten what is shaped as a parameter; leave counts as they are."""
    return {name: _flat(x) for name, x in state.items()}


def _flat(x: Tensor, start: int = 0) -> Tensor:
    """Return ``[*P]`` as ``[n]``, ``[m, *P]`` as ``[m, n]``; counts ``[]`` and ``[m]`` as they are.

    Detached, since a view would be compiled anew for every shape of the tensor behind it, and with
    a memory that begins where it does, since so would one for where it begins in the memory.
    """
    if x.dim() <= start:
        return x
    flat = x.flatten(start).detach()
    if flat.storage_offset() == 0 or flat.device.type not in {"cpu", "cuda"}:
        return flat
    return torch.from_dlpack(flat)


def _unless(keep: Tensor, new: StateTangent, old: StateTangent) -> StateTangent:
    """Return the old tangent, where missing tensors are zero, if it is to be kept; else the new."""
    if keep.device.type == "cpu":
        return old if keep else new
    return {  # without waiting for the device
        name: torch.where(keep, old.get(name, torch.zeros_like(value)), value)
        for name, value in new.items()
    }


@_Compiled
def _write_jvp(
    rule: UpdateRule,
    state: State,
    grad: Tensor,
    hyper: Hypers,
    state_dot: StateTangent,
    grad_dot: Tensor,
    hyper_dot: Hypers,
    keep: Tensor,
) -> StateTangent:
    """Overwrite tangents by those of the new state; return those of tensors that are new to it."""
    # Copies, which the compiler removes: torch.func takes no slices of dynamic size (torch 2.13).
    tangents = {name: value.clone() for name, value in state_dot.items()}
    directions = {name: value.clone() for name, value in hyper_dot.items()}
    new_state_dot = push(rule, state, grad, hyper, tangents, grad_dot.clone(), directions)
    added = {}
    for name, value in new_state_dot.items():
        if name in state_dot:
            state_dot[name].copy_(torch.where(keep, state_dot[name], value))
        else:
            added[name] = torch.where(keep, 0.0, value)
    return added


@_Compiled
def _write_vjp(
    rule: UpdateRule,
    state: State,
    grad: Tensor,
    hyper: Hypers,
    tuned: Hypers,
    new_state_bar: StateCotangent,
    grad_bar: Tensor,
) -> tuple[StateCotangent, Hypers]:
    """Overwrite the weights' cotangent, and buffers by theirs; write that of the gradient.

    Returns:
        Cotangents of the state that were not written, and of the tuned settings.
    """

    def phi(state: Any, grad: Any, tuned: Any) -> Any:
        new_state = rule(state, grad, {**hyper, **tuned})
        # Of a buffer that was carried on, as where a setting was switched, nothing is made here.
        return {name: new_state[name] for name in new_state_bar if name in new_state}

    made, pull = torch.func.vjp(phi, state, grad, tuned)[:2]
    state_bar, new_grad_bar, hyper_bar = pull({name: new_state_bar[name].clone() for name in made})
    grad_bar.copy_(new_grad_bar)
    added = {}
    for name, value in state_bar.items():
        place = new_state_bar if name == "param" else state
        if name in place and value.dim() > 0:
            place[name].copy_(value)
        else:
            added[name] = value
    return added, hyper_bar
