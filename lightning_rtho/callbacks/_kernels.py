"""Kernels whose backward pass can be differentiated, for the steps that are followed."""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.checkpoint import CheckpointFunction

__all__ = [
    "differentiable_kernels",
    "is_compiled",
    "repeatable_kernels",
    "runs_compiled",
    "twice_differentiable_kernels",
    "warn_of_eager_steps",
]


@contextmanager
def twice_differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Choose, for a forward pass, implementations that have a second derivative.

    Attention and weight normalization are computed by their plain formulas, recurrent layers by
    torch's own kernels rather than cuDNN's, gradients of embeddings are dense, and what is compiled
    runs eagerly.

    Args:
        module: The module that runs; it may not checkpoint activations the reentrant way.
    """
    with ExitStack() as stack:
        # Private: where its inputs need no gradient, reentrant checkpointing leaves no trace in
        # the graph, and the weights' part in the activations would be lost without a word.
        stack.enter_context(mock.patch.object(CheckpointFunction, "apply", _refuse_checkpoint))
        # Private: torch's fused kernel has a second derivative, and it is wrong (torch 2.13).
        for place in (torch, sys.modules[WeightNorm.__module__]):  # the old one keeps it by name
            stack.enter_context(mock.patch.object(place, "_weight_norm", _weight_norm))
        stack.enter_context(mock.patch.object(torch, "embedding", _dense_embedding))
        # Private: torch's function below it no longer sees whether the table is trained.
        stack.enter_context(mock.patch.object(F, "_no_grad_embedding_renorm_", _renorm_))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(differentiable_kernels(module))
        yield


def _weight_norm(direction: Tensor, length: Tensor, dim: int = 0) -> Tensor:
    """Weight of given direction and length: w = g v / |v|, the norm over all axes but one."""
    return direction * (length / torch.norm_except_dim(direction, 2, dim))


@contextmanager
def differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Choose, for a forward pass, implementations of which autograd sees all.

    Recurrent layers are run by torch's own kernels: those of cuDNN have no second derivative, and
    in evaluation mode not even a first. What is compiled, a module or a function, runs eagerly: it
    calls nothing that stands in for a function of torch.

    Args:
        module: The module that runs.
    """
    with ExitStack() as stack:
        if any(isinstance(layer, nn.RNNBase) for layer in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def repeatable_kernels(module: nn.Module, *, is_coarse: bool) -> Iterator[None]:
    """Choose, for a forward pass, implementations whose loss can be computed again.

    Compiled dropout draws its masks otherwise than eager, so that no eager pass could be made with
    them. In precisions below float32, where kernels round so differently that a gradient might as
    well have been edited, they are those of :func:`twice_differentiable_kernels`.

    Args:
        module: The module that runs.
        is_coarse: Whether it runs in such a precision.
    """
    with ExitStack() as stack:
        if is_coarse:
            stack.enter_context(twice_differentiable_kernels(module))
        elif is_compiled(module) and _has_dropout(module):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def runs_compiled(module: nn.Module, *, is_coarse: bool) -> bool:
    """Tell whether compiled modules stay compiled among :func:`repeatable_kernels`.

    Args:
        module: The module that runs.
        is_coarse: Whether it runs in a precision below float32.

    Returns:
        Whether there are any that do.
    """
    return is_compiled(module) and not is_coarse and not _has_dropout(module)


def _has_dropout(module: nn.Module) -> bool:
    """Tell whether there is a layer of dropout, or one that has it as attention and LSTMs do."""
    # Private: what all layers of dropout have in common.
    shares = (
        layer.p if isinstance(layer, _DropoutNd) else getattr(layer, "dropout", 0)
        for layer in module.modules()
    )
    return any(isinstance(share, (int, float)) and share > 0 for share in shares)


_embedding = torch.embedding


def _dense_embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of a table, with a gradient of the table's own layout."""
    if scale_grad_by_freq and weight.requires_grad:
        raise MisconfigurationException(
            "`F.embedding(..., scale_grad_by_freq=True)` gives a gradient that is not that of the "
            "loss. Leave it out."
        )
    return _embedding(weight, indices, padding_idx, scale_grad_by_freq)


_renorm = F._no_grad_embedding_renorm_  # type: ignore[attr-defined]


def _renorm_(weight: Tensor, *args: Any) -> Any:
    if weight.requires_grad:
        raise MisconfigurationException(
            "`F.embedding(..., max_norm=...)` shortens its weights whenever it runs, which cannot "
            "be followed. Leave it out, and bound them in the loss."
        )
    return _renorm(weight, *args)


def _refuse_checkpoint(*args: Any) -> NoReturn:
    raise MisconfigurationException(
        "`checkpoint(..., use_reentrant=True)` hides the graph of what it runs, got it in a step "
        "that is followed. Use `use_reentrant=False`."
    )


def is_compiled(module: nn.Module) -> bool:
    """Tell whether the module or a submodule was given to ``torch.compile``.

    Args:
        module: The module.

    Returns:
        Whether it was.
    """
    # Private: a module compiled in place by `module.compile()`, and one that Lightning took out of
    # `torch.compile(module)`, show it in no other way.
    return getattr(module, "_compiler_ctx", None) is not None or any(
        isinstance(layer, torch._dynamo.OptimizedModule) or layer._compiled_call_impl is not None
        for layer in module.modules()
    )


def warn_of_eager_steps(module: nn.Module) -> None:
    """Say that a compiled module runs eagerly while it is followed.

    Args:
        module: The module.
    """
    if is_compiled(module):
        rank_zero_warn(
            "Compiled modules have no second derivative: hypergradients run them eagerly. So do "
            "the steps that are followed, but for `TRHO()` without dropout, in float32 and above. "
            "Set `start_step` and `stop_step` to follow a part of the run alone."
        )
