"""The least that a method can cost, in plain gradients."""

__all__ = ["floor"]

_REVERSE_PASSES = {
    "trho_keep": 9,
    "trho_recompute": 12,
    "trho_offload": 12,
    "reverse_loop": 9,
    "higher": 9,
    "torchopt": 9,
    "betty": 9,
}


def floor(method: str, *, entries: int, hyper_batch_size: int) -> float:
    """Count forward passes F against the 3 F of a plain gradient.

    A product with the Hessian takes 6 F. Forward mode takes one for each hyperparameter entry;
    reverse mode one a step but for the last of a window, of which only the hyperparameters' part
    is needed, and 3 F more to recompute the gradient. The gradient of the outer objective, which
    adds 1 / `hyper_batch_size` where validation batches are as large, is not counted.

    Args:
        method: Its name in ``METHODS``.
        entries: Number m of hyperparameter entries.
        hyper_batch_size: Optimizer steps between outer updates.

    Returns:
        The ratio.
    """
    if method in {"rtho", "forward_loop"}:
        return (3 + 6 * entries) / 3
    if method in _REVERSE_PASSES:
        return (_REVERSE_PASSES[method] - 6 / hyper_batch_size) / 3
    return 1.0
