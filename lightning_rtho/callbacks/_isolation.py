"""Running the user's code without leaving a trace in the training run."""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rtho.hyperparameters import Hyperparameter

__all__ = ["isolated"]


@contextmanager
def isolated(trainer: Trainer, module: LightningModule, stage: RunningStage) -> Iterator[None]:
    """Run a step of the module, with gradients, in a copy of everything that it may change.

    Random state, buffers, torchmetrics and other attributes of the module are afterwards what they
    were; what it logs goes nowhere.

    Args:
        trainer: The trainer in its training loop.
        module: The module.
        stage: The stage that the step belongs to; it runs in evaluation mode unless that is
            training.
    """
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        if isinstance(trainer.strategy, ParallelStrategy):
            # No backward pass follows that the processes would have to wait for.
            stack.enter_context(trainer.strategy.block_backward_sync())
        stack.enter_context(_silenced(trainer, module))
        stack.enter_context(_preserved(module))
        stack.enter_context(_in_stage(trainer, stage))
        stack.enter_context(torch.enable_grad())
        if stage is not RunningStage.TRAINING:
            module.eval()
        yield


@contextmanager
def _in_stage(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Let the trainer say that it is in another stage."""
    present = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = present


@contextmanager
def _silenced(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Send to nowhere what the module logs, by ``self.log`` or to its loggers directly."""

    def discard(*args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    loggers = trainer.loggers
    trainer.loggers = [DummyLogger() for _ in loggers]
    module.log = module.log_dict = discard  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log, module.log_dict
        trainer.loggers = loggers


@contextmanager
def _preserved(module: nn.Module) -> Iterator[None]:
    """Put every attribute of the module and its submodules back to what it was.

    Tensors that need no gradient (buffers, metric states) are replaced by copies meanwhile:
    they may be inference tensors, which nothing may write to outside of Lightning's validation.
    Lists, dicts and sets get their contents back. Of attributes that are neither buffers nor
    metric states only small ones are copied: a module may hold its whole data set.
    """
    namespaces = [vars(submodule) for submodule in module.modules()]
    namespaces += [submodule._buffers for submodule in module.modules()]
    saved = [dict(namespace) for namespace in namespaces]
    contents = [
        (value, copy.copy(value))
        for namespace in saved
        for name, value in namespace.items()
        if isinstance(value, (list, dict, set)) and name not in _MODULE_ATTRIBUTES
    ]
    attributes = {id(vars(m)) for m in module.modules() if not isinstance(m, Metric)}
    for namespace in namespaces:
        largest = _SMALL if id(namespace) in attributes else math.inf
        copies = {k: v.clone() for k, v in namespace.items() if _is_state(v, largest)}
        namespace.update(copies)
    try:
        yield
    finally:
        for namespace, values in zip(namespaces, saved, strict=True):
            namespace.clear()
            namespace.update(values)
        for container, content in contents:
            container.clear()
            container.extend(content) if isinstance(container, list) else container.update(content)


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has: parameters, submodules and hooks, which no step changes."""

_SMALL = 2**20
"""Entries up to which a plain tensor attribute is taken for state rather than data."""


def _is_state(value: Any, largest: float) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Hyperparameter)
        and not value.requires_grad
        and value.numel() <= largest
    )
