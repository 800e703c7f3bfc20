"""Seconds a step, against the same training without a callback, interleaved in one process."""

import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.benchmarks.methods import METHODS
from tests.benchmarks.workloads import describe, make_task

__all__ = ["Stopwatch", "Timing", "compare"]


class Stopwatch:
    """Takes the time of windows of steps; the first window warms up and is not counted.

    Args:
        window: Steps of a window, in which everything that recurs happens once.
        device: Where the steps run.
    """

    def __init__(self, window: int, device: torch.device) -> None:
        self._window, self._device = window, device
        self._steps = 0
        self._laps: list[float] = []

    def __call__(self) -> None:
        """Count a step that has been made."""
        self._steps += 1
        if self._steps % self._window == 0:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self._laps.append(time.perf_counter())

    @property
    def seconds_per_step(self) -> float:
        """Median over windows."""
        laps = zip(self._laps, self._laps[1:], strict=False)
        return statistics.median(end - start for start, end in laps) / self._window


@dataclass
class Timing:
    """What was measured of one method, one entry a repeat.

    Attributes:
        seconds: Seconds a step.
        plain: Seconds a step of the plain trainings just before and after.
    """

    seconds: list[float] = field(default_factory=list)
    plain: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Seconds a step over those of plain training."""
        return [one / other for one, other in zip(self.seconds, self.plain, strict=True)]

    def as_dict(self) -> dict[str, Any]:
        """Return medians and what they were taken of."""
        above = [one - other for one, other in zip(self.seconds, self.plain, strict=True)]
        return {
            "ratio": statistics.median(self.ratios),
            "ratios": self.ratios,
            "seconds": statistics.median(self.seconds),
            "milliseconds_above_plain": 1e3 * statistics.median(above),
        }


def compare(
    workload: str,
    options: dict[str, Any],
    methods: Sequence[str],
    device: torch.device,
    *,
    repeats: int,
    windows: int,
) -> dict[str, Timing]:
    """Train a workload by each method in turn, with plain training between any two.

    Evaluations of the outer objective are part of a method, and of its time. Each ratio is said on
    the standard error stream as it is measured.

    Args:
        workload: Its name in ``WORKLOADS``.
        options: Its sizes.
        methods: Names in ``METHODS``.
        device: Where to train.
        repeats: How many times to go round.
        windows: Windows of `hyper_batch_size` steps that are measured in each training.

    Returns:
        Timings by method.
    """

    def seconds_per_step(method: str) -> float:
        task = make_task(workload, **options)
        stopwatch = Stopwatch(task.hyper_batch_size, device)
        METHODS[method](task, device, (windows + 1) * task.hyper_batch_size, stopwatch)
        del task
        gc.collect()
        return stopwatch.seconds_per_step

    timings = {method: Timing() for method in methods}
    for repeat in range(1, repeats + 1):
        before = seconds_per_step("plain")
        for method, timing in timings.items():
            timing.seconds.append(seconds_per_step(method))
            after = seconds_per_step("plain")
            timing.plain.append((before + after) / 2)
            before = after
            print(
                f"{describe(workload, options)}, {method} {repeat}/{repeats}: "
                f"{timing.ratios[-1]:.2f} times plain training",
                file=sys.stderr,
                flush=True,
            )
    return timings
