"""Copies of a training state, to go back to."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_rtho._types import State
from lightning_rtho.callbacks._buffers import buffers_of
from lightning_rtho.callbacks._bystanders import untrained_weights
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = [
    "distance_from",
    "drop_what_stands_still",
    "move_snapshot",
    "read_derivative_buffers",
    "restore_snapshot",
    "take_snapshot",
    "write_derivative_buffers",
]


def take_snapshot(
    module: LightningModule,
    params: Sequence[Tensor],
    optimizers: Sequence[DifferentiableOptimizer],
    others: Collection[str] | None = None,
) -> dict[str, Any]:
    """Copy what training steps change: weights, optimizer state and buffers.

    Weights that no optimizer trains may change, too, as those of a mean teacher do. They are kept
    on the host, where there is room for a model that is frozen for the most part.

    Args:
        module: The module.
        params: Its trained weights, each ``[*P]``.
        optimizers: Their optimizers.
        others: Names of other weights to copy; None for all.

    Returns:
        Tensors, numbers, lists and dicts.
    """
    trained_by = _trained_by(optimizers)
    states = [trained_by[p].state.get(p, {}) if p in trained_by else {} for p in params]
    return {
        "params": [param.detach().clone() for param in params],
        "states": [_copy(state) for state in states],
        "derivative_buffers": [_copy(b) for b in read_derivative_buffers(params, optimizers)],
        "buffers": _copy({name: buffers[key] for name, buffers, key in buffers_of(module)}),
        "others": {
            name: other.detach().to("cpu", copy=True)
            for name, other in untrained_weights(module, params)
            if others is None or name in others
        },
    }


def restore_snapshot(
    snapshot: dict[str, Any],
    module: LightningModule,
    params: Sequence[Tensor],
    optimizers: Sequence[DifferentiableOptimizer],
) -> None:
    """Write a copy back, in place where that can be; settings of the optimizer stay.

    Args:
        snapshot: What :func:`take_snapshot` returned for the same weights.
        module: The module.
        params: Its trained weights, each ``[*P]``.
        optimizers: Their optimizers.
    """
    trained_by = _trained_by(optimizers)
    with torch.no_grad():
        for param, value, state in zip(params, snapshot["params"], snapshot["states"], strict=True):
            param.copy_(value)
            param.grad = None  # it was that of the weights that are given up
            if param in trained_by:
                optimizer = trained_by[param]
                _write(optimizer.state[param], state)
                if not state:  # before an optimizer's first step it knows no weight
                    del optimizer.state[param]
        unkept = [_copy(buffers) for buffers in snapshot["derivative_buffers"]]
        write_derivative_buffers(unkept, params, optimizers)
        for name, other in untrained_weights(module, params):
            if name in snapshot["others"]:
                other.copy_(snapshot["others"][name])
        for name, buffers, key in buffers_of(module):
            if name in snapshot["buffers"]:
                _write(buffers, {key: snapshot["buffers"][name]}, whole=False)


def drop_what_stands_still(
    snapshot: dict[str, Any], module: LightningModule, params: Sequence[Tensor]
) -> set[str]:
    """Drop weights that no optimizer trains from a copy, where they are what they were.

    Args:
        snapshot: The copy, taken some steps before.
        module: The module.
        params: Its trained weights, each ``[*P]``.

    Returns:
        Names of those that are left: something moves them.
    """
    kept = snapshot["others"]
    for name, other in untrained_weights(module, params):
        if name in kept and torch.equal(kept[name], other.detach().cpu()):
            del kept[name]
    return set(kept)


def read_derivative_buffers(
    params: Sequence[Tensor], optimizers: Sequence[DifferentiableOptimizer]
) -> list[State]:
    """Return what optimizers keep of weights for the derivative alone.

    Args:
        params: The weights, each ``[*P]``.
        optimizers: Their optimizers.

    Returns:
        Buffers ``[*P]`` by name, of each weight.
    """
    trained_by = _trained_by(optimizers)
    return [trained_by[p].derivative_buffers(p) if p in trained_by else {} for p in params]


def write_derivative_buffers(
    buffers: Sequence[State],
    params: Sequence[Tensor],
    optimizers: Sequence[DifferentiableOptimizer],
) -> None:
    """Let optimizers go on with what :func:`read_derivative_buffers` returned.

    Args:
        buffers: Buffers ``[*P]`` by name, of each weight.
        params: The weights, each ``[*P]``.
        optimizers: Their optimizers.
    """
    trained_by = _trained_by(optimizers)
    for param, kept in zip(params, buffers, strict=True):
        if param in trained_by:
            trained_by[param].set_derivative_buffers(param, kept)


def distance_from(snapshot: dict[str, Any], params: Sequence[Tensor]) -> float:
    """Return how far weights have moved, in lengths of those of a copy.

    Args:
        snapshot: The copy.
        params: The weights, each ``[*P]``.

    Returns:
        ||w - w'|| / ||w'||; 0 where w' is 0 and has no length.
    """
    pairs = list(zip(params, snapshot["params"], strict=True))
    moved = get_total_norm([param.detach() - kept for param, kept in pairs]).item()
    length = get_total_norm([kept for _, kept in pairs]).item()
    return moved / length if length > 0 else 0.0


def move_snapshot(snapshot: dict[str, Any], params: Sequence[Tensor]) -> dict[str, Any]:
    """Move a copy that was read from a file to where its weights are.

    Args:
        snapshot: The copy; of a run that had not begun it is empty.
        params: The weights, each ``[*P]``; the first of them are those of the copy.

    Returns:
        The copy.
    """
    if not snapshot:
        return snapshot
    devices = [param.device for param in params]
    return {
        **snapshot,
        "params": [w.to(device) for w, device in zip(snapshot["params"], devices, strict=False)],
        "states": [
            # Scalars such as Adam's step stand where torch wants them.
            {k: v.to(device) if isinstance(v, Tensor) and v.dim() > 0 else v for k, v in s.items()}
            for s, device in zip(snapshot["states"], devices, strict=False)
        ],
    }


def _trained_by(
    optimizers: Sequence[DifferentiableOptimizer],
) -> dict[Tensor, DifferentiableOptimizer]:
    """Return the optimizer of each weight that has one."""
    return {param: optimizer for optimizer in optimizers for param in optimizer.params}


def _copy(state: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _write(place: dict[str, Any], values: dict[str, Any], whole: bool = True) -> None:
    """Write values into a dict; where it is written as a whole, nothing else stays in it."""
    for key in [key for key in place if whole and key not in values]:
        del place[key]
    for key, value in values.items():
        present = place.get(key)
        if not isinstance(value, Tensor):
            place[key] = value
        elif (
            isinstance(present, Tensor)
            and present.shape == value.shape
            and present.layout == value.layout
            and not present.is_inference()
        ):
            present.copy_(value)
        else:
            place[key] = value.clone()
