"""Handlers of signals find the training's own state, as those that write checkpoints must."""

import signal
import threading
from typing import Any

import lightning as L
import pytest
import torch

from lightning_rtho import RTHO, TRHO
from lightning_rtho.callbacks._signals import signals_deferred
from tests.callbacks.problems import SmallNet, fit

REQUEST = getattr(signal, "SIGUSR1", signal.SIGTERM)


class Interrupted(SmallNet):
    """A signal arrives in each of its steps, also in those that are made for hypergradients."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.signals = 0

    def training_step(self, batch, batch_idx):
        signal.raise_signal(REQUEST)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        signal.raise_signal(REQUEST)
        return super().validation_step(batch, batch_idx)


class States(L.Callback):
    """Takes down weights, mode and random state at the beginning of each step, and at the end."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, ...]] = {}

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.known[trainer.global_step] = state_of(pl_module)

    def on_train_end(self, trainer, pl_module):
        self.known[trainer.global_step] = state_of(pl_module)


def state_of(module: SmallNet) -> tuple[Any, ...]:
    weights = [param.detach().clone() for param in module.parameters()]
    return weights, module.training, module.trainer.state.stage


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_a_handler_finds_the_state_of_the_training(make):
    found: list[tuple[int, tuple[Any, ...]]] = []
    states, module = States(), Interrupted(lr=0.1)

    def handler(*_: Any) -> None:
        found.append((module.trainer.global_step, state_of(module)))

    before = signal.signal(REQUEST, handler)
    try:
        fit(module, states, make(["lr"], hyper_batch_size=3, outer_optimizer=None), steps=6)
        assert signal.getsignal(REQUEST) is handler
    finally:
        signal.signal(REQUEST, before)
    assert len(found) > 6  # that many are of the training's own steps
    for step, (weights, *mode) in found:
        expected, *expected_mode = states.known[step]
        assert all(map(torch.equal, weights, expected))
        assert mode == expected_mode


def test_what_arrived_is_passed_on_after_an_error():
    arrived = []

    @signals_deferred()
    def fail() -> None:
        signal.raise_signal(REQUEST)
        signal.raise_signal(REQUEST)
        assert not arrived
        raise ZeroDivisionError

    before = signal.signal(REQUEST, lambda *_: arrived.append(1))
    try:
        with pytest.raises(ZeroDivisionError):
            fail()
    finally:
        signal.signal(REQUEST, before)
    assert arrived == [1]  # as the system does, which counts none that waits


def test_nothing_is_deferred_where_no_handler_can_be_set():
    ran = []

    def run() -> None:
        with signals_deferred():
            ran.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran
