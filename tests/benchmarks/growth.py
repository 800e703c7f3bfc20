"""How cost grows with the number of hyperparameters, the window and the number of weights."""

from functools import partial
from typing import Any

import torch

from tests.benchmarks.memory import by_method, peak_memory
from tests.benchmarks.timing import compare
from tests.benchmarks.workloads import make_task

__all__ = ["SWEEPS", "grow"]

_METHODS = ("rtho", "trho_keep", "trho_recompute")

SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "entries": ("hyperparameter entries m", (1, 2, 4, 8, 16)),
    "hyper_batch_size": ("steps of a window", (5, 20, 100)),
    "width": ("weights", (250, 500, 1000, 2000)),
}
"""Options of the ``weighted`` workload that are varied one at a time: axis label and values."""


def grow(
    options: dict[str, Any], device: torch.device, *, repeats: int, windows: int, memory: bool
) -> list[dict[str, Any]]:
    """Measure the ``weighted`` workload at each value of each sweep.

    Args:
        options: Sizes that stay.
        device: Where to train.
        repeats: As :func:`tests.benchmarks.timing.compare`.
        windows: As there, for windows of 5 steps.
        memory: Whether to measure that, too.

    Returns:
        One record for each method at each value.
    """

    def in_use(sizes: dict[str, Any], method: str) -> int:
        return peak_memory("weighted", method, sizes, device, without_holes=True)["training"]

    records = []
    for sweep, (_, values) in SWEEPS.items():
        for value in values:
            sizes = options | {sweep: value}
            weights = sum(p.numel() for p in make_task("weighted", **sizes).net.parameters())
            few = max(1, windows * 5 // sizes.get("hyper_batch_size", 5))
            timings = compare("weighted", sizes, _METHODS, device, repeats=repeats, windows=few)
            peaks = by_method(partial(in_use, sizes), ("plain", *timings)) if memory else {}
            for method, timing in timings.items():
                records.append({
                    "sweep": sweep,
                    "value": weights if sweep == "width" else value,
                    "method": method,
                    "ratio": timing.as_dict()["ratio"],
                    "memory_ratio": peaks[method] / peaks["plain"] if memory else 0,
                })
    return records
