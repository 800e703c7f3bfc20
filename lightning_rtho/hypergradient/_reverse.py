"""Reverse-HG over a window: a cotangent of the training state, pulled back through its steps."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_rtho._numerics import HOST, are_finite, place_of_doubles, sent_to
from lightning_rtho._types import StateCotangent
from lightning_rtho.distributed import is_distributed, mean_over_ranks
from lightning_rtho.hypergradient._arena import Arena
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
from lightning_rtho.hypergradient._tape import RecordedStep, Tape
from lightning_rtho.linearization import (
    Linearization,
    TracedLoss,
    cohort_vjp,
    cohorts,
    is_large,
)

__all__ = ["ReverseHypergradient"]


@final
class ReverseHypergradient(AbstractHypergradient):
    r"""Reverse-HG: alpha_T = grad E, g += alpha_t B_t, alpha_{t-1} = alpha_t A_t, for t = T..1.

    The window reaches back to the last call of :meth:`hypergradient` or :meth:`reset`. Time does
    not depend on the number of hyperparameters; memory grows with the window, as the tape tells.
    Processes that train together exchange n + m numbers a step for n weights and m entries.

    Args:
        params: All parameters of the optimizer, each ``[*P]``.
        hypers: The hyperparameters, natural values, each ``[*H]``, m entries together.
        tape: What is kept of a step.

    References:
        Franceschi et al. (2017), Algorithm 1; Shaban et al. (2019) for the truncation.
    """

    keeps_history = False

    def __init__(self, params: Sequence[Tensor], hypers: Sequence[Tensor], tape: Tape) -> None:
        super().__init__(params, hypers)
        self.tape, self.needs_replay = tape, tape.needs_replay
        self._verified = False
        self._faults: list[Fault] = []
        self.tape.clear()

    @property
    def _place(self) -> torch.device:
        """Where dE/dlambda is added up."""
        return place_of_doubles(self.params[0].device)

    def extend(self, params: Sequence[Tensor]) -> None:
        """See :meth:`AbstractHypergradient.extend`; the window begins anew."""
        super().extend(params)
        self.reset()

    def forget_gradients(self, indices: Iterable[int]) -> None:
        """See :meth:`AbstractHypergradient.forget_gradients`; here every step begins anew."""

    def transport(self, old: Tensor, new: Tensor) -> None:
        """See :meth:`AbstractHypergradient.transport`; every window begins with no history."""

    def start(self, buffers: Iterable[Tensor] = ()) -> None:
        """See :meth:`AbstractHypergradient.start`."""
        self.tape.start(self.params, buffers)

    def record(self, loss: TracedLoss, replay: Replay | None) -> list[Tensor | None] | None:
        """See :meth:`AbstractHypergradient.record`."""
        return self.tape.record(loss, replay, self.params, self.hypers)

    def settle(self) -> None:
        """See :meth:`AbstractHypergradient.settle`; the tape has taken down what may move."""

    def advance(self, step: OptimizerStep) -> None:
        """See :meth:`AbstractHypergradient.advance`."""
        self.tape.advance(step, self.params)

    def hypergradient(self, outer: OuterGradient) -> Tensor:
        """See :meth:`AbstractHypergradient.hypergradient`; ends the window."""
        is_outer_finite = outer.is_finite
        alphas = _cotangents(outer.release_params())
        betas = list(outer.statistics)
        # What is said of a step is read when all are done: to ask is to wait for a device.
        total = self._flat(outer.hypers, self._place)
        memory: dict[int, Tensor] = {}
        gradient_checks: list[tuple[int, Tensor]] = []
        product_checks: list[tuple[int, Tensor]] = []
        edits: list[Tensor] = []
        try:
            for recorded in self.tape.backward(self.params, self.hypers):
                number = recorded.step.number
                grads_bar = self._pull_back_update(recorded.step, alphas, total, memory)
                # A gradient that is not finite spreads to weights, objective and total, if it is
                # not clipped by value; that the host knows for less than a look at it costs.
                is_known = total.device.type == "cpu" and is_outer_finite and _is_finite(total)
                if not is_known:
                    gradient_checks.append((number, are_finite(recorded.step.raw_grads)))
                recorded = recorded.after_update()
                is_first = len(self.tape) == 0
                part, check = self._pull_back_losses(
                    recorded, alphas, betas, grads_bar, edits, is_first
                )
                total += part
                product_checks.append((number, check))
                del recorded, grads_bar  # before the tape makes the next
        finally:
            if len(self.tape):  # a window that cannot be read ends, too
                self.tape.clear()
        self._refuse(edits)
        total = total.cpu()
        if not (is_outer_finite and _is_finite(total)):
            broken = [Fault(n, "gradient") for n, check in gradient_checks if not bool(check)]
            if is_outer_finite and not broken:
                # The first that was not: those behind it are products with what came of it.
                faults = [n for n, check in product_checks if not bool(check)]
                broken = [Fault(n, "Hessian product") for n in faults[:1]]
            self._faults += broken
        return total

    def _pull_back_update(
        self,
        step: OptimizerStep,
        alphas: list[StateCotangent],
        total: Tensor,
        memory: dict[int, Tensor],
    ) -> Sequence[Tensor]:
        """Pull alpha back through Phi and clipping, to the state; return the gradient's part.

        New memory costs more than what is written to it, so a large part is written over that of
        the step before, which `memory` holds by parameter.

        Returns:
            Cotangents of the raw gradients, one a transition, each ``[*P]``.
        """
        columns: list[int] = []
        parts: list[Tensor] = []
        for positions in cohorts(step.transitions, are_small=True):
            cohort = [step.transitions[position] for position in positions]
            first = cohort[0]
            state_bars, grads_bar, hyper_bar = cohort_vjp(
                cohort, [alphas[transition.index] for transition in cohort], memory.get(first.index)
            )
            for transition, state_bar, grad_bar in zip(cohort, state_bars, grads_bar, strict=True):
                alphas[transition.index], memory[transition.index] = state_bar, grad_bar
            columns += first.columns.values()
            parts += [first.slopes.get(name, 1.0) * hyper_bar[name] for name in first.columns]
        _add_entries(total, columns, parts)
        clipped_bar = [memory[transition.index] for transition in step.transitions]
        if step.clip is None or not step.transitions:
            return clipped_bar
        return step.clip.vjp(step.raw_grads, clipped_bar)

    def _pull_back_losses(
        self,
        recorded: RecordedStep,
        alphas: list[StateCotangent],
        betas: list[Tensor | None],
        grads_bar: Sequence[Tensor],
        edits: list[Tensor],
        is_first: bool,
    ) -> tuple[Tensor, Tensor]:
        """Pull the gradient's cotangent back to the weights.

        Whether the step's gradient was another than that of its losses goes to `edits`.

        Returns:
            The part of dE/dlambda ``[m]``, and whether the products are finite, a boolean ``[]``.

        Raises:
            GradientMismatchError: If a graph does not give its gradient again.
        """
        step, transitions = recorded.step, recorded.step.transitions
        vectors: list[Tensor | None] = [None] * len(self.params)
        for transition, grad_bar in zip(transitions, grads_bar, strict=True):
            vectors[transition.index] = grad_bar
        total = self._flat([None] * len(self.hypers), self._place)
        traced: list[Tensor | None] = [None] * len(self.params)
        pulled: list[Tensor | None] = [None] * len(self.params)
        for linearization in recorded.linearizations:
            # Once a run: the structure of its graphs is that of the first.
            if not self._verified and not linearization.still_holds(step.precision):
                raise GradientMismatchError(
                    "A graph gives another gradient than it did at first, as that of activation "
                    "checkpointing does once the weights have moved"
                    f"{'' if self.needs_replay else '. Use `TRHO(tape=Recompute())`'}."
                )
            if step.is_traced is None:
                traced = [add(*pair) for pair in zip(traced, linearization.gradients, strict=True)]
            product = linearization.product(
                vectors,
                [None] * len(self.hypers),
                _pull_back_statistics(linearization, betas),
                wrt_params=not is_first,  # nobody asks for what came before the window
                last=True,
            )
            total += self._flat(product.hypers, self._place)
            pulled = [add(*pair) for pair in zip(pulled, product.params, strict=True)]
        self._verified = True
        pulled = mean_over_ranks(pulled, like=self.params)
        for alpha, part in zip(alphas, pulled, strict=True):
            if part is not None:
                _add_to(alpha, part)
        if transitions and not recorded.is_sampled:
            edits.append(edited(step, [traced[t.index] for t in transitions]))
        (total,) = mean_over_ranks([total], like=[total])
        return total, are_finite([total, *(part for part in pulled if part is not None)])

    def _refuse(self, edits: Sequence[Tensor]) -> None:
        """Refuse a window in which an optimizer's gradient was not that of its losses."""
        if any(bool(is_edited) for is_edited in edits):
            raise GradientMismatchError(
                "The gradient given to the optimizer is not the loss's: something between backward "
                "and the optimizer's step changes gradients, as torch's own functions of clipping "
                f"do{_TWICE if self.needs_replay else ''}. Clip by `Trainer(gradient_clip_val=...)`"
                " or once by `self.clip_gradients`, and scale the loss rather than its gradient"
                f"{_KEEP_GRAPHS if self.needs_replay else ''}."
            )

    def take_faults(self) -> list[Fault]:
        """See :meth:`AbstractHypergradient.take_faults`; of products, the last of a window."""
        faults, self._faults = sorted(self._faults), []
        return faults

    def state_dict(self) -> dict[str, Any]:
        """See :meth:`AbstractHypergradient.state_dict`; the steps of the window so far."""
        # A checkpoint is written by one process, which knows its own batches alone.
        return {"window": None if is_distributed() else self.tape.state_dict()}

    def load_state_dict(self, state: dict[str, Any], recollection: Recollection) -> None:
        """See :meth:`AbstractHypergradient.load_state_dict`."""
        self.reset()
        self.tape.load_state_dict(state["window"], recollection, self.params[0].device)

    def reset(self) -> None:
        """See :meth:`AbstractHypergradient.reset`; empties the tape."""
        self.tape.clear()


_TWICE = (
    ", or `training_step` does not compute the same loss twice, since it keeps state elsewhere "
    "than in buffers, or kernels draw dropout masks of their own or round otherwise, as under an "
    "`autocast` by hand"
)

_KEEP_GRAPHS = "; use `TRHO(tape=KeepGraph())` where a loss cannot be computed twice"


def _cotangents(gradients: Sequence[Tensor | None]) -> list[StateCotangent]:
    """Copy grad E, each ``[*P]``, to memory that cotangents will be written to in place."""
    given = [gradient for gradient in gradients if gradient is not None]
    arena = Arena(given[0].device if given else HOST, Arena.size_of(given))
    return [{} if gradient is None else {"param": arena.copy(gradient)} for gradient in gradients]


def _is_finite(total: Tensor) -> bool:
    return bool(total.isfinite().all())


def _add_entries(total: Tensor, columns: Sequence[int], parts: Sequence[Tensor]) -> None:
    """Add scalars to entries of `total`: those of a device and dtype at once, in a set order."""
    for device, dtype in dict.fromkeys((part.device, part.dtype) for part in parts):
        pairs = zip(columns, parts, strict=True)
        alike = [pair for pair in pairs if (pair[1].device, pair[1].dtype) == (device, dtype)]
        values = sent_to(total.device, torch.stack([part for _, part in alike]), total.dtype)
        entries = sent_to(total.device, torch.tensor([column for column, _ in alike]))
        total.index_put_((entries,), values, accumulate=True)


def _add_to(alpha: StateCotangent, part: Tensor) -> None:
    """Add to the weights' cotangent, in place where it owns its memory."""
    known = alpha.get("param")
    if known is None:
        alpha["param"] = part.clone()
    else:
        alpha["param"] = known.add_(part) if is_large(part) else known + part


def _pull_back_statistics(
    linearization: Linearization, betas: list[Tensor | None]
) -> list[Tensor | None]:
    """Pull cotangents of running statistics back through their averages; return those of s."""
    statistic_bars: list[Tensor | None] = []
    for update in reversed(linearization.updates):
        beta = betas[update.buffer]
        statistic_bars.append(None if beta is None else update.factor * beta)
        betas[update.buffer] = None if beta is None else (1 - update.factor) * beta
    return statistic_bars[::-1]
