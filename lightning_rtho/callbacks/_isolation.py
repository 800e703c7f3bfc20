"""Running the user's code without leaving a trace in the training run."""

import math
import random
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from operator import is_, is_not
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
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
    trainer.loggers = [_Silent(logger) for logger in loggers]
    module.log = module.log_dict = discard  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.log, module.log_dict
        trainer.loggers = loggers


class _Silent(DummyLogger):
    """Logs nothing; tells where the logger writes whose place it takes.

    Args:
        logger: That logger.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger

    @property
    def log_dir(self) -> str | None:
        """The logger's own, or else where it saves."""
        found: str | None = getattr(self._logger, "log_dir", None) or self._logger.save_dir
        return found

    save_dir = log_dir  # which ``Trainer.log_dir`` asks a logger of another class for

    @property
    def root_dir(self) -> str | None:
        """The logger's own."""
        found: str | None = getattr(self._logger, "root_dir", None)
        return found

    @property
    def name(self) -> str | None:  # type: ignore[override]
        """The logger's own."""
        return self._logger.name

    @property
    def version(self) -> int | str | None:  # type: ignore[override]
        """The logger's own."""
        return self._logger.version


@contextmanager
def _preserved(module: nn.Module) -> Iterator[None]:
    """Put every attribute of the module and its submodules back to what it was.

    Tensors that need no gradient (buffers, metric states) are replaced by copies meanwhile:
    they may be inference tensors, which nothing may write to outside of Lightning's validation.
    What containers hold is put back, too, also in one another and in objects such as a meter, of
    classes that come from where the module's own does. Of attributes that are neither buffers nor
    metric states only small tensors are copied, and fewer than 10,000 values are searched of each:
    a module may hold its whole data set.
    """
    held = _Held(module)
    namespaces = _namespaces(module)
    for namespace in namespaces:
        for name, value in namespace.items():
            if name not in _MODULE_ATTRIBUTES:
                held.enter(value)
    for other in held.modules:  # in plain lists and dicts, where torch does not see them
        namespaces += _namespaces(other)
    saved = [dict(namespace) for namespace in namespaces]
    attributes = {id(vars(m)) for m in module.modules() if not isinstance(m, Metric)}
    for namespace in namespaces:
        largest = _SMALL if id(namespace) in attributes else math.inf
        copies = {k: v.clone() for k, v in namespace.items() if _is_state(v, largest)}
        namespace.update(copies)
    held.replace_tensors()
    # Those of scripted modules are nowhere to be replaced.
    scripted = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
    buffers = [(b, b.clone()) for part in scripted for b in part.buffers(recurse=False)]
    try:
        yield
    finally:
        for namespace, values in zip(namespaces, saved, strict=True):
            namespace.clear()
            namespace.update(values)
        held.put_back()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


class _Held:
    """What containers hold, and what they held when they were entered.

    Args:
        module: The module, whose own attributes are entered one by one.

    Attributes:
        modules: Modules that were met and are not the module's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._package = _package(module)
        self._known = {id(part) for part in module.modules()}
        self._contents: list[tuple[Any, Any]] = []
        self.modules: list[nn.Module] = []

    def enter(self, value: Any) -> None:
        """Take down what a value holds, and what that holds in its turn, up to a limit."""
        to_do, left = [value], _MANY
        while to_do and left > 0:
            value = to_do.pop()
            if not isinstance(value, _LEAVES) and id(value) not in self._known:
                self._known.add(id(value))
                items = list(islice(self._take_down(value), left))
                left -= len(items)
                to_do += items

    def _take_down(self, value: Any) -> Collection[Any]:
        """Note what one value holds; return that."""
        if isinstance(value, nn.Module):
            self.modules.append(value)
            parts = list(value.modules())
            self._known |= {id(part) for part in parts}
            return [v for p in parts for k, v in vars(p).items() if k not in _MODULE_ATTRIBUTES]
        if isinstance(value, np.ndarray):
            if value.flags.writeable and value.size <= _SMALL:
                self._contents.append((value, value.copy()))
            return ()
        if isinstance(value, tuple):
            return value
        if isinstance(value, _GENERATORS):
            self._contents.append((value, _state_of(value)))
            return ()
        container = value
        if not isinstance(value, (list, dict, set, deque)):
            container = self._attributes(value)
        if container is None:
            return ()
        content: Collection[Any]
        if isinstance(container, dict):
            content = dict(container)
        else:
            content = set(container) if isinstance(container, set) else list(container)
        self._contents.append((container, content))
        return content.values() if isinstance(content, dict) else content

    def _attributes(self, value: Any) -> dict[str, Any] | None:
        """Return the dict of an object's attributes, if it is of the module's author."""
        if not self._package or _package(value) != self._package:
            return None
        if isinstance(value, (type, Trainer)):
            return None
        try:
            found: dict[str, Any] = object.__getattribute__(value, "__dict__")
        except AttributeError:  # it has slots
            return None
        return found

    def replace_tensors(self) -> None:
        """Let copies stand for small tensors in dicts and objects, which may be written to."""
        for container, content in self._contents:
            if isinstance(container, dict) and len(container) <= _MANY:
                for key, value in content.items():
                    if _is_state(value, _SMALL):
                        dict.__setitem__(container, key, value.clone())  # the key is there

    def put_back(self) -> None:
        """Let everything hold again what it held; what is unchanged is not touched."""
        for container, content in self._contents:
            if isinstance(container, np.ndarray):
                if not _is_same(container, content):
                    container[...] = content
            elif isinstance(container, _GENERATORS):
                _set_state(container, content)
            elif isinstance(container, dict):
                _put_back(container, content)
            elif isinstance(container, set):
                if container != content:
                    container.clear()
                    container.update(content)
            elif len(container) != len(content) or any(map(is_not, container, content)):
                container.clear()
                container.extend(content)


def _put_back(container: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Let a dict hold what it held, in its order, whatever its class makes of writing to it."""
    keys, values = (container, content), (container.values(), content.values())
    if len(container) == len(content) and all(map(is_, *keys)) and all(map(is_, *values)):
        return  # soon seen, of however many
    plain = OrderedDict if isinstance(container, OrderedDict) else dict
    for key in [key for key in container if key not in content]:
        plain.__delitem__(container, key)
    if list(container) != list(content):
        plain.clear(container)
    for key, value in content.items():
        if dict.get(container, key, content) is not value:
            plain.__setitem__(container, key, value)


def _is_same(array: np.ndarray, other: np.ndarray) -> bool:
    """Tell whether two arrays hold the same, bit for bit."""
    return array.dtype != object and array.tobytes() == other.tobytes()


def _state_of(generator: Any) -> Any:
    """Return what a random generator will draw next depends on."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    """Let a random generator draw again what it drew from a state on."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts in which a module and its submodules keep attributes and buffers."""
    spaces = [space for part in module.modules() for space in (vars(part), part._buffers)]
    return [space for space in spaces if isinstance(space, dict)]  # scripted modules have others


def _package(value: Any) -> str | None:
    """Return the top-level package that a value's class comes from, if it is a user's."""
    package = type(value).__module__.partition(".")[0]
    return None if package in _LIBRARIES else package


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has: parameters, submodules and hooks, which no step changes."""

_LIBRARIES = ("builtins", "lightning", "pytorch_lightning", "torch", "torchmetrics")
"""Where modules, but no meters come from."""

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
"""What draws random numbers of its own."""

_LEAVES = (bool, int, float, complex, str, bytes, type(None), Tensor)
"""What holds nothing."""

_SMALL = 2**20
"""Entries up to which a plain tensor attribute is taken for state rather than data."""

_MANY = 10_000
"""Values up to which what an attribute holds is searched."""


def _is_state(value: Any, largest: float) -> bool:
    return (
        isinstance(value, Tensor)
        and not isinstance(value, Hyperparameter)
        and not value.requires_grad
        and value.numel() <= largest
    )
