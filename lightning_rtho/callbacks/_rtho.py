"""Real-time hyperparameter optimization in forward mode."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._diagnostics import Diagnostic
from lightning_rtho.callbacks._selection import Selection
from lightning_rtho.callbacks._summary import Plan
from lightning_rtho.hypergradient import (
    AbstractHypergradient,
    ForwardHypergradient,
    forward_cost,
    reverse_cost,
)
from lightning_rtho.outer import OuterOptimizerCallable, adam

__all__ = ["RTHO"]


class RTHO(HypergradientCallback):
    r"""Tune hyperparameters while the model trains, by forward-mode hypergradients.

    Carries Z_t = A_t Z_{t-1} + B_t, the derivative of weights and optimizer state by the
    hyperparameters, through every optimizer step, and every `hyper_batch_size` steps moves
    lambda <- lambda - eta grad E_val . Z_t. Z is not reset: it holds the whole history, as a
    derivative by what is moved, the values in log, logit or other raw space. When they move, Z is
    taken along: a learning rate's past is scaled as a whole. Memory is m training states, flat in
    time; each of the m hyperparameter entries costs about two plain gradients a step. For few
    hyperparameters; for many see `TRHO`.

    Over several processes (DDP) the tangents of the gradient are averaged every step, m numbers
    for each weight, and the validation gradient every update.

    After a fit the callback keeps what a checkpoint of its end needs, on the host, until the next.

    Args:
        hyperparameters: Names of hyperparameters that the module declares or of settings of its
            optimizer (``"lr"``, ``"weight_decay"``, ``"beta1"``), each with its natural domain; a
            dict to choose the domains; None for all that the module declares.
        hyper_batch_size: Optimizer steps between outer updates.
        outer_optimizer: Makes a torch optimizer of the list of raw tensors, by default
            ``Adam(raw, lr=0.2, betas=(0.8, 0.95))``, by whose steps learning rates move five times
            as far as long as they do nothing: until a raw unit would change the outer objective by
            1 %. None observes: hypergradients are computed and logged, nothing is moved, and
            training is bitwise what it is without the callback (but for attention, recurrent
            layers, weight norm and compiled modules, whose kernels with a second derivative round
            differently).
        dataloader: Data of the outer objective; None takes the trainer's validation loader.
        outer_batches: Validation batches in one evaluation: a loss is averaged over them, a metric
            taken of all together.
        objective: A differentiable torchmetrics metric to take as the outer objective, minimized
            or maximized as its ``higher_is_better`` says; value and hypergradients are shown as its
            own. Its predictions and targets are the pair that the module's
            ``outer_step(batch, batch_idx)`` returns; without one, ``module(inputs)`` and the
            targets of batches ``(inputs, targets)``. None takes the loss that ``outer_step`` or
            ``validation_step`` returns.
        curvature_fraction: Share of each batch's examples, in (0, 1], that Hessian products are
            taken on, drawn anew each step; 1 is exact. Less is cheaper, noisier and unbiased in
            each product. The training step runs once more on the drawn examples, so the loss must
            be the mean of something over examples, which is checked in the first step; tensors of
            a batch whose first axis is as long as that of its first tensor hold one entry an
            example.
        tangent_dtype: What Z is kept in, as ``torch.bfloat16`` for half the memory; None for what
            the weights are.
        discount: Weight of the history in Z; 1 is exact, 0 looks one step back.
        start_step: Optimizer step from which on the run is followed, with Z = 0.
        stop_step: Optimizer step from which on it is not followed any more; None for never.
        safeguard: Whether to halve the learning rate where the run is chaotic (a sensitivity above
            10), and to take a run that is lost back to its best state so far, with a tenth of the
            rate: one whose outer objective is 5 % above its start or not finite, or whose weights
            have moved more than twice their length from the best state without a gain of 20 % for
            every two lengths. In its first 10 updates a run goes back to its start, and that gain
            is asked for every length that its weights have moved, or depend on the logarithm of
            the rate by (the sensitivity). The best state is one more copy of the training state,
            also in checkpoints. With an `objective` to be maximized, whose size says nothing of
            how far it has fallen, no run goes back.
        summary: Whether to print before the run what is tuned, where it acts, and what that will
            cost in time and memory.
        diagnostics: What to log beside at every outer update: ``"hypergradient_cosine"``, between
            this hypergradient and the last, all hyperparameters as one vector of natural
            derivatives; ``"tangent_norm"``, ||dw/dlambda|| of each; ``"tangent_histogram"``, the
            entries of dw/dlambda in each layer, where a logger takes histograms.

    Raises:
        ValueError: If a count is too small, `discount` or `curvature_fraction` is out of bounds,
            `objective` is not differentiable, or a diagnostic is not known.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[RTHO(["lr", "weight_decay"], hyper_batch_size=20)])

    References:
        Franceschi, Donini, Frasconi, Pontil: Forward and Reverse Gradient-Based Hyperparameter
        Optimization (ICML 2017).
    """

    _known_diagnostics = ("hypergradient_cosine", "tangent_histogram", "tangent_norm")

    def __init__(
        self,
        hyperparameters: Selection = None,
        *,
        hyper_batch_size: int = 10,
        outer_optimizer: OuterOptimizerCallable | None = adam,
        dataloader: Iterable[Any] | None = None,
        outer_batches: int = 1,
        objective: Metric | None = None,
        curvature_fraction: float = 1.0,
        tangent_dtype: torch.dtype | None = None,
        discount: float = 1.0,
        start_step: int = 0,
        stop_step: int | None = None,
        safeguard: bool = True,
        summary: bool = True,
        diagnostics: Sequence[Diagnostic] = (),
    ) -> None:
        super().__init__(
            hyperparameters,
            hyper_batch_size=hyper_batch_size,
            outer_optimizer=outer_optimizer,
            dataloader=dataloader,
            outer_batches=outer_batches,
            objective=objective,
            curvature_fraction=curvature_fraction,
            start_step=start_step,
            stop_step=stop_step,
            safeguard=safeguard,
            summary=summary,
            diagnostics=diagnostics,
        )
        if not 0 <= discount <= 1:
            raise ValueError(
                f"`discount` must lie in [0, 1], got {discount}. 1 keeps the whole history, 0 none."
            )
        if tangent_dtype is not None and not tangent_dtype.is_floating_point:
            raise ValueError(
                f"`tangent_dtype` must be a real floating type, got {tangent_dtype}. Pass for "
                "example `torch.bfloat16`."
            )
        self.discount = discount
        self.tangent_dtype = tangent_dtype

    @override
    def _make_hypergradient(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> AbstractHypergradient:
        return ForwardHypergradient(
            params,
            hypers,
            self.discount,
            needs_replay=self.curvature_fraction < 1,
            tangent_dtype=self.tangent_dtype,
        )

    @override
    def _plans(self, trainer: Trainer, entries: int) -> tuple[Plan, Plan]:
        window, fraction = self.hyper_batch_size, self.curvature_fraction
        usual = torch.get_default_dtype()
        precision = (self.tangent_dtype or usual).itemsize / usual.itemsize
        arguments = f"hyper_batch_size={window}"
        forward = forward_cost(entries, fraction, precision)
        reverse = reverse_cost(window, recomputes=True, fraction=fraction)
        gradients = entries if trainer.accumulate_grad_batches > 1 else 0
        return (
            Plan(f"RTHO({arguments})", forward, "the whole run", gradients),
            Plan(f"TRHO({arguments})", reverse, "its hyper-batch"),
        )
