"""Hyperparameters that act where batches are transferred, before a training step begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

from lightning.pytorch import Trainer

__all__ = ["live_transfers"]


@contextmanager
def live_transfers(
    trainer: Trainer, follows: Callable[[], bool], make_live: Callable[[bool], None]
) -> Iterator[None]:
    """Let hyperparameters be live while batches of followed training steps are transferred.

    Lightning tells of a batch when its hooks (``on_before_batch_transfer`` and the like) have run,
    and of their beginning not at all, so that we stand before what it calls around them. What other
    hooks between two steps make of a hyperparameter may outlast a step, and with it its graph.

    Args:
        trainer: The trainer.
        follows: Tells whether what is transferred is the batch of a coming step that is followed.
        make_live: Lets what is computed from hyperparameters have a graph, or none.
    """
    convert_input = trainer.precision_plugin.convert_input
    batch_to_device = trainer.strategy.batch_to_device
    is_transferring = False

    @wraps(convert_input)
    def begin(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_transferring
        is_transferring = trainer.training and follows()
        if is_transferring:
            make_live(True)
        return convert_input(*args, **kwargs)

    @wraps(batch_to_device)
    def finish(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_transferring
        moved = batch_to_device(*args, **kwargs)
        if is_transferring:  # or a step moves something itself
            is_transferring = False
            make_live(False)
        return moved

    with (
        mock.patch.object(trainer.precision_plugin, "convert_input", begin),
        mock.patch.object(trainer.strategy, "batch_to_device", finish),
    ):
        yield
