"""Real-time hyperparameter optimization in truncated reverse mode."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_rtho.callbacks._base import HypergradientCallback
from lightning_rtho.callbacks._diagnostics import Diagnostic
from lightning_rtho.callbacks._selection import Selection
from lightning_rtho.callbacks._summary import Plan
from lightning_rtho.hypergradient import (
    AbstractHypergradient,
    Offload,
    Recompute,
    ReverseHypergradient,
    Tape,
    forward_cost,
    reverse_cost,
)
from lightning_rtho.outer import OuterOptimizerCallable, adam

__all__ = ["TRHO"]


class TRHO(HypergradientCallback):
    r"""Tune hyperparameters while the model trains, by reverse-mode hypergradients of a window.

    Records `hyper_batch_size` optimizer steps, then pulls alpha = grad E_val back through them:
    g += alpha B_t, alpha <- alpha A_t, and moves lambda <- lambda - eta g. What happened before
    the window counts as given. Time does not depend on the number of hyperparameters; memory
    grows with the window, as the tape tells. For many hyperparameters; for few see `RTHO`.

    A window is too short to tell how high a learning rate may be: soon it is for lower ones (Wu et
    al. 2018). So a run begins with a range test (Smith 2017): rates climb by a factor of e an
    update until the run is lost, which begins again, where it began, with a tenth of that rate.

    Over several processes (DDP) one product is averaged for each step of the window, one number
    for each weight and hyperparameter entry, and the validation gradient every update.

    Args:
        hyperparameters: As `RTHO`.
        hyper_batch_size: Optimizer steps in a window, and between outer updates. Shorter windows
            cost less memory and lower learning rates earlier.
        outer_optimizer: As `RTHO`, but that by default learning rates climb first, for at most 20
            updates and a quarter of the run, and not to the end of an `Interval`; in the first of
            them by up to e^10 at once, to where the objective would change by 1 %. They do not with
            ``safeguard=False`` or an `objective` to be maximized, since no run goes back then, nor
            where the length of the run is not known.
        dataloader: As `RTHO`.
        outer_batches: As `RTHO`.
        objective: As `RTHO`.
        curvature_fraction: As `RTHO`; the sample's loss is computed on the way back.
        tape: What is kept of a step: ``Recompute()``, ``KeepGraph()`` or ``Offload("cpu")``; None
            is ``Recompute()``.
        start_step: As `RTHO`.
        stop_step: As `RTHO`.
        safeguard: As `RTHO`, but by the weights alone: the sensitivity is not known. The trial of
            10 updates begins when rates have climbed; until it is over a run whose weights become
            NaN or infinite goes back at once.
        summary: As `RTHO`.
        diagnostics: As `RTHO`, but ``"hypergradient_cosine"`` alone.

    Raises:
        ValueError: If a count is too small, `curvature_fraction` is out of bounds or below 1 with
            ``KeepGraph()``, `objective` is not differentiable, or a diagnostic is not known.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TRHO(hyper_batch_size=20)])

    References:
        Franceschi, Donini, Frasconi, Pontil: Forward and Reverse Gradient-Based Hyperparameter
        Optimization (ICML 2017).
        Smith: Cyclical Learning Rates for Training Neural Networks (WACV 2017).
        Wu, Ren, Liao, Grosse: Understanding Short-Horizon Bias in Stochastic Meta-Optimization
        (ICLR 2018).
    """

    _known_diagnostics = ("hypergradient_cosine",)

    def __init__(
        self,
        hyperparameters: Selection = None,
        *,
        hyper_batch_size: int = 20,
        outer_optimizer: OuterOptimizerCallable | None = adam,
        dataloader: Iterable[Any] | None = None,
        outer_batches: int = 1,
        objective: Metric | None = None,
        curvature_fraction: float = 1.0,
        tape: Tape | None = None,
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
        if tape is not None and not isinstance(tape, Tape):
            raise TypeError(
                f"`tape` must be Recompute(), KeepGraph() or Offload('cpu'), got {tape!r}. Pass an "
                "instance."
            )
        if tape is not None and curvature_fraction < 1 and not tape.needs_replay:
            raise ValueError(
                "`tape` must compute losses again with a `curvature_fraction` below 1, got "
                f"{tape!r}. Pass Recompute() or Offload('cpu')."
            )
        self.tape = Recompute() if tape is None else tape

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse settings that cannot be followed."""
        if stage == "fit" and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                "`TRHO` cannot follow manual optimization, got `automatic_optimization=False`: it "
                "runs past training steps again, which would make their updates again. Use `RTHO`."
            )
        super().setup(trainer, pl_module, stage)

    @override
    def _make_hypergradient(
        self, params: Sequence[Tensor], hypers: Sequence[Tensor]
    ) -> AbstractHypergradient:
        return ReverseHypergradient(params, hypers, copy.deepcopy(self.tape))

    @override
    def _plans(self, trainer: Trainer, entries: int) -> tuple[Plan, Plan]:
        window, tape = self.hyper_batch_size, self.tape
        arguments = f"hyper_batch_size={window}"
        name = f"TRHO({arguments}, tape={type(tape).__name__})"
        fraction = self.curvature_fraction
        cost = reverse_cost(window, recomputes=tape.needs_replay, fraction=fraction)
        comes_back = tape.needs_replay and fraction == 1  # with the loss, so that it is not kept
        has_several = trainer.accumulate_grad_batches > 1 or trainer.world_size > 1
        gradients = 0 if comes_back and not has_several else window
        place = str(tape.device) if isinstance(tape, Offload) else ""
        return (
            Plan(name, cost, "its hyper-batch", gradients, place),
            Plan(f"RTHO({arguments})", forward_cost(entries, fraction), "the whole run"),
        )
