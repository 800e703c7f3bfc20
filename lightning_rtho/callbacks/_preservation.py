"""Putting back what a step changes on the module and on what it holds."""

import math
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from operator import is_, is_not
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_rtho.hyperparameters import Hyperparameter

__all__ = ["preserved"]


@contextmanager
def preserved(module: nn.Module) -> Iterator[None]:
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
    try:
        yield
    finally:
        for namespace, values in zip(namespaces, saved, strict=True):
            namespace.clear()
            namespace.update(values)
        held.put_back()


class _Held:
    """What a module holds besides tensors that copies can stand for, and how that is put back.

    Args:
        module: The module, whose own attributes are entered one by one.

    Attributes:
        modules: Modules that were met and are not the module's own.
    """

    def __init__(self, module: nn.Module) -> None:
        self._package = _package(module)
        self._known = {id(part) for part in module.modules()}
        self._dicts: list[tuple[dict[Any, Any], dict[Any, Any]]] = []
        self._restorers: list[Callable[[], None]] = []
        self.modules: list[nn.Module] = []
        for part in module.modules():
            hooks = (part._backward_hooks, part._backward_pre_hooks)
            for place in (part._parameters, part._modules, *hooks):
                if isinstance(place, dict):  # those of scripted modules are none
                    self._restorers.append(partial(_restore_dict, place, dict(place)))
        # Of scripted modules buffers, too: these are nowhere to be replaced.
        scripted = [part for part in module.modules() if isinstance(part, torch.jit.ScriptModule)]
        for buffer in (b for part in scripted for b in part.buffers(recurse=False)):
            self._restorers.append(partial(_restore_buffer, buffer, buffer.clone()))

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
        """Note how one value is put back; return what it holds."""
        if isinstance(value, nn.Module):
            self.modules.append(value)
            parts = list(value.modules())
            self._known |= {id(part) for part in parts}
            return [v for p in parts for k, v in vars(p).items() if k not in _MODULE_ATTRIBUTES]
        if isinstance(value, tuple):
            return value
        if isinstance(value, np.ndarray):
            if value.flags.writeable and value.size <= _SMALL:
                self._restorers.append(partial(_restore_array, value, value.copy()))
            return ()
        if isinstance(value, _GENERATORS):
            self._restorers.append(_restorer_of(value))
            return ()
        if isinstance(value, set):
            members = set(value)
            self._restorers.append(partial(_restore_set, value, members))
            return members
        if isinstance(value, (list, deque)):
            content = list(value)
            self._restorers.append(partial(_restore_sequence, value, content))
            return content
        namespace = value if isinstance(value, dict) else self._attributes(value)
        if namespace is None:
            return ()
        items = dict(namespace)
        self._dicts.append((namespace, items))
        self._restorers.append(partial(_restore_dict, namespace, items))
        return items.values()

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
        for namespace, content in self._dicts:
            if len(namespace) <= _MANY:
                for key, value in content.items():
                    if _is_state(value, _SMALL):
                        dict.__setitem__(namespace, key, value.clone())  # the key is there

    def put_back(self) -> None:
        """Let everything hold again what it held; what is unchanged is not touched."""
        for restore in self._restorers:
            restore()


def _restore_buffer(buffer: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        buffer.copy_(value)


def _restore_array(array: np.ndarray, value: np.ndarray) -> None:
    if array.dtype == object or array.tobytes() != value.tobytes():
        array[...] = value


def _restore_sequence(sequence: list[Any] | deque[Any], content: Collection[Any]) -> None:
    if len(sequence) != len(content) or any(map(is_not, sequence, content)):
        sequence.clear()
        sequence.extend(content)


def _restore_set(values: set[Any], content: set[Any]) -> None:
    if values != content:
        values.clear()
        values.update(content)


def _restore_dict(namespace: dict[Any, Any], content: dict[Any, Any]) -> None:
    """Let a dict hold what it held, in its order, whatever its class makes of writing to it."""
    keys, values = (namespace, content), (namespace.values(), content.values())
    if len(namespace) == len(content) and all(map(is_, *keys)) and all(map(is_, *values)):
        return  # soon seen, of however many
    plain = OrderedDict if isinstance(namespace, OrderedDict) else dict
    for key in [key for key in namespace if key not in content]:
        plain.__delitem__(namespace, key)
    if list(namespace) != list(content):
        plain.clear(namespace)
    for key, value in content.items():
        if dict.get(namespace, key, content) is not value:
            plain.__setitem__(namespace, key, value)


def _restorer_of(generator: Any) -> Callable[[], None]:
    """Return what lets a random generator draw again what it would draw now."""
    if isinstance(generator, np.random.Generator):
        bits = generator.bit_generator
        return partial(setattr, bits, "state", bits.state)
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    return partial(generator.set_state, generator.get_state())


def _namespaces(module: nn.Module) -> list[dict[str, Any]]:
    """Return the dicts in which a module and its submodules keep attributes and buffers."""
    spaces = [space for part in module.modules() for space in (vars(part), part._buffers)]
    return [space for space in spaces if isinstance(space, dict)]  # scripted modules have others


def _package(value: Any) -> str | None:
    """Return the top-level package that a value's class comes from, if it is a user's."""
    package = type(value).__module__.partition(".")[0]
    return None if package in _LIBRARIES else package


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""What every module has: parameters, submodules and hooks, put back otherwise."""

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
