"""Copies of an optimizer step, which outlive it."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient._arena import Arena
from lightning_rtho.hypergradient._base import OptimizerStep
from lightning_rtho.hypergradient._fingerprint import is_of

__all__ = [
    "copy_step",
    "copy_weights",
    "gradients_of",
    "size_of_copies",
    "with_gradients",
    "with_weights",
    "without_gradients",
]


def copy_step(step: OptimizerStep, copy: Callable[[Tensor], Tensor]) -> OptimizerStep:
    """Copy the tensors of a step that the optimizer will overwrite.

    Args:
        step: The step.
        copy: Copies a tensor ``[*P]``.

    Returns:
        The step, of copies.
    """

    def copy_transition(transition: Transition) -> Transition:
        state = {name: copy(value) for name, value in transition.state.items()}
        grad = transition.grad if step.is_traced else copy(transition.grad)
        return dataclasses.replace(transition, state=state, grad=grad)

    transitions = [copy_transition(transition) for transition in step.transitions]
    if step.clip is None:
        raw_grads = [transition.grad for transition in transitions]
    else:
        raw_grads = [copy(grad) for grad in step.raw_grads]
    return dataclasses.replace(step, transitions=transitions, raw_grads=raw_grads)


def with_weights(step: OptimizerStep, weights: Sequence[Tensor]) -> OptimizerStep:
    """Let a step read its weights from other tensors.

    Args:
        step: The step.
        weights: All weights, each ``[*P]``.

    Returns:
        The step, of the same tensors otherwise.
    """
    transitions = [
        dataclasses.replace(t, state={**t.state, "param": weights[t.index]})
        for t in step.transitions
    ]
    return dataclasses.replace(step, transitions=transitions)


def copy_weights(
    weights: Sequence[Tensor], step: OptimizerStep, copy: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Copy weights, but for those that a copied step holds already.

    Args:
        weights: All weights, each ``[*P]``.
        step: What :func:`copy_step` returned.
        copy: Copies a tensor ``[*P]``.

    Returns:
        The copies, in the order of the weights.
    """
    held = {transition.index: transition.state["param"] for transition in step.transitions}
    return [held[i] if i in held else copy(weight) for i, weight in enumerate(weights)]


def size_of_copies(step: OptimizerStep, params: Sequence[Tensor]) -> int:
    """Return how many bytes of an arena copies of a step and of all weights take.

    Args:
        step: The step.
        params: All weights, each ``[*P]``.
    """
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    copy_weights(params, copy_step(step, note), note)
    return Arena.size_of(tensors)


def gradients_of(step: OptimizerStep) -> list[Tensor]:
    """Return the gradients of a step, before and after clipping, each ``[*P]``.

    Args:
        step: The step.
    """
    grads = [transition.grad for transition in step.transitions]
    return grads if step.clip is None else [*step.raw_grads, *grads]


def without_gradients(step: OptimizerStep) -> OptimizerStep:
    """Leave empty tensors in the place of gradients.

    Args:
        step: The step.

    Returns:
        The step, of the same tensors otherwise.
    """
    transitions = [
        dataclasses.replace(transition, grad=transition.grad.new_empty(0))
        for transition in step.transitions
    ]
    return dataclasses.replace(
        step, transitions=transitions, raw_grads=[t.grad for t in transitions]
    )


def with_gradients(
    step: OptimizerStep, gradients: Sequence[Tensor | None], prints: Tensor
) -> OptimizerStep:
    """Put gradients back, computed again; tell whether they are what the optimizer saw.

    Args:
        step: What :func:`without_gradients` returned, or a copy of it.
        gradients: Of all weights, each ``[*P]``; None is zero.
        prints: Fingerprint of :func:`gradients_of` the step as it was.

    Returns:
        The step; whether its gradients have the fingerprint stands in ``is_traced``.
    """
    raw_grads = []
    for transition in step.transitions:
        gradient = gradients[transition.index]
        if gradient is None:
            gradient = torch.zeros_like(transition.state["param"])
        raw_grads.append(gradient)
    grads = raw_grads if step.clip is None else step.clip(*raw_grads)
    transitions = [
        dataclasses.replace(transition, grad=grad)
        for transition, grad in zip(step.transitions, grads, strict=True)
    ]
    step = dataclasses.replace(step, transitions=transitions, raw_grads=raw_grads)
    is_traced = is_of(prints, gradients_of(step), step.precision)
    return dataclasses.replace(step, is_traced=is_traced)
