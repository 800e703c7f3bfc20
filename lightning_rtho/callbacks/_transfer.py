"""Hyperparameters that act where batches are transferred, before a training step begins."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

__all__ = ["live_transfers"]

_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


@contextmanager
def live_transfers(
    trainer: Trainer, module: LightningModule, make_live: Callable[[bool], None]
) -> Iterator[None]:
    """Let hyperparameters be live in the hooks that transfer training batches, and only there.

    Lightning tells of a batch when these have run, and of their beginning not at all. What other
    hooks between two steps make of a hyperparameter may outlast a step, and with it its graph.

    Args:
        trainer: The trainer.
        module: The module, which may have the hooks, as may the data module.
        make_live: Lets what is computed from hyperparameters have a graph, or none.
    """

    def live(hook: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(hook)
        def run(*args: Any, **kwargs: Any) -> Any:
            make_live(trainer.training)
            try:
                return hook(*args, **kwargs)
            finally:
                make_live(False)

        return run

    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for owner in (module, datamodule):
            for name in _HOOKS:
                if owner is not None and is_overridden(name, owner):
                    stand_in = live(getattr(owner, name))
                    stack.enter_context(mock.patch.object(owner, name, stand_in))
        yield
