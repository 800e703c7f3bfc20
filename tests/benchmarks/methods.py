"""The ways to train a task that are compared, each under the name it has in the tables."""

import logging
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor

from lightning_rtho import (
    RTHO,
    TRHO,
    KeepGraph,
    Offload,
    OuterUpdate,
    Recompute,
    ReplaySchedule,
    Schedule,
)
from lightning_rtho.callbacks import HypergradientCallback
from lightning_rtho.hyperparameters import declared_hyperparameters
from tests.benchmarks import loops, passes, peers
from tests.benchmarks.workloads import Task

__all__ = ["FRACTION", "METHODS", "TITLES", "Method", "available_methods", "train_quietly"]


class Method(Protocol):
    """Trains a task for some steps."""

    def __call__(
        self, task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
    ) -> Tensor | None:
        """Train.

        Args:
            task: The task, fresh.
            device: Where to train it.
            steps: Optimizer steps, a multiple of the task's `hyper_batch_size`.
            after_step: Called after each, the outer update of the last of a window included.

        Returns:
            The last hypergradient ``[m]``; None where there is none.
        """


class _AfterStep(L.Callback):
    """Calls a function after each step; stands behind the callback that is measured."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_train_batch_end(self, *args: Any) -> None:
        self.function()


def _fit(make_callback: Callable[[Task], HypergradientCallback] | None = None) -> Method:
    """Train by ``Trainer.fit``, with a callback or without."""

    def train(
        task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
    ) -> Tensor | None:
        callbacks = [] if make_callback is None else [make_callback(task)]
        train_quietly(task, device, steps, [*callbacks, _AfterStep(after_step)])
        for callback in callbacks:
            if callback.start_step < steps:
                # A hypergradient that is not finite would be thrown away, and work saved.
                if len(callback.schedule) != steps // task.hyper_batch_size:
                    raise RuntimeError("An outer update is missing: the training diverged.")
                return torch.cat([part.flatten() for part in callback.hypergradients.values()])
        return None

    return train


def train_quietly(
    task: Task, device: torch.device, steps: int, callbacks: list[L.Callback]
) -> None:
    """Train a task with some callbacks and nothing else."""
    silence_lightning()
    trainer = L.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=1,
        max_steps=steps,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=1,
        check_val_every_n_epoch=1000,
    )
    trainer.fit(task, task.loader(1, steps), task.loader(2, steps))


def _replay(
    task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
) -> Tensor | None:
    """Train along a schedule with an update at the end of each window."""
    values = {name: hyper.plain for name, hyper in declared_hyperparameters(task).items()}
    schedule = Schedule(start=values)
    for step in range(task.hyper_batch_size, steps + 1, task.hyper_batch_size):
        schedule.append(OuterUpdate(step, values, hypergradients={}, outer_objective=0.0))
    train_quietly(task, device, steps, [ReplaySchedule(schedule), _AfterStep(after_step)])
    return None


def silence_lightning() -> None:
    """Let the trainer announce nothing."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers")
    warnings.filterwarnings("ignore", ".*made no update")  # of the idle method
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13


def _outer(raw: list[Tensor]) -> torch.optim.Optimizer:
    """Make the whole outer step, but a small one: all methods train at about the same values."""
    return torch.optim.Adam(raw, lr=1e-4)


def _rtho(**settings: Any) -> Method:
    return _fit(
        lambda task: RTHO(
            hyper_batch_size=task.hyper_batch_size,
            outer_optimizer=_outer,
            safeguard=False,
            **settings,
        )
    )


def _trho(make_tape: Callable[[], Any], **settings: Any) -> Method:
    return _fit(
        lambda task: TRHO(
            hyper_batch_size=task.hyper_batch_size,
            outer_optimizer=_outer,
            safeguard=False,
            tape=make_tape(),
            **settings,
        )
    )


FRACTION = 0.25
"""Share of a batch's examples that products are taken on, in the methods below the floor."""

METHODS: dict[str, Method] = {
    "plain": _fit(),
    "rtho": _rtho(),
    "trho_keep": _trho(KeepGraph),
    "trho_recompute": _trho(Recompute),
    "trho_offload": _trho(Offload),
    "rtho_quarter": _rtho(curvature_fraction=FRACTION),
    "trho_quarter": _trho(Recompute, curvature_fraction=FRACTION),
    "rtho_bfloat16": _rtho(tangent_dtype=torch.bfloat16),
    "idle": _rtho(start_step=10**9),
    "replay": _replay,
    "forward_loop": loops.forward_loop,
    "reverse_loop": loops.reverse_loop,
    "higher": peers.higher,
    "torchopt": peers.torchopt,
    "betty": peers.betty,
    "forward_passes": passes.forward_passes,
    "keep_passes": partial(passes.reverse_passes, recomputes=False),
    "recompute_passes": partial(passes.reverse_passes, recomputes=True),
    "forward_passes_quarter": partial(passes.forward_passes, fraction=FRACTION),
    "recompute_passes_quarter": partial(passes.reverse_passes, recomputes=True, fraction=FRACTION),
}

TITLES = {
    "plain": "plain `Trainer.fit`",
    "rtho": "`RTHO()`",
    "trho_keep": "`TRHO(tape=KeepGraph())`",
    "trho_recompute": "`TRHO(tape=Recompute())`",
    "trho_offload": '`TRHO(tape=Offload("cpu"))`',
    "rtho_quarter": "`RTHO(curvature_fraction=0.25)`",
    "trho_quarter": "`TRHO(curvature_fraction=0.25)`",
    "rtho_bfloat16": "`RTHO(tangent_dtype=torch.bfloat16)`",
    "idle": "`RTHO(start_step=...)`, observing nothing yet",
    "replay": "`ReplaySchedule(...)`",
    "forward_loop": "forward mode by hand",
    "reverse_loop": "reverse mode by hand, unrolled",
    "higher": "higher",
    "torchopt": "TorchOpt",
    "betty": "Betty",
    "forward_passes": "gradients and products of forward mode alone",
    "keep_passes": "those of reverse mode, graphs kept, alone",
    "recompute_passes": "those of reverse mode, recomputing, alone",
    "forward_passes_quarter": "those of forward mode, on a quarter, alone",
    "recompute_passes_quarter": "those of reverse mode, on a quarter, alone",
}


def available_methods(task: type[Task], device: torch.device) -> list[str]:
    """Name the methods that a task is trained by here, without the plain one."""
    return [
        name
        for name in task.methods
        if peers.is_available(name) and (device.type == "cuda" or name != "trho_offload")
    ]
