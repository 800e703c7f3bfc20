"""Peak memory of one training, in a process of its own.

python -m tests.benchmarks.memory phone rtho '{"smaller": 8}'
"""

import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch

from lightning_rtho.hypergradient import _forward
from lightning_rtho.linearization import _fused
from tests.benchmarks.methods import METHODS
from tests.benchmarks.workloads import describe, make_task

__all__ = ["by_method", "peak_memory"]

_WINDOWS = 2
"""Windows of a training: at the second, whatever a window leaves behind is there."""

_NO_HOLES = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Has glibc give freed blocks of a MiB and more back at once: its heap keeps holes of them else.

How many depends on the order in which sizes come and go, not on what a training needs.
"""

_AT_ONCE = min(4, os.cpu_count() or 1)
"""Processes whose memory is measured at a time, each on one core of the processor."""

Result = TypeVar("Result")


def by_method(measure: Callable[[str], Result], methods: Iterable[str]) -> dict[str, Result]:
    """Measure methods side by side: a process knows its own memory, on a device as well.

    Args:
        measure: Measures one, by :func:`peak_memory`.
        methods: Names in ``METHODS``.

    Returns:
        What was found, in the order of the methods.
    """
    methods = list(methods)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(methods, pool.map(measure, methods), strict=True))


def peak_memory(
    workload: str,
    method: str,
    options: dict[str, Any],
    device: torch.device,
    *,
    without_holes: bool = False,
) -> dict[str, int]:
    """Measure in another process, and say on the standard error stream what was found.

    Args:
        workload: Its name in ``WORKLOADS``.
        method: Its name in ``METHODS``.
        options: Sizes of the workload.
        device: Where to train.
        without_holes: Whether the heap gives freed memory back at once; on CUDA no difference.

    Returns:
        In bytes, ``process``: the peak of the whole process, libraries included, and ``training``:
        the peak above what the libraries take after a training of tiny size. On CUDA both are the
        peak of allocated device memory.
    """
    arguments = [workload, method, json.dumps(options), device.type]
    command = [sys.executable, "-m", "tests.benchmarks.memory", *arguments]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("MALLOC_")}
    environment |= {"OMP_NUM_THREADS": "1"} | (_NO_HOLES if without_holes else {})
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{finished.stderr[-2000:]}")
    measured: dict[str, int] = json.loads(finished.stdout.splitlines()[-1])
    print(
        f"{describe(workload, options)}, {method}: {measured['training'] / 2**20:.0f} MiB",
        file=sys.stderr,
        flush=True,
    )
    return measured


def _measure(
    workload: str, method: str, options: dict[str, Any], device: torch.device
) -> dict[str, int]:
    # As if it were large, so that the tiny training loads the compiler, too.
    with patch.object(_fused, "_LARGE", 1), patch.object(_forward, "_LARGE", 1):
        _train(workload, method, options | {"smaller": 16}, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = 0
    else:
        before = _reset_peak()
    _train(workload, method, options, device)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak()
    return {"process": peak, "training": peak - before}


def _train(workload: str, method: str, options: dict[str, Any], device: torch.device) -> None:
    task = make_task(workload, **options)
    METHODS[method](task, device, _WINDOWS * task.hyper_batch_size, lambda: None)


_STATUS = Path("/proc/self/status")


def _reset_peak() -> int:
    """Begin a new peak where the system can; return the resident bytes that it begins from."""
    if _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # of this process alone
    return _peak()


def _peak() -> int:
    """Return the largest number of resident bytes so far.

    Not by `getrusage` on Linux: a child begins there with the peak of the process it was forked
    from.
    """
    if _STATUS.exists():
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    _workload, _method, _options, _device = sys.argv[1:]
    print(json.dumps(_measure(_workload, _method, json.loads(_options), torch.device(_device))))
