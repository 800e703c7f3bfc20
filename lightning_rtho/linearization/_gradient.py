"""The gradient of one loss and products with its Hessian, from the loss's own graph."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from lightning_rtho._numerics import differ, sent_to
from lightning_rtho.linearization._graph import graph_leaves, graph_nodes
from lightning_rtho.linearization._hooks import unheard
from lightning_rtho.linearization._statistics import StatisticUpdate
from lightning_rtho.linearization._stop_gradient import changes_gradient, value_dependence

__all__ = ["Linearization", "Product", "TracedLoss"]


@dataclass(frozen=True)
class TracedLoss:
    """Loss of one micro-batch and what computing it did to the running statistics.

    Attributes:
        value: The loss ``[]`` with its graph.
        updates: Updates of running statistics, in the order in which they were made.
        scale: What `value` is multiplied by, to keep small float16 gradients from vanishing; the
            optimizer's gradient is freed of it.
        is_shared: Whether parts of its graph may be those of another loss, too.
    """

    value: Tensor
    updates: tuple[StatisticUpdate, ...] = ()
    scale: float = 1.0
    is_shared: bool = False


class Product(NamedTuple):
    """A product with the joint Hessian, part by part; None is zero.

    Attributes:
        params: With respect to the weights, each ``[*P]``.
        hypers: With respect to the hyperparameters, each ``[*H]``.
        statistics: Derivatives of the new running statistics in the direction of the vector, one
            an update, each ``[*B]``.
    """

    params: list[Tensor | None]
    hypers: list[Tensor | None]
    statistics: list[Tensor | None]


@final
class Linearization:
    r"""First and second derivatives of a loss L(w, lambda) at the point where it was computed.

    Weights and hyperparameters are differentiated together: their joint Hessian is symmetric, so
    one kind of product serves both modes. With v = (v_w, v_lambda),

        H v = (d/dw, d/dlambda) <(g_w, g_lambda), v>.

    Where a gradient was stopped or scaled, the gradient's Jacobian is not symmetric; then products
    with it and with its transpose are told apart.

    Statistics s(w) that the forward pass left behind join in with multipliers u: of
    L + <u, s> at u = 0, the mixed part of the Hessian is ds/dw.

    It owns the loss's graph until it is dropped.

    Args:
        loss: The loss with its graph; derivatives are those of the unscaled loss.
        params: Weights w, each ``[*P]``.
        hypers: Hyperparameters lambda, each ``[*H]``.

    Attributes:
        scaled_gradients: dL/dw times the loss's scale, detached, each ``[*P]``; None where the
            loss does not depend on it.
        updates: What computing the loss did to running statistics.

    Raises:
        RuntimeError: If an operation of the loss has no second derivative; where torch itself only
            notices on the way, by :meth:`product`.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> rho = torch.tensor(0.5, requires_grad=True)
        >>> line = Linearization(TracedLoss(rho * (w**2).sum()), [w], [rho])
        >>> line.scaled_gradients
        [tensor([1., 2.])]
        >>> line.product([torch.tensor([1.0, 0.0])], [None])
        Product(params=[tensor([1., 0.])], hypers=[tensor(2.)], statistics=[])
    """

    def __init__(
        self, loss: TracedLoss, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> None:
        self.updates = loss.updates
        self._loss, self._params = loss.value, list(params)
        self._is_shared = loss.is_shared
        self._scale = loss.scale
        statistics = [update.statistic for update in loss.updates]
        multipliers = [torch.zeros_like(s).requires_grad_(s.requires_grad) for s in statistics]
        self._inputs = [*params, *hypers, *multipliers]
        self._bounds = (len(params), len(params) + len(hypers))
        pairs = [(s, u) for s, u in zip(statistics, multipliers, strict=True) if s.requires_grad]
        # Live, or an operation without second derivative that ends the loss would pass for linear.
        seed = torch.ones_like(loss.value).requires_grad_()
        gradients = _gradients(
            [loss.value, *(s for s, _ in pairs)],
            [*params, *hypers],
            [seed, *(u for _, u in pairs)],
            create_graph=True,
        )
        nodes = {node.name() for node in graph_nodes(gradients)}
        _check_twice_differentiable(nodes)
        self._is_symmetric = not changes_gradient(nodes)
        outputs = [*gradients, *statistics]  # the derivative of L + <u, s> by u is s
        # Where they are in the graph, not what they are: that may go while products are taken.
        self._outputs = [
            get_gradient_edge(y) if y is not None and y.requires_grad else None for y in outputs
        ]
        self._places = [None if y is None else y.device for y in outputs]
        # A weight that only statistics depend on has a gradient of zeros by now, not none.
        used = {id(x) for x in (graph_leaves(loss.value) if pairs else params)}
        self.scaled_gradients = [
            gradient.detach() if gradient is not None and id(param) in used else None
            for param, gradient in zip(params, gradients, strict=False)
        ]

    @property
    def gradients(self) -> list[Tensor | None]:
        """The gradient dL/dw, detached, each ``[*P]``; None where it is zero."""
        return self._unscaled(self.scaled_gradients)

    def still_holds(self, precision: torch.dtype | None = None) -> bool:
        """Tell whether the graph still gives the gradient that it gave at first.

        It does not if it reads the weights anew, as activation checkpointing does, and the weights
        have moved.

        Args:
            precision: The coarsest dtype that it was computed in, where that is not the gradient's.

        Returns:
            Whether the two gradients agree up to rounding.
        """
        # With a graph, by the same kernels as at first.
        again = _gradients(
            [self._loss], self._params, [torch.ones_like(self._loss)], create_graph=True
        )
        pairs = [
            (first, second)
            for first, second in zip(self.scaled_gradients, again, strict=True)
            if first is not None and second is not None
        ]
        if not pairs:
            return True
        firsts, seconds = zip(*pairs, strict=True)
        return not bool(differ(firsts, [second.detach() for second in seconds], precision))

    def _unscaled(self, parts: list[Tensor | None]) -> list[Tensor | None]:
        if self._scale == 1:
            return parts
        return [None if part is None else part / self._scale for part in parts]

    def product(
        self,
        param_vectors: Sequence[Tensor | None],
        hyper_vectors: Sequence[Tensor | None],
        statistic_vectors: Sequence[Tensor | None] | None = None,
        *,
        wrt_params: bool = True,
        wrt_hypers: bool = True,
        last: bool = False,
    ) -> Product:
        """Multiply the joint Hessian with a vector.

        Args:
            param_vectors: v_w, each ``[*P]``; None is zero.
            hyper_vectors: v_lambda, each ``[*H]``; None is zero.
            statistic_vectors: Cotangents of the statistics, one an update, each ``[*B]``; None is
                zero, and None in the place of all asks for their derivatives instead.
            wrt_params: Whether the weights' part of the product is needed.
            wrt_hypers: Whether the hyperparameters' part is needed.
            last: Whether no product follows, so that the graph may go while it is read, and
                :attr:`scaled_gradients` before that.

        Returns:
            The parts of the product.
        """
        first_hyper, first_statistic = self._bounds
        wrt_statistics = statistic_vectors is None
        if wrt_statistics and not self._is_symmetric:
            return self._derivative([*param_vectors, *hyper_vectors])
        statistic_bars = [
            None if vector is None else self._scale * vector
            for vector in statistic_vectors or [None] * len(self.updates)
        ]
        vectors = [*param_vectors, *hyper_vectors, *statistic_bars]
        pairs = [
            (output, sent_to(place, vector))
            for output, place, vector in zip(self._outputs, self._places, vectors, strict=True)
            if output is not None and place is not None and vector is not None
        ]
        wanted = [
            *range(first_hyper if wrt_params else 0),
            *range(first_hyper, first_statistic if wrt_hypers else first_hyper),
            *range(first_statistic, len(self._inputs) if wrt_statistics else first_statistic),
        ]
        parts: list[Tensor | None] = [None] * len(self._inputs)
        is_last = last and not self._is_shared
        if is_last:
            self.scaled_gradients = []
        if pairs:
            with value_dependence():
                found = _gradients(
                    [output for output, _ in pairs],
                    [self._inputs[i] for i in wanted],
                    [vector for _, vector in pairs],
                    retain_graph=not is_last,
                )
            for i, part in zip(wanted, found, strict=True):
                parts[i] = part
        return Product(
            self._unscaled(parts[:first_hyper]),
            self._unscaled(parts[first_hyper:first_statistic]),
            parts[first_statistic:],  # the statistics were not scaled
        )

    def _derivative(self, vectors: Sequence[Tensor | None]) -> Product:
        """Derive gradients and statistics in a direction, by the transpose of the transpose.

        F(u) = J^T u is linear in u, so that d<F(u), v>/du = J v.

        Args:
            vectors: v, one a weight and hyperparameter.

        Returns:
            J v.
        """
        first_hyper, first_statistic = self._bounds
        outputs = [*self._outputs[:first_hyper], *self._outputs[first_statistic:]]
        twins = [*self._inputs[:first_hyper], *self._inputs[first_statistic:]]
        used = {i: output for i, output in enumerate(outputs) if output is not None}
        duals = [torch.zeros_like(twins[i]).requires_grad_() for i in used]
        with value_dependence():
            pulled = _gradients(
                [*used.values()], self._inputs[:first_statistic], duals, create_graph=True
            )
        known = zip(pulled, vectors, strict=True)
        pairs = [(f, sent_to(f.device, v)) for f, v in known if f is not None and v is not None]
        parts: list[Tensor | None] = [None] * len(outputs)
        if pairs:
            found = _gradients(
                [f for f, _ in pairs], duals, [v for _, v in pairs], retain_graph=True
            )
            for i, part in zip(used, found, strict=True):
                parts[i] = part
        return Product(
            self._unscaled(parts[:first_hyper]),
            [None] * (first_statistic - first_hyper),
            parts[first_hyper:],
        )


def _check_twice_differentiable(nodes: Collection[str]) -> None:
    """Refuse what torch marks as an error in the graph but, for want of an edge, never reaches."""
    if "torch::autograd::Error" in nodes:
        raise RuntimeError(
            "A backward pass is marked `once_differentiable`, so that its part of the "
            "hypergradient would be lost without a word."
        )


def _gradients(
    outputs: Sequence[Tensor] | Sequence[GradientEdge],
    inputs: Sequence[Tensor],
    grad_outputs: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool | None = None,
) -> list[Tensor | None]:
    """``torch.autograd.grad``, unheard, that gives None for inputs that need no gradient."""
    positions = [i for i, tensor in enumerate(inputs) if tensor.requires_grad]
    results: list[Tensor | None] = [None] * len(inputs)
    if positions:
        with unheard():
            found = torch.autograd.grad(
                outputs,
                [inputs[i] for i in positions],
                grad_outputs,
                create_graph=create_graph,
                retain_graph=retain_graph,
                allow_unused=True,
            )
        for i, gradient in zip(positions, found, strict=True):
            results[i] = gradient
    return results
