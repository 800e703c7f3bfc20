"""Forward-HG: tangents of the training state, carried through every step."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lightning_rtho._numerics import are_finite
from lightning_rtho._types import Hypers
from lightning_rtho.distributed import mean_over_ranks
from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient._base import (
    AbstractHypergradient,
    Fault,
    GradientMismatchError,
    OptimizerStep,
    OuterGradient,
    Recollection,
    Replay,
    add,
)
from lightning_rtho.hypergradient._edits import edited
from lightning_rtho.hypergradient._tangents import Tangents, combined
from lightning_rtho.linearization import (
    Linearization,
    TracedLoss,
    cohort_jvp,
    cohorts,
    load_forward_mode,
)

__all__ = ["ForwardHypergradient"]

_LARGE = 2**20
"""Entries of Z's weights from which on it is advanced column by column.

Then one Hessian product is held at a time, beside Z and the graph of the loss.
"""


@final
class ForwardHypergradient(AbstractHypergradient):
    r"""Forward-HG: Z_0 = 0, Z_t = A_t Z_{t-1} + B_t, and dE/dlambda = grad E . Z_t.

    Z holds the derivative of weights and optimizer buffers by every hyperparameter entry. Memory
    is m times that of the training state, whatever the number of steps; time grows with m.
    Processes that train together exchange m n numbers a step for n weights: Phi is nonlinear, so
    the tangents of their gradients are averaged before it.

    Args:
        params: All parameters of the optimizer, each ``[*P]``.
        hypers: The hyperparameters, natural values, each ``[*H]``, m entries together.
        discount: Weight of the history: Z_t = discount A_t Z_{t-1} + B_t. 1 is exact, 0 looks one
            step back.
        needs_replay: Whether losses are computed again, as for products on samples of them.
        tangent_dtype: What Z is kept in; None for what the weights are. Products and updates are
            computed in that of the weights.

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> rho = torch.tensor(0.5, requires_grad=True)
        >>> forward = ForwardHypergradient([w], [rho])
        >>> forward.record(TracedLoss(rho * (w**2).sum()))
        [tensor([1.])]

    References:
        Franceschi et al. (2017), Algorithm 2; Donini et al. (2020) for the discount.
    """

    keeps_history = True

    def __init__(
        self,
        params: Sequence[Tensor],
        hypers: Sequence[Tensor],
        discount: float = 1.0,
        *,
        needs_replay: bool = False,
        tangent_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(params, hypers)
        self.discount = discount
        self.needs_replay = needs_replay
        self._dtype = tangent_dtype
        self._checks: list[tuple[int, Tensor]] = []
        load_forward_mode()
        self.reset()

    def reset(self) -> None:
        """See :meth:`AbstractHypergradient.reset`."""
        self.tangents = Tangents(self.params, self.entries, self._dtype)
        self._grads: list[Tensor | None] = [None] * len(self.params)
        self._grads_dot: list[Tensor | None] = [None] * len(self.params)
        self._pending: Linearization | None = None
        self._replay: Replay | None = None
        self._is_sampled = False
        self._is_discounted = True
        self._edited: Tensor | None = None

    def extend(self, params: Sequence[Tensor]) -> None:
        """See :meth:`AbstractHypergradient.extend`; their tangents are zero."""
        super().extend(params)
        self.tangents.extend(params)
        self._grads += [None] * len(params)
        self._grads_dot += [None] * len(params)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`AbstractHypergradient.state_dict`; Z."""
        return {**self.tangents.state_dict(), "is_discounted": self._is_discounted}

    def load_state_dict(self, state: dict[str, Any], recollection: Recollection) -> None:
        """See :meth:`AbstractHypergradient.load_state_dict`."""
        self.reset()
        self.tangents.load_state_dict(state)
        self._is_discounted = state["is_discounted"]

    def forget_gradients(self, indices: Iterable[int]) -> None:
        """See :meth:`AbstractHypergradient.forget_gradients`."""
        self.settle()
        for index in indices:
            self._grads[index] = self._grads_dot[index] = None

    def start(self, buffers: Iterable[Tensor] = ()) -> None:
        """See :meth:`AbstractHypergradient.start`; nothing to prepare."""

    def record(self, loss: TracedLoss, replay: Replay | None = None) -> list[Tensor | None] | None:
        """See :meth:`AbstractHypergradient.record`; adds to g_dot = H Z + dg/dlambda."""
        self.settle()
        if self.discount != 1 and not self._is_discounted:
            self.tangents.discount(self.discount)
        self._is_discounted = True
        if replay is not None and self.needs_replay:
            self._replay = replay  # until backward has let the loss's graph go
            return None
        return self._linearize(loss).scaled_gradients

    def _linearize(self, loss: TracedLoss) -> Linearization:
        """Make ready for products with the loss's Hessian."""
        self._pending = Linearization(loss, self.params, self.hypers)
        for index, gradient in enumerate(self._pending.gradients):
            self._grads[index] = add(self._grads[index], gradient)
        return self._pending

    def _compute_again(self) -> None:
        """Linearize the loss that is computed again, before the weights move."""
        if self._replay is not None:
            replay, self._replay = self._replay, None
            self._is_sampled = replay.is_sample
            self._linearize(replay())

    def settle(self) -> None:
        """See :meth:`AbstractHypergradient.settle`; lets the last loss's graph go."""
        self._compute_again()
        if self._pending is None:
            return
        for columns in self._chunks():
            for index, part in enumerate(self._take_columns(columns)):
                if part is not None:
                    whole = self._grads_dot[index]
                    if whole is None:
                        whole = part.new_zeros(self.entries, *part.shape[1:])
                        self._grads_dot[index] = whole
                    whole[columns.start : columns.stop] = part
        self._pending = None

    def _chunks(self) -> list[range]:
        """Split the hyperparameter entries: all at once, or one by one where that saves memory."""
        size = sum(param.numel() for param in self.params)
        chunk = self.entries if size * self.entries < _LARGE else 1
        return [range(i, i + chunk) for i in range(0, self.entries, chunk)]

    def _take_columns(self, columns: range) -> list[Tensor | None]:
        """Return tangents of the gradients by some entries, each ``[len(columns), *P]``.

        The last loss's running statistics advance with them.
        """
        products = []
        if self._pending is not None:
            for entry in columns:
                products.append(
                    self._pending.product(
                        self.tangents.along(entry),
                        self._unit_vector(entry),
                        wrt_hypers=False,
                        last=entry == self.entries - 1,
                    )
                )
            for position, update in enumerate(self._pending.updates):
                parts = [product.statistics[position] for product in products]
                new = _stack(parts, like=update.statistic)
                self.tangents.advance_statistic(update, columns, new)
        found: list[Tensor | None] = []
        for index, (param, known) in enumerate(zip(self.params, self._grads_dot, strict=True)):
            part = None if known is None else known[columns.start : columns.stop]
            found.append(
                add(part, _stack([product.params[index] for product in products], like=param))
            )
        return found

    def _unit_vector(self, entry: int) -> list[Tensor | None]:
        """Direction of one hyperparameter entry: one tensor ``[*H]`` a hyperparameter."""
        vectors: list[Tensor | None] = []
        for hyper, size in zip(self.hypers, self.sizes, strict=True):
            inside = 0 <= entry < size
            vectors.append(_one_hot(entry, size, hyper).reshape(hyper.shape) if inside else None)
            entry -= size
        return vectors

    def advance(self, step: OptimizerStep) -> None:
        """See :meth:`AbstractHypergradient.advance`; Z <- A Z + B."""
        if not step.transitions:
            self.forget_gradients(range(len(self.params)))
            return
        self._compute_again()
        self._look_for_edits(step)
        stepped = {transition.index for transition in step.transitions}
        if any(grad is not None and i not in stepped for i, grad in enumerate(self._grads)):
            self.settle()  # for those that step later
        is_finite, are_products_finite = are_finite(step.raw_grads), []
        for columns in self._chunks():
            grads_dot = self._grads_dot_of(step, columns)
            are_products_finite.append(are_finite(grads_dot))
            keep = ~(is_finite & are_products_finite[-1])
            self._push(step, columns, grads_dot, keep)
            del grads_dot  # before the next are made
        check = torch.stack([is_finite, torch.stack(are_products_finite).all()])
        self._checks.append((step.number, check))
        self._pending = None
        self._end_step(step)

    def take_faults(self) -> list[Fault]:
        """See :meth:`AbstractHypergradient.take_faults`."""
        # Read here, not step by step, so that the host need not wait for the device in each.
        checks, self._checks = self._checks, []
        faults = []
        for number, check in checks:
            gradient, product = check.tolist()
            if not (gradient and product):
                faults.append(Fault(number, "Hessian product" if gradient else "gradient"))
        return faults

    def _push(
        self, step: OptimizerStep, columns: range, grads_dot: Sequence[Tensor], keep: Tensor
    ) -> None:
        """Push some columns of Z through the update."""
        for positions in cohorts(step.transitions):
            transitions = [step.transitions[i] for i in positions]
            new_tangents = cohort_jvp(
                transitions,
                [self.tangents.of_state(transition, columns) for transition in transitions],
                [grads_dot[i] for i in positions],
                self._hyper_dot(transitions[0], columns),
                keep,
            )
            for transition, new in zip(transitions, new_tangents, strict=True):
                self.tangents.write(transition.index, columns, new)

    def _end_step(self, step: OptimizerStep) -> None:
        """Forget the gradients that the step has used."""
        self._is_discounted = False
        self.forget_gradients(transition.index for transition in step.transitions)

    def _look_for_edits(self, step: OptimizerStep) -> None:
        """Compare the optimizer's gradients with the losses', where these are not of samples."""
        if self._is_sampled:
            return
        found = edited(step, [self._grads[transition.index] for transition in step.transitions])
        self._edited = found if self._edited is None else self._edited | found

    def _grads_dot_of(self, step: OptimizerStep, columns: range) -> Sequence[Tensor]:
        """Tangents of the step's gradients after clipping, each ``[len(columns), *P]``."""
        found = self._take_columns(columns)
        local = []
        for transition in step.transitions:
            part, param = found[transition.index], self.params[transition.index]
            local.append(param.new_zeros(len(columns), *param.shape) if part is None else part)
        means = mean_over_ranks(local, like=local)
        return means if step.clip is None else step.clip.jvp(step.raw_grads, means)

    def _hyper_dot(self, transition: Transition, columns: range) -> Hypers:
        """Tangents of a parameter's tuned settings, each ``[len(columns)]``."""
        return {
            name: transition.slopes.get(name, 1.0)
            * _one_hot(column, self.entries, like=transition.hyper[name])[
                columns.start : columns.stop
            ]
            for name, column in transition.columns.items()
        }

    def hypergradient(self, outer: OuterGradient) -> Tensor:
        """See :meth:`AbstractHypergradient.hypergradient`; grad E . Z."""
        self.settle()  # at the values that the hyperparameters had
        if self._edited is not None and bool(self._edited):
            raise GradientMismatchError(
                "The gradient given to the optimizer is not the loss's: something between backward "
                "and the optimizer's step changes gradients, as torch's own functions of clipping "
                "do. Clip by `Trainer(gradient_clip_val=...)` or once by `self.clip_gradients`, "
                "and scale the loss rather than its gradient. In manual optimization call "
                "`self.manual_backward`, and clear gradients after each step."
            )
        total = self._flat(outer.hypers)
        total += self.tangents.pulled_back(outer.params, [], self._chunks())
        if outer.statistics:  # of which each process has its own
            nothing = [None] * len(self.params)
            own = self.tangents.pulled_back(nothing, outer.statistics, self._chunks())
            (mean,) = mean_over_ranks([own], like=[own])
            total += mean
        return total

    def transport(self, old: Tensor, new: Tensor) -> None:
        r"""See :meth:`AbstractHypergradient.transport`; Z <- J_new^-T J_old^T Z.

        With lambda = T(u), each step's part of Z was made where T had another slope. What is moved
        is u, and what a common shift of all u so far does to the weights, J^T Z, stays what it is:
        a learning rate's past is scaled as a whole, not by what is added to its present value.
        """
        self.settle()
        change = torch.linalg.solve(new.T, old.T)
        self.tangents.combine(change)
        self._grads_dot = [
            None if part is None else combined(change, part) for part in self._grads_dot
        ]

    def weight_tangents(self) -> list[Tensor | None]:
        """See :meth:`AbstractHypergradient.weight_tangents`; the part of Z that is the weights'."""
        return self.tangents.of_weights()

    def sensitivity(self, slopes: Tensor) -> float:
        """See :meth:`AbstractHypergradient.sensitivity`; infinite where Z is not finite."""
        size = get_total_norm([param.detach() for param in self.params]).item()
        if size == 0:
            return 0.0
        largest = (self.tangents.lengths(like=slopes) * slopes).max().item() / size
        return math.inf if math.isnan(largest) else largest


def _stack(columns: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Join tangents ``[*P]`` to ``[m, *P]``, where None is zero."""
    if all(column is None for column in columns):
        return None
    if len(columns) == 1 and columns[0] is not None:
        return columns[0].detach()[None]
    return torch.stack([torch.zeros_like(like) if c is None else c for c in columns]).detach()


def _one_hot(position: int, size: int, like: Tensor) -> Tensor:
    """Unit vector ``[size]`` of the dtype and on the device of `like`."""
    vector = torch.zeros(size, dtype=like.dtype, device=like.device)
    vector[position].fill_(1)  # on the device; assigning a number waits for it
    return vector
