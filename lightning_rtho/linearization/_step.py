"""The chain rule through one update of one parameter, in both directions."""

import functools
import warnings
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
    hyper_dot = dense(hyper_dot, transition.hyper, len(grad_dot))
    return push(
        transition.rule,
        transition.state,
        transition.grad,
        transition.hyper,
        state_dot,
        grad_dot,
        hyper_dot,
    )


def dense(hyper_dot: Hypers, hyper: Hypers, entries: int) -> Hypers:
    """Give every setting a tangent: torch pushes absent ones through slow decompositions.

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
    tuned = _leaves({name: transition.hyper[name] for name in transition.columns})
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


def _leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
