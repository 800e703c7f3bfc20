"""Functions with a defined derivative at their singular points."""

import torch
from torch import Tensor


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
