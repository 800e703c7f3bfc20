"""The compiled derivatives of an update: their share of the copy bandwidth, and compiling them.

python -m tests.benchmarks.kernels
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_rtho.dynamics import SGDRule, Transition
from lightning_rtho.linearization import fused_step_jvp, fused_step_vjp

__all__ = ["compile_seconds", "copy_shares", "kernels_line"]

_ENTRIES = 2**24
"""Of a parameter: far more than caches hold."""


def copy_shares(repeats: int = 9) -> dict[str, float]:
    """Measure how much of the bandwidth of a copy the derivatives of SGD with momentum reach.

    Copy and derivative take turns; medians are compared.

    Args:
        repeats: Turns.

    Returns:
        Share by derivative. What it has to read and to write counts once, whatever it does.
    """
    transition = _transition()
    tangents = {name: torch.zeros(1, _ENTRIES) for name in transition.state}
    grad_dot, source, target = (
        torch.zeros(1, _ENTRIES),
        torch.zeros(_ENTRIES),
        torch.zeros(_ENTRIES),
    )
    keep, hyper_dot = torch.tensor(False), {"lr": torch.ones(1, dtype=torch.float64)}
    cotangents = {name: torch.zeros(_ENTRIES) for name in transition.state}
    memory = torch.empty(_ENTRIES)  # as the steps of a window share it
    # Passes over memory. Both read weights, velocity and gradient; then tangents of all three are
    # read and two written, and cotangents of two are read and of all three written.
    ways: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: target.copy_(source)),
        "JVP": (8, lambda: fused_step_jvp(transition, tangents, grad_dot, hyper_dot, keep)),
        "VJP": (8, lambda: fused_step_vjp(transition, dict(cotangents), memory)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, (passes, run) in ways.items():
            start = time.perf_counter()
            run()
            seconds[name].append((time.perf_counter() - start) / passes)
    medians = {name: statistics.median(found[1:]) for name, found in seconds.items()}
    return {name: medians["copy"] / medians[name] for name in ("JVP", "VJP")}


def compile_seconds() -> dict[str, float]:
    """Measure the first call of both derivatives in a process of its own.

    Returns:
        Seconds with an empty cache, and with that of another process.
    """
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "tests.benchmarks.kernels", "--first-call"]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = [
            float(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)
            for _ in range(2)
        ]
    return dict(zip(("cold", "warm"), found, strict=True))


def kernels_line(results: dict[str, Any]) -> str:
    """Say in a line what was measured.

    Args:
        results: ``shares`` and ``seconds``, as measured.

    Returns:
        The line.
    """
    shares, seconds = results["shares"], results["seconds"]
    return (
        f"SGD with momentum, {_ENTRIES:,} weights: JVP {100 * shares['JVP']:.0f} % and VJP "
        f"{100 * shares['VJP']:.0f} % of the bandwidth of a copy, which writes half of what it "
        "moves, the slower half; they write less. Both called for the first time: "
        f"{seconds['cold']:.1f} s, and {seconds['warm']:.1f} s where another process has compiled "
        "them before."
    )


def _transition() -> Transition:
    state = {name: torch.zeros(_ENTRIES) for name in ("param", "momentum_buffer")}
    settings = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
    hyper = {name: torch.tensor(value, dtype=torch.float64) for name, value in settings.items()}
    return Transition(
        0, SGDRule(buffered=True), state, torch.zeros(_ENTRIES), hyper, {"lr": 0}, {}, None
    )


def _first_call() -> float:
    start = time.perf_counter()
    copy_shares(repeats=1)
    return time.perf_counter() - start


if __name__ == "__main__":
    if sys.argv[1:] == ["--first-call"]:
        print(_first_call())
    else:
        print(kernels_line({"shares": copy_shares(), "seconds": compile_seconds()}))
