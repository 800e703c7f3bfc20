"""Numbers and the like that a module holds: a part of what a training step depends on."""

from collections.abc import Iterator
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import Metric

__all__ = ["Attributes", "PlainAttributes", "put_attributes", "saved_attributes"]

Attributes = dict[tuple[str, str], Any]
"""Values by the names of a submodule and of an attribute."""


class PlainAttributes:
    """Numbers and the like that a module and its submodules hold, which hooks may change.

    Args:
        module: The module. Tensors and containers that it holds are not looked at, nor metrics.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._last: Attributes = {}

    def take(self) -> Attributes:
        """Return, by submodule and name, those that are of a plain kind now."""
        found = {
            (namespace, name): value
            for namespace, submodule in self._module.named_modules()
            for name, value in _plain_attributes(submodule)
        }
        if found != self._last:  # else one serves for many steps
            self._last = found
        return self._last


def put_attributes(module: LightningModule, attributes: Attributes) -> None:
    """Let a module hold again what it held, in what it still has of submodules.

    Where it held nothing yet, the value of its class shows again.

    Args:
        module: The module.
        attributes: What :meth:`PlainAttributes.take` returned then.
    """
    submodules = dict(module.named_modules())
    for namespace, submodule in submodules.items():
        later = [
            name
            for name, value in _plain_attributes(submodule)
            if (namespace, name) not in attributes
            and type(value) in _PLAIN  # others are in no checkpoint, and may have been there
            and hasattr(type(submodule), name)
        ]
        for name in later:
            del submodule.__dict__[name]
    for (namespace, name), value in attributes.items():
        if namespace in submodules:
            submodules[namespace].__dict__[name] = value


def saved_attributes(attributes: Attributes) -> list[list[Any]]:
    """Return what a checkpoint may hold of attributes: no values of a user's or numpy's classes.

    Args:
        attributes: What :meth:`PlainAttributes.take` returned.

    Returns:
        Submodule, name and value of each.
    """
    numbers = {k: float(v) if isinstance(v, float) else v for k, v in attributes.items()}
    return [[*place, value] for place, value in numbers.items() if type(value) in _PLAIN]


def _plain_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    if not isinstance(module, Metric):
        for name, value in vars(module).items():
            if isinstance(value, _PLAIN) and name not in _LIGHTNINGS_OWN:
                yield name, value


_PLAIN = (bool, int, float, str, type(None))

_LIGHTNINGS_OWN = frozenset(vars(LightningModule())) - {"training"}
