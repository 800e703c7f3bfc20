"""What Lightning's settings of gradient clipping stand for."""

from collections.abc import Iterable

from torch import Tensor

from lightning_rtho.linearization import ClipByNorm, ClipByValue, GradientClip

__all__ = ["clipping", "copied_gradients"]


def clipping(limit: float | None, algorithm: str | None) -> GradientClip | None:
    """Return the clipping by a limit.

    Args:
        limit: Of the norm, or of each entry; none is set where it is None or 0.
        algorithm: ``"norm"`` or ``"value"``, or Lightning's enumeration of them; None is the norm.

    Returns:
        The clipping; None without a limit.
    """
    if not limit:
        return None
    by_value = algorithm is not None and algorithm.lower() == "value"
    return ClipByValue(limit) if by_value else ClipByNorm(limit)


def copied_gradients(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copy what is about to be clipped.

    Args:
        params: Weights, each ``[*P]``.

    Returns:
        The gradients of those that have one, each ``[*P]``.
    """
    return {p: p.grad.detach().clone() for p in params if p.grad is not None}
