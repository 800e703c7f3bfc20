"""What all layers share: slopes, rounding, copies to a device, versions, tensors among others."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""Where numbers can be read without waiting for an accelerator."""


def sqrt_zero_slope(x: Tensor) -> Tensor:
    """Square root with derivative 0, not infinity, at x = 0.

    A second moment is zero only where every gradient so far was zero; the numerator of Adam's
    quotient vanishes there too, so slope 0 gives the quotient its true one-sided derivative, 1/eps.

    Args:
        x: Non-negative values ``[*P]``.

    Returns:
        Square roots ``[*P]``.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> torch.autograd.grad(sqrt_zero_slope(x).sum(), x)[0]
        tensor([0.0000, 0.2500])
    """
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def tolerance(tensors: Sequence[Tensor], precision: torch.dtype | None = None) -> float:
    """Return the relative difference below which gradients count as the same.

    The root of eps: far above the rounding of a sum taken in another order, far below an edit.

    Args:
        tensors: The gradients, each ``[*P]``.
        precision: What else they were computed in, as by ``autocast``.

    Returns:
        The tolerance of the coarsest of these dtypes.
    """
    dtypes = {tensor.dtype for tensor in tensors} | ({precision} if precision else set())
    return math.sqrt(max(torch.finfo(dtype).eps for dtype in dtypes))


def differ(
    grads: Sequence[Tensor], others: Sequence[Tensor | None], precision: torch.dtype | None = None
) -> Tensor:
    """Tell whether gradients differ, taken together, by more than rounding.

    Together, since kernels that sum in any order, as on CUDA, leave single entries that do.

    Args:
        grads: Gradients, each ``[*P]``; at least one.
        others: What they are held against, each ``[*P]``; None is zero.
        precision: See :func:`tolerance`.

    Returns:
        A boolean ``[]``, not yet synchronised with the host; False where they are not finite.
    """
    differences, norms = [], []
    for grad, other in zip(grads, others, strict=True):
        differences.append((grad if other is None else grad - other).norm())
        norms.append(grad.norm())
    allowed = tolerance(grads, precision) * torch.stack(norms).norm()
    found: Tensor = torch.stack(differences).norm() > allowed
    return found


def sent_to(device: torch.device, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a small tensor to a device; if that is CUDA, without waiting for its work.

    Anywhere else a copy that is not waited for may be read before it is there.

    Args:
        device: Where to.
        tensor: What.
        dtype: Of the copy; None keeps it.

    Returns:
        The copy, or the tensor itself where nothing changes.
    """
    return tensor.to(device, dtype or tensor.dtype, non_blocking=device.type == "cuda")


def place_of_doubles(device: torch.device) -> torch.device:
    """Tell where numbers that belong to a device can be held in float64.

    Args:
        device: The device.

    Returns:
        The device, or the host where it has no float64.
    """
    return HOST if device.type == "mps" else device


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Tell whether tensors are finite, reading each once.

    Args:
        tensors: The tensors, each ``[*P]``.

    Returns:
        A boolean ``[]``, not yet synchronised with the host.
    """
    if not tensors:
        return torch.tensor(True)
    # Hyperparameters that are numbers stand on the host, whatever the weights are on.
    device = next((t.device for t in tensors if t.device.type != "cpu"), tensors[0].device)
    sums = [sent_to(device, tensor.sum(dtype=torch.float32)) for tensor in tensors]
    return torch.stack(sums).isfinite().all()


def version_of(tensor: Tensor) -> int | None:
    """Count how often a tensor has been written to.

    Args:
        tensor: The tensor ``[*X]``.

    Returns:
        The count; None where torch does not keep it, as of inference tensors.
    """
    return None if tensor.is_inference() else tensor._version


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Find the tensors among the arguments of a function.

    Args:
        tree: Nested tuples, lists and dicts.

    Yields:
        The tensors.
    """
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))
