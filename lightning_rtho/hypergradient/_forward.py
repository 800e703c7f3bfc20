"""Forward-HG: tangents of the training state, carried through every step."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_rtho._types import Hypers, StateTangent
from lightning_rtho.distributed import is_distributed, mean_over_ranks
from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient._base import (
    AbstractHypergradient,
    GradientMismatchError,
    OptimizerStep,
    OuterGradient,
    Recollection,
    Replay,
    add,
    edited,
)
from lightning_rtho.linearization import (
    Linearization,
    StatisticUpdate,
    TracedLoss,
    cohort_jvp,
    cohorts,
)

__all__ = ["ForwardHypergradient"]


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

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> rho = torch.tensor(0.5, requires_grad=True)
        >>> forward = ForwardHypergradient([w], [rho])
        >>> forward.record(TracedLoss(rho * (w**2).sum()))
        [tensor([1.])]

    References:
        Franceschi et al. (2017), Algorithm 2; Donini et al. (2020) for the discount.
    """

    def __init__(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor], discount: float = 1.0
    ) -> None:
        super().__init__(params, hypers)
        self.discount = discount
        self.reset()

    def reset(self) -> None:
        """See :meth:`AbstractHypergradient.reset`."""
        self.tangents: list[StateTangent] = [{} for _ in self.params]
        self.statistic_tangents: dict[int, Tensor] = {}
        self._grads: list[Tensor | None] = [None] * len(self.params)
        self._grads_dot: list[Tensor | None] = [None] * len(self.params)
        self._is_discounted = True
        self._edited: Tensor | None = None

    def extend(self, params: Sequence[Tensor]) -> None:
        """See :meth:`AbstractHypergradient.extend`; their tangents are zero."""
        super().extend(params)
        self.tangents += [{} for _ in params]
        self._grads += [None] * len(params)
        self._grads_dot += [None] * len(params)

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`AbstractHypergradient.state_dict`; Z."""
        return {"tangents": self.tangents, "statistic_tangents": self.statistic_tangents}

    def load_state_dict(self, state: dict[str, Any], recollection: Recollection) -> None:
        """See :meth:`AbstractHypergradient.load_state_dict`."""
        self.reset()
        self.tangents = [
            {name: value.to(param.device) for name, value in tangent.items()}
            for tangent, param in zip(state["tangents"], self.params, strict=True)
        ]
        device = self.params[0].device
        self.statistic_tangents = {
            buffer: value.to(device) for buffer, value in state["statistic_tangents"].items()
        }

    def forget_gradients(self, indices: Iterable[int]) -> None:
        """See :meth:`AbstractHypergradient.forget_gradients`."""
        for index in indices:
            self._grads[index] = self._grads_dot[index] = None

    @property
    def needs_replay(self) -> bool:
        """See :attr:`AbstractHypergradient.needs_replay`."""
        return False

    def start(self) -> None:
        """See :meth:`AbstractHypergradient.start`; nothing to prepare."""

    def record(self, loss: TracedLoss, replay: Replay | None = None) -> list[Tensor | None]:
        """See :meth:`AbstractHypergradient.record`; adds to g_dot = H Z + dg/dlambda."""
        if self.discount != 1 and not self._is_discounted:
            self._discount_history()
        self._is_discounted = True
        linearization = Linearization(loss, self.params, self.hypers)
        statistics: list[list[Tensor | None]] = []
        for entry in range(self.entries):
            product = linearization.product(
                [tangent["param"][entry] if tangent else None for tangent in self.tangents],
                self._unit_vector(entry),
                wrt_hypers=False,
            )
            self._add_column(entry, product.params)
            statistics.append(product.statistics)
        for index, gradient in enumerate(linearization.gradients):
            self._grads[index] = add(self._grads[index], gradient)
        for position, update in enumerate(linearization.updates):
            columns = [found[position] for found in statistics]
            self._advance_statistic(update, _stack(columns, like=update.statistic))
        return linearization.scaled_gradients

    def _add_column(self, entry: int, parts: Sequence[Tensor | None]) -> None:
        """Add to the tangents of the gradients one column, so that only one is held beside them."""
        for index, (param, part) in enumerate(zip(self.params, parts, strict=True)):
            if part is not None:
                grad_dot = self._grads_dot[index]
                if grad_dot is None:
                    grad_dot = self._grads_dot[index] = param.new_zeros(self.entries, *param.shape)
                grad_dot[entry] += part

    def _discount_history(self) -> None:
        self.tangents = [
            {name: self.discount * value for name, value in tangent.items()}
            for tangent in self.tangents
        ]
        self.statistic_tangents = {
            buffer: self.discount * value for buffer, value in self.statistic_tangents.items()
        }

    def _advance_statistic(self, update: StatisticUpdate, new: Tensor | None) -> None:
        """Push tangents through a running average: r_dot <- (1 - f) r_dot + f s_dot."""
        known = self.statistic_tangents.get(update.buffer)
        total = add(
            None if known is None else (1 - update.factor) * known,
            None if new is None else update.factor * new,
        )
        if total is not None:
            self.statistic_tangents[update.buffer] = total

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
        self._look_for_edits(step)
        grads_dot = self._grads_dot_of(step)
        if step.clip is not None:
            grads_dot = step.clip.jvp(step.raw_grads, grads_dot)
        is_finite = self._check(step, [], grads_dot)
        if is_finite.device.type == "cpu" and not is_finite:
            self._end_step(step)
            return
        for positions in cohorts(step.transitions):
            transitions = [step.transitions[i] for i in positions]
            new_tangents = cohort_jvp(
                transitions,
                [self._state_dot(transition) for transition in transitions],
                [grads_dot[i] for i in positions],
                self._hyper_dot(transitions[0]),
                keep=~is_finite,
            )
            for transition, tangent in zip(transitions, new_tangents, strict=True):
                self.tangents[transition.index] = tangent
        self._end_step(step)

    def _end_step(self, step: OptimizerStep) -> None:
        """Forget the gradients that the step has used."""
        self._is_discounted = False
        self.forget_gradients(transition.index for transition in step.transitions)

    def _look_for_edits(self, step: OptimizerStep) -> None:
        """Compare the optimizer's gradients with the losses'; among processes, at first alone."""
        if is_distributed() and self._edited is not None:
            return  # it would cost as much communication as another tangent
        traced = [self._grads[transition.index] for transition in step.transitions]
        found = edited(step, mean_over_ranks(traced, like=step.raw_grads))
        self._edited = found if self._edited is None else self._edited | found

    def _grads_dot_of(self, step: OptimizerStep) -> Sequence[Tensor]:
        """Tangents of the step's raw gradients, each ``[m, *P]``."""
        local = [self._grad_dot(transition.index) for transition in step.transitions]
        return [mean for mean in mean_over_ranks(local, like=local) if mean is not None]

    def _state_dot(self, transition: Transition) -> StateTangent:
        """Tangent of a parameter's state, each tensor ``[m, ...]``."""
        known = self.tangents[transition.index]
        return {
            name: known[name] if name in known else value.new_zeros(self.entries, *value.shape)
            for name, value in transition.state.items()
        }

    def _hyper_dot(self, transition: Transition) -> Hypers:
        """Tangents of a parameter's tuned settings, each ``[m]``."""
        return {
            name: transition.slopes.get(name, 1.0)
            * _one_hot(column, self.entries, like=transition.hyper[name])
            for name, column in transition.columns.items()
        }

    def _grad_dot(self, index: int) -> Tensor:
        """Tangent of a parameter's gradient ``[m, *P]``."""
        grad_dot, param = self._grads_dot[index], self.params[index]
        return param.new_zeros(self.entries, *param.shape) if grad_dot is None else grad_dot

    def hypergradient(self, outer: OuterGradient) -> Tensor:
        """See :meth:`AbstractHypergradient.hypergradient`; grad E . Z."""
        if self._edited is not None and bool(self._edited):
            raise GradientMismatchError(
                "The gradient given to the optimizer is not the loss's: something between backward "
                "and the optimizer's step changes gradients. Clip by "
                "`Trainer(gradient_clip_val=...)` and scale the loss rather than its gradient. In "
                "manual optimization call `self.manual_backward`, clip by `self.clip_gradients`, "
                "and clear gradients after each step."
            )
        total = self._flat(outer.hypers)
        tangents = [tangent.get("param") for tangent in self.tangents]
        statistics = [self.statistic_tangents.get(i) for i in range(len(outer.statistics))]
        for tangent, gradient in zip(
            [*tangents, *statistics], [*outer.params, *outer.statistics], strict=True
        ):
            if tangent is not None and gradient is not None:
                total += (tangent.reshape(self.entries, -1) @ gradient.flatten()).to(total)
        return total


def _stack(columns: Sequence[Tensor | None], like: Tensor) -> Tensor | None:
    """Join tangents ``[*P]`` to ``[m, *P]``, where None is zero."""
    if all(column is None for column in columns):
        return None
    return torch.stack([torch.zeros_like(like) if c is None else c for c in columns]).detach()


def _one_hot(position: int, size: int, like: Tensor) -> Tensor:
    """Unit vector ``[size]`` of the dtype and on the device of `like`."""
    vector = torch.zeros(size, dtype=like.dtype, device=like.device)
    vector[position] = 1
    return vector
