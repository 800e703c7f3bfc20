"""The outer objective and its partial derivatives at the present weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_rtho._numerics import are_finite
from lightning_rtho.distributed import mean_over_ranks
from lightning_rtho.hypergradient import OuterGradient
from lightning_rtho.linearization import unheard, value_dependence

__all__ = ["NoGraphError", "outer_gradient"]


class NoGraphError(ValueError):
    """A validation loss depends on nothing differentiably."""


def outer_gradient(
    losses: Sequence[Callable[[], Tensor]],
    params: Sequence[Tensor],
    hypers: Sequence[Tensor],
    statistics: Sequence[Tensor] = (),
    scale: float = 1.0,
) -> OuterGradient:
    """Evaluate the mean of validation losses and its derivatives by weights and hyperparameters.

    Processes that train together average over their batches.

    Args:
        losses: One function a batch that returns its loss ``[]``; one graph is held at a time.
        params: Weights, each ``[*P]``.
        hypers: Hyperparameters, natural values, each ``[*H]``.
        statistics: Running statistics on which the losses depend differentiably, each ``[*B]``;
            their derivatives are those of this process.
        scale: What the losses are multiplied by meanwhile, so that small float16 gradients do not
            vanish; 1 where gradients would overflow.

    Returns:
        Value and derivatives.

    Raises:
        NoGraphError: If a loss has none.

    Example:
        >>> w = torch.tensor([3.0], requires_grad=True)
        >>> outer_gradient([lambda: (w**2).sum()], [w], []).params
        [tensor([6.])]
    """
    inputs = [*params, *hypers, *statistics]
    wanted = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    totals: list[Tensor | None] = [None] * len(inputs)
    values: list[Tensor] = []
    for compute in losses:
        loss = compute()
        if not loss.requires_grad:
            raise NoGraphError(
                "The outer objective does not depend on the weights differentiably: "
                "`validation_step` (or `outer_step`) returned a loss without a graph. Return the "
                "loss itself, not a detached value or a metric computed from class decisions."
            )
        with value_dependence(), unheard():
            grads = _scaled_gradients(loss, [inputs[i] for i in wanted], scale)
        for i, gradient in zip(wanted, grads, strict=True):
            if gradient is not None:
                part = gradient.to_dense()  # embeddings' are sparse
                known, part = totals[i], part if len(losses) == 1 else part / len(losses)
                totals[i] = part if known is None else known + part
        values.append(loss.detach() / len(losses))
    first_statistic = len(params) + len(hypers)
    totals[:first_statistic] = mean_over_ranks(totals[:first_statistic], [*params, *hypers])
    value = torch.stack([part.to(values[0]) for part in values]).sum()
    (value,) = mean_over_ranks([value], like=[value])
    return OuterGradient(
        value,
        totals[: len(params)],
        totals[len(params) : first_statistic],
        totals[first_statistic:],
    )


def _scaled_gradients(
    loss: Tensor, inputs: Sequence[Tensor], scale: float
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a loss, computed of a multiple of it if that can be."""
    if scale != 1:
        found = torch.autograd.grad(scale * loss, inputs, allow_unused=True, retain_graph=True)
        if bool(are_finite([gradient for gradient in found if gradient is not None])):
            return tuple(None if gradient is None else gradient / scale for gradient in found)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(loss, inputs, allow_unused=True)
    return gradients
