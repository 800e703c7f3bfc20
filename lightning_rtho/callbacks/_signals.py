"""Signals that ask a process to save its state come at a time when that is whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

__all__ = ["signals_deferred"]

_REQUESTS = ("SIGHUP", "SIGTERM", "SIGUSR1", "SIGUSR2")
"""What asks a program for something, as SLURM does before it stops a job; not every system has all.

An interrupt from the keyboard is not among them, nor what tells that something is broken.
"""


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let handlers of signals wait, those that are functions, as Lightning's under SLURM.

    They write checkpoints, and weights, modes and random numbers are not the training's meanwhile.

    Yields:
        Nothing.
    """
    arrived: list[int] = []

    def note(number: int, frame: Any) -> None:
        if number not in arrived:
            arrived.append(number)

    def pass_on() -> None:
        for number in arrived:
            signal.raise_signal(number)

    with ExitStack() as stack:
        stack.callback(pass_on)
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            for name in _REQUESTS:
                number = getattr(signal, name, None)
                handler = None if number is None else signal.getsignal(number)
                if number is not None and callable(handler):
                    stack.callback(signal.signal, number, handler)
                    signal.signal(number, note)
        yield
