"""The chain rule through one update of one parameter, in both directions."""

import functools
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State, StateCotangent, StateTangent
from lightning_rtho.dynamics import Transition, UpdateRule

__all__ = ["dense", "load_forward_mode", "push", "step_jvp", "step_vjp"]


@functools.cache
def load_forward_mode() -> None:
    """Have torch load its forward mode, which it does when it is first used.

    From 2.14 on it warns meanwhile that a function is deprecated that it calls itself.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.func.jvp(torch.neg, (torch.zeros(()),), (torch.zeros(()),))


def step_jvp(
    transition: Transition, state_dot: StateTangent, grad_dot: Tensor, hyper_dot: Hypers
) -> StateTangent:
    r"""Push tangents through one update: s'_dot = dPhi/ds s_dot + dPhi/dg g_dot + dPhi/dh h_dot.

    Args:
        transition: The arguments of Phi.
        state_dot: Tangent of the state, each tensor with a leading axis ``[m, ...]``.
        grad_dot: Tangent of the gradient ``[m, *P]``.
        hyper_dot: Tangents of the tuned settings, each ``[m]``.

    Returns:
        Tangent of the new state, each tensor ``[m, ...]``.

    References:
        Franceschi et al. (2017), Forward-HG: Z_t = A_t Z_{t-1} + B_t.
    """
    if transition.grad.dim() == 0:  # shaped as settings and counts are
        return push(
            transition.rule,
            transition.state,
            transition.grad,
            transition.hyper,
            state_dot,
            grad_dot,
            dense(hyper_dot, transition.hyper, len(grad_dot)),
        )
    arrays, counts = _split(transition.state, state_dot)
    grad, tuned = transition.grad.detach().requires_grad_(), _leaves(transition.hyper, hyper_dot)
    with torch.enable_grad():
        new_state = transition.rule(
            {**transition.state, **arrays, **counts}, grad, {**transition.hyper, **tuned}
        )
    along_entries = [*((x, state_dot[name]) for name, x in arrays.items()), (grad, grad_dot)]
    along_scalars = [(x, state_dot[name]) for name, x in counts.items()]
    along_scalars += [(x, hyper_dot[name]) for name, x in tuned.items()]
    return {
        name: _push_to(value, along_entries, along_scalars, len(grad_dot))
        for name, value in new_state.items()
    }


def _push_to(
    value: Tensor,
    along_entries: Sequence[tuple[Tensor, Tensor]],
    along_scalars: Sequence[tuple[Tensor, Tensor]],
    m: int,
) -> Tensor:
    """Push tangents to a tensor of the new state, all at once.

    Phi is elementwise, so that the Jacobians by what is shaped as the parameter are diagonals,
    which one backward pass gives. With weights u of the entries of the value it gives <u, ds/dh>
    for each scalar h, the derivative of which by u is ds/dh.

    Args:
        value: The tensor ``[*P]`` or ``[]``, with its graph.
        along_entries: Leaves ``[*P]`` and their tangents ``[m, *P]``.
        along_scalars: Leaves ``[]`` and their tangents ``[m]``.
        m: Number of tangents.

    Returns:
        Its tangent ``[m, ...]``.
    """
    if not value.requires_grad:
        return value.new_zeros(m, *value.shape)
    leaves, dots = zip(*along_entries, *along_scalars, strict=True)
    weights = torch.ones_like(value).requires_grad_(bool(along_scalars))
    slopes = torch.autograd.grad(
        value,
        leaves,
        weights,
        retain_graph=True,
        create_graph=bool(along_scalars),
        allow_unused=True,
    )
    total: Tensor | None = None
    for slope, dot in zip(slopes, dots, strict=True):
        diagonal: Tensor | None = slope
        if slope is not None and slope.dim() < value.dim():
            diagonal = _along_entries(slope, weights)
        if diagonal is None:
            continue
        column = dot if dot.dim() > 1 else dot.to(diagonal).reshape(-1, *[1] * value.dim())
        part = column * diagonal.detach()
        total = part if total is None else total.add_(part)
    if total is None:
        return value.new_zeros(m, *value.shape)
    return total.to(value.dtype) if value.dim() > 0 else total


def _along_entries(slope: Tensor, weights: Tensor) -> Tensor | None:
    """Return ds/dh ``[*P]`` of <u, ds/dh> ``[]``; None, or zero, where a sign or a step ended it.

    Args:
        slope: <u, ds/dh>.
        weights: u ``[*P]``.
    """
    if not slope.requires_grad:
        return None
    return torch.autograd.grad(slope, weights, retain_graph=True, allow_unused=True)[0]


def _split(state: State, state_dot: StateTangent) -> tuple[State, State]:
    """Return leaves of what is shaped as the parameter, and of counts and the like that depend."""
    arrays = {name: x for name, x in state.items() if x.dim() > 0}
    counts = {name: x for name, x in state.items() if x.dim() == 0 and _may_depend(state_dot[name])}
    return _leaves(arrays), _leaves(counts)


def _may_depend(tangent: Tensor) -> bool:
    """Tell whether a tangent may be other than zero; of one on a device without asking it."""
    return tangent.device.type != "cpu" or bool(tangent.any())


def dense(hyper_dot: Hypers, hyper: Hypers, entries: int) -> Hypers:
    """Give every setting a tangent: torch.func pushes absent ones through slow decompositions.

    Args:
        hyper_dot: Tangents of the tuned settings, each ``[m]``.
        hyper: All settings, each ``[]``.
        entries: m.

    Returns:
        Tangents of all settings, each ``[m]``.
    """
    return {
        name: hyper_dot[name] if name in hyper_dot else value.new_zeros(entries)
        for name, value in hyper.items()
    }


def push(
    rule: UpdateRule,
    state: State,
    grad: Tensor,
    hyper: Hypers,
    state_dot: StateTangent,
    grad_dot: Tensor,
    hyper_dot: Hypers,
) -> StateTangent:
    """Push tangents through an update rule, with everything spelled out for a compiler to see.

    Args:
        rule: Phi.
        state: State before the update, ``[*P]`` or ``[]``.
        grad: Gradient ``[*P]``.
        hyper: Settings, each ``[]``.
        state_dot: Tangent of the state, each tensor ``[m, ...]``.
        grad_dot: Tangent of the gradient ``[m, *P]``.
        hyper_dot: Tangents of all settings, each ``[m]``.

    Returns:
        Tangent of the new state, each tensor ``[m, ...]``.
    """

    def along(*tangents: Any) -> Any:  # the compiler cannot evaluate `State | Tensor`
        pushed: State = torch.func.jvp(rule, (state, grad, hyper), tangents)[1]
        return pushed

    new_state_dot: StateTangent = torch.vmap(along)(state_dot, grad_dot, hyper_dot)
    return new_state_dot


def step_vjp(
    transition: Transition, new_state_bar: StateCotangent
) -> tuple[StateCotangent, Tensor, Hypers]:
    r"""Pull a cotangent back through one update: the adjoint of :func:`step_jvp`.

    Args:
        transition: The arguments of Phi.
        new_state_bar: Cotangent of the new state; tensors that are missing are zero.

    Returns:
        Cotangents of the state ``[*P]`` or ``[]``, of the gradient ``[*P]`` and of the tuned
        settings ``[]``.

    References:
        Franceschi et al. (2017), Reverse-HG: alpha_{t-1} = alpha_t A_t, g = g + alpha_t B_t.
    """
    # Plain autograd: on small tensors it takes half the time of torch.func's vjp.
    state, grad = _leaves(transition.state), transition.grad.detach().requires_grad_()
    tuned = _leaves(transition.hyper, transition.columns)
    with torch.enable_grad():
        new_state = transition.rule(state, grad, {**transition.hyper, **tuned})
    # The count of a first step depends on nothing.
    names = [name for name, x in new_state.items() if name in new_state_bar and x.requires_grad]
    cotangents = iter(
        torch.autograd.grad(
            [new_state[name] for name in names],
            [*state.values(), grad, *tuned.values()],
            [new_state_bar[name] for name in names],
            materialize_grads=True,
        )
        if names
        else [torch.zeros_like(x) for x in (*state.values(), grad, *tuned.values())]
    )
    state_bar = {name: next(cotangents) for name in state}
    return state_bar, next(cotangents), {name: next(cotangents) for name in tuned}


def _leaves(tensors: dict[str, Tensor], names: Iterable[str] | None = None) -> dict[str, Tensor]:
    wanted = tensors if names is None else names
    return {name: tensors[name].detach().requires_grad_() for name in wanted}
