"""Running the user's code without leaving a trace in the training run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import RunningStage

from lightning_rtho.callbacks._preservation import preserved
from lightning_rtho.callbacks._random import read_random_state, write_random_state

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
        stack.callback(write_random_state, read_random_state())
        stack.enter_context(_silenced(trainer, module))
        stack.enter_context(preserved(module))
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
