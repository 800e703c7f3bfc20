"""Many small parameters that are updated alike, pushed through the update as one."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, State, StateTangent
from lightning_rtho.dynamics import Transition
from lightning_rtho.linearization._fused import fused_step_jvp

__all__ = ["cohort_jvp", "cohorts"]

_SMALL = 2**16
"""Entries up to which joining a parameter with others costs less than calling Phi for it alone."""


def cohorts(transitions: Sequence[Transition]) -> list[list[int]]:
    """Sort transitions into those that can be made as one.

    Args:
        transitions: Transitions of one step.

    Returns:
        Positions of the transitions, one list a cohort.
    """
    found: dict[object, list[int]] = {}
    for position, transition in enumerate(transitions):
        grad = transition.grad
        key: object = position
        if transition.cohort is not None and grad.numel() <= _SMALL:
            key = (transition.cohort, grad.dtype, grad.device, tuple(transition.state))
        found.setdefault(key, []).append(position)
    return list(found.values())


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
    shapes = [transition.grad.shape for transition in transitions]
    new_state_dot = fused_step_jvp(
        replace(
            first,
            state=_join_states([t.state for t in transitions], 0),
            grad=_join([t.grad for t in transitions], 0),
        ),
        _join_states(state_dots, 1),
        _join(grad_dots, 1),
        hyper_dot,
        keep,
    )
    sizes = [shape.numel() for shape in shapes]
    parts: list[State] = [{} for _ in transitions]
    for name, value in new_state_dot.items():
        pieces = value.split(sizes, 1) if value.dim() > 1 else [value] * len(parts)
        for part, piece, shape in zip(parts, pieces, shapes, strict=True):
            part[name] = piece.reshape(len(value), *shape) if value.dim() > 1 else piece
    return parts


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
