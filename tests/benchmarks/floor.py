"""The least that a method can cost, in plain gradients."""

from lightning_rtho.hypergradient import forward_cost, reverse_cost
from tests.benchmarks.methods import FRACTION

__all__ = ["floor"]

_FORWARD = {"rtho", "forward_loop", "forward_passes", "rtho_bfloat16"}
_REVERSE = {"trho_keep", "reverse_loop", "higher", "torchopt", "betty", "keep_passes"}
_RECOMPUTING = {"trho_recompute", "trho_offload", "recompute_passes"}
_FORWARD_ON_SAMPLES = {"rtho_quarter", "forward_passes_quarter"}
_REVERSE_ON_SAMPLES = {"trho_quarter", "recompute_passes_quarter"}


def floor(method: str, *, entries: int, hyper_batch_size: int) -> float:
    """Count forward passes F against the 3 F of a plain gradient.

    A product with the Hessian takes 6 F. Forward mode takes one for each hyperparameter entry;
    reverse mode one a step but for the last of a window, of which only the hyperparameters' part
    is needed, and 3 F more to recompute the gradient. The gradient of the outer objective, which
    adds 1 / `hyper_batch_size` where validation batches are as large, is not counted. Products on
    a fraction f of the examples take 6 f F, and the gradient of these 3 f F.

    Args:
        method: Its name in ``METHODS``.
        entries: Number m of hyperparameter entries.
        hyper_batch_size: Optimizer steps between outer updates.

    Returns:
        The ratio.
    """
    fraction = FRACTION if method in _FORWARD_ON_SAMPLES | _REVERSE_ON_SAMPLES else 1.0
    if method in _FORWARD | _FORWARD_ON_SAMPLES:
        return forward_cost(entries, fraction).ratio
    if method in _REVERSE | _RECOMPUTING | _REVERSE_ON_SAMPLES:
        again = method not in _REVERSE
        return reverse_cost(hyper_batch_size, recomputes=again, fraction=fraction).ratio
    return 1.0
