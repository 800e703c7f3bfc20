"""Many small parameters that are updated alike, taken through the update as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State, StateCotangent, StateTangent
from lightning_rtho.dynamics import Transition
from lightning_rtho.linearization._fused import (
    _LARGE,
    fused_step_jvp,
    fused_step_vjp,
    is_large,
)

__all__ = ["cohort_jvp", "cohort_vjp", "cohorts"]


def cohorts(transitions: Sequence[Transition], *, are_small: bool = False) -> list[list[int]]:
    """Sort transitions into those that can be made as one; large ones stay by themselves.

    Args:
        transitions: Transitions of one step.
        are_small: Whether no cohort shall be large either, copies of which take memory.

    Returns:
        Positions of the transitions, one list a cohort.
    """
    found: list[list[int]] = []
    open_cohorts: dict[object, tuple[list[int], int]] = {}
    for position, transition in enumerate(transitions):
        grad = transition.grad
        key: object = position
        if transition.cohort is not None and not is_large(grad):
            key = (transition.cohort, grad.dtype, grad.device, tuple(transition.state))
        members, size = open_cohorts.get(key, ([], 0))
        if are_small and size + grad.numel() >= _LARGE:
            members, size = [], 0
        if not members:
            found.append(members)
        members.append(position)
        open_cohorts[key] = members, size + grad.numel()
    return found


def cohort_jvp(
    transitions: Sequence[Transition],
    state_dots: Sequence[StateTangent],
    grad_dots: Sequence[Tensor],
    hyper_dot: Hypers,
    keep: Tensor,
) -> list[StateTangent]:
    """Push tangents through the updates of one cohort: :func:`fused_step_jvp` of all at once.

    Args:
        transitions: The cohort.
        state_dots: Tangent of each state, each tensor ``[m, ...]``; may be overwritten.
        grad_dots: Tangent of each gradient ``[m, *P]``.
        hyper_dot: Tangents of the settings, each ``[m]``.
        keep: Whether the tangents shall stay what they are, a boolean ``[]``.

    Returns:
        Tangent of each new state, each tensor ``[m, ...]``.
    """
    first = transitions[0]
    if len(transitions) == 1:
        return [fused_step_jvp(first, state_dots[0], grad_dots[0], hyper_dot, keep)]
    new_state_dot = fused_step_jvp(
        _joined(transitions), _join_states(state_dots, 1), _join(grad_dots, 1), hyper_dot, keep
    )
    parts: list[State] = [{} for _ in transitions]
    for name, value in new_state_dot.items():
        pieces = _split(value, transitions, 1) if value.dim() > 1 else [value] * len(parts)
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return parts


def cohort_vjp(
    transitions: Sequence[Transition],
    new_state_bars: Sequence[StateCotangent],
    memory: Tensor | None = None,
) -> tuple[list[StateCotangent], list[Tensor], Hypers]:
    """Pull cotangents back through the updates of one cohort: :func:`fused_step_vjp` of all.

    Args:
        transitions: The cohort; the buffers of a single one may be overwritten.
        new_state_bars: Cotangent of each new state; tensors that are missing are zero. That of a
            single one's weights may be overwritten.
        memory: See :func:`fused_step_vjp`; of a single one.

    Returns:
        Cotangents of each state ``[*P]`` or ``[]``, of each gradient ``[*P]``, and of the tuned
        settings, which they have in common, ``[]``.
    """
    first = transitions[0]
    if len(transitions) == 1:
        state_bar, grad_bar, hyper_bar = fused_step_vjp(first, new_state_bars[0], memory)
        return [state_bar], [grad_bar], hyper_bar
    joined = _joined(transitions)
    with torch.no_grad():
        new_state = joined.rule(joined.state, joined.grad, joined.hyper)
    given: StateCotangent = {}
    # A buffer that was carried on, as where a setting was switched, is not made anew.
    names = [name for name in new_state if any(name in bar for bar in new_state_bars)]
    for name in names:
        bars = [bar.get(name) for bar in new_state_bars]
        if new_state[name].dim() == 0:  # a count, one for all
            given[name] = torch.stack([bar for bar in bars if bar is not None]).sum(0)
        else:
            pairs = zip(bars, transitions, strict=True)
            given[name] = _join([torch.zeros_like(t.grad) if b is None else b for b, t in pairs], 0)
    joined_bar, joined_grad_bar, hyper_bar = fused_step_vjp(joined, given)
    state_bars: list[StateCotangent] = [{} for _ in transitions]
    for name, value in joined_bar.items():
        # What depends on a count is the first one's to pass on.
        pieces = [value] if value.dim() == 0 else _split(value, transitions, 0)
        for state_bar, piece in zip(state_bars, pieces, strict=False):
            state_bar[name] = piece
    return state_bars, _split(joined_grad_bar, transitions, 0), hyper_bar


def _joined(transitions: Sequence[Transition]) -> Transition:
    """Make one transition of a cohort's."""
    return replace(
        transitions[0],
        state=_join_states([t.state for t in transitions], 0),
        grad=_join([t.grad for t in transitions], 0),
    )


def _split(joined: Tensor, transitions: Sequence[Transition], batch_dims: int) -> list[Tensor]:
    """Take apart what :func:`_join` has joined."""
    pieces = joined.split([t.grad.numel() for t in transitions], batch_dims)
    return [
        piece.reshape((*joined.shape[:batch_dims], *t.grad.shape))
        for piece, t in zip(pieces, transitions, strict=True)
    ]


def _join(tensors: Sequence[Tensor], batch_dims: int) -> Tensor:
    """Flatten tensors behind their batch axes and lay them end to end."""
    shapes = [(*t.shape[:batch_dims], t.shape[batch_dims:].numel()) for t in tensors]
    return torch.cat([t.reshape(s) for t, s in zip(tensors, shapes, strict=True)], batch_dims)


def _join_states(states: Sequence[State], batch_dims: int) -> State:
    """Join the buffers that are shaped as the parameter; step counts are the same in all."""
    return {
        name: value if name == "step" else _join([state[name] for state in states], batch_dims)
        for name, value in states[0].items()
    }
