"""Numbers and the like that a module holds: a part of what a training step depends on."""

from typing import Any

from lightning.pytorch import LightningModule
from torchmetrics import Metric

__all__ = ["PlainAttributes"]


class PlainAttributes:
    """Numbers and the like that a module and its submodules hold, which hooks may change.

    Args:
        module: The module. Tensors and containers that it holds are not looked at, nor metrics.
    """

    def __init__(self, module: LightningModule) -> None:
        self._module = module
        self._first = self._read()

    def _read(self) -> dict[tuple[str, str], Any]:
        return {
            (namespace, name): value
            for namespace, submodule in self._module.named_modules()
            if not isinstance(submodule, Metric)
            for name, value in vars(submodule).items()
            if isinstance(value, _PLAIN) and name not in _LIGHTNINGS_OWN
        }

    def changes(self) -> dict[tuple[str, str], Any]:
        """Return, by submodule and name, those that are not what they were at first."""
        unknown = object()
        return {k: v for k, v in self._read().items() if self._first.get(k, unknown) != v}

    def put(self, changes: dict[tuple[str, str], Any]) -> None:
        """Let the module hold again what it held.

        Args:
            changes: What :meth:`changes` returned then.
        """
        submodules = dict(self._module.named_modules())
        for (namespace, name), value in (self._first | changes).items():
            submodules[namespace].__dict__[name] = value


_PLAIN = (bool, int, float, str, type(None))

_LIGHTNINGS_OWN = frozenset(vars(LightningModule())) - {"training"}
