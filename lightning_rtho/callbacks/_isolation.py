"""Running the user's code without leaving a trace in the training run."""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sized
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
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
    Lists, dicts, sets and arrays get their contents back, also those in one another and in objects
    of classes that come from where the module's own does, such as a meter. Of attributes that are
    neither buffers nor metric states only small ones are copied: a module may hold its whole data
    set.
    """
    namespaces = _namespaces(module)
    saved = [dict(namespace) for namespace in namespaces]
    held = _Held(_package(module))
    for namespace in saved:
        for name, value in namespace.items():
            if name not in _MODULE_ATTRIBUTES:
                held.enter(value)
    for metric in held.metrics:  # in plain lists and dicts, where torch does not see them
        saved += [dict(namespace) for namespace in _namespaces(metric)]
        namespaces += _namespaces(metric)
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
        held.put_back()


class _Held:
    """What containers hold, and what they held when they were entered.

    Args:
        package: Where classes come from whose objects are entered.

    Attributes:
        metrics: Metrics that were met.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._known: set[int] = set()
        self._contents: list[tuple[Any, Any]] = []
        self.metrics: list[Metric] = []

    def enter(self, value: Any) -> None:
        """Take down what a value holds, and what that holds in its turn."""
        if id(value) in self._known:
            return
        items: Iterable[Any] = ()
        if isinstance(value, Metric):
            self.metrics.append(value)
            items = [v for k, v in vars(value).items() if k not in _MODULE_ATTRIBUTES]
        elif isinstance(value, np.ndarray):
            if value.size <= _SMALL:
                self._contents.append((value, value.copy()))
        elif isinstance(value, (list, dict, set, deque)):
            self._contents.append((value, copy.copy(value)))
            items = value.values() if isinstance(value, dict) else value
        elif isinstance(value, tuple):
            items = value
        elif self._is_of_the_user(value):
            self._contents.append((vars(value), dict(vars(value))))
            items = vars(value).values()
        else:
            return
        self._known.add(id(value))
        if not isinstance(items, Sized) or len(items) <= _MANY:
            for item in items:
                self.enter(item)

    def _is_of_the_user(self, value: Any) -> bool:
        """Tell whether a value is an object like a meter, of a class of the module's author."""
        return (
            hasattr(value, "__dict__")
            and _package(value) == self._package
            and self._package not in _LIBRARIES
            and not isinstance(value, (type, nn.Module, Trainer))
        )

    def put_back(self) -> None:
        """Let everything hold again what it held."""
        for container, content in self._contents:
            if isinstance(container, np.ndarray):
                container[...] = content
                continue
            container.clear()
            add = container.extend if isinstance(container, (list, deque)) else container.update
            add(content)


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts in which a module and its submodules keep attributes and buffers."""
    return [space for part in module.modules() for space in (vars(part), part._buffers)]


def _package(value: Any) -> str:
    """Return the top-level package that a value's class comes from."""
    return type(value).__module__.partition(".")[0]


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has: parameters, submodules and hooks, which no step changes."""

_LIBRARIES = ("lightning", "pytorch_lightning", "torch")
"""Where modules, but no meters come from."""

_SMALL = 2**20
"""Entries up to which a plain tensor attribute is taken for state rather than data."""

_MANY = 10_000
"""Entries up to which a container is searched for others."""


def _is_state(value: Any, largest: float) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Hyperparameter)
        and not value.requires_grad
        and value.numel() <= largest
    )
