"""Measure time and memory of the workloads, print a table of each, and write them as JSON.

python -m tests.benchmarks
python -m tests.benchmarks --workloads phone cnn --methods rtho forward_loop --repeats 3
python -m tests.benchmarks --quick
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.cosine import compare_directions, cosine_table
from tests.benchmarks.floor import floor
from tests.benchmarks.growth import grow
from tests.benchmarks.kernels import compile_seconds, copy_shares, kernels_line
from tests.benchmarks.memory import by_method, peak_memory
from tests.benchmarks.methods import METHODS, available_methods
from tests.benchmarks.report import OUTPUT, table
from tests.benchmarks.timing import compare
from tests.benchmarks.workloads import WORKLOADS, Task, make_task

_SMALL = 2**20
"""Bytes of a training state below which the measure of memory is coarser than what it measures."""

_DEFAULT = ("phone", "cnn", "transformer", "many", "layers", "small")


_KEPT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
"""Has glibc keep what is freed: it would give it back and take it anew several times a step.

How often depends on what a process has done before, so that times would, too.
"""


def main() -> None:
    args = _arguments()
    if not _KEPT_HEAP.keys() <= os.environ.keys():  # read where a process begins
        command = [sys.executable, "-m", "tests.benchmarks", *sys.argv[1:]]
        os.execve(sys.executable, command, os.environ | _KEPT_HEAP)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    args.output.mkdir(parents=True, exist_ok=True)
    options = {"smaller": 8} if args.quick else {}
    for workload in args.workloads:
        if workload == "growth":
            records = grow(
                options,
                device,
                repeats=args.repeats,
                windows=args.windows,
                memory=not args.no_memory,
            )
            results = {**_place(device), "options": options, "records": records}
            results["repeats"] = args.repeats
        elif workload == "cosine":
            records = compare_directions(options, device)
            results = {**_place(device), "options": options, "records": records}
            print(f"\n{cosine_table(records)}", flush=True)
        elif workload == "kernels":
            results = {**_place(device), "shares": copy_shares(), "seconds": compile_seconds()}
            print(f"\n{kernels_line(results)}", flush=True)
        else:
            results = _measure(workload, options, device, args)
            print(f"\n{table(results)}", flush=True)
        (args.output / f"{workload}.json").write_text(json.dumps(results, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks", description=(__doc__ or "").splitlines()[0]
    )
    names = [*WORKLOADS, "kernels", "cosine", "growth"]
    parser.add_argument(
        "--workloads", nargs="+", choices=names, default=[*_DEFAULT, "kernels", "cosine", "growth"]
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="all that apply by default")
    parser.add_argument("--repeats", type=int, help="times to go round all methods: 5, or 1")
    parser.add_argument("--windows", type=int, default=3, help="windows measured in each training")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--no-memory", action="store_true", help="measure time alone")
    parser.add_argument("--quick", action="store_true", help="an eighth of the width, once")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the JSON files")
    args = parser.parse_args()
    if args.repeats is None:
        args.repeats = 1 if args.quick else 5
    return args


def _measure(
    workload: str, options: dict[str, Any], device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    """Measure one workload by all methods."""
    methods = available_methods(WORKLOADS[workload], device)
    if args.methods:
        methods = [method for method in methods if method in args.methods]
    task = make_task(workload, **options)
    timings = compare(
        workload, options, methods, device, repeats=args.repeats, windows=args.windows
    )
    memory = {}
    if not args.no_memory and _state_bytes(task) > _SMALL:
        memory = by_method(
            lambda method: _memory(workload, method, options, device), ("plain", *methods)
        )
    return {
        "workload": workload,
        "summary": task.summary + (", an eighth as wide" if options else ""),
        "entries": task.entries,
        "hyper_batch_size": task.hyper_batch_size,
        "state_bytes": _state_bytes(task),
        **_place(device),
        "floors": {
            m: floor(m, entries=task.entries, hyper_batch_size=task.hyper_batch_size)
            for m in methods
        },
        "timings": {method: timing.as_dict() for method, timing in timings.items()},
        "memory": memory,
    }


def _memory(
    workload: str, method: str, options: dict[str, Any], device: torch.device
) -> dict[str, int]:
    """Measure the peak of a process, and of what a training uses."""
    found = peak_memory(workload, method, options, device)
    used = found
    if device.type == "cpu":
        used = peak_memory(workload, method, options, device, without_holes=True)
    return {"process": found["process"], "in_use": used["training"]}


def _state_bytes(task: Task) -> int:
    """Size of one training state: weights and the optimizer's buffers of their shape."""
    buffers = 2 if isinstance(task.configure_optimizers(), torch.optim.Adam) else 1
    return (1 + buffers) * sum(p.numel() * p.element_size() for p in task.net.parameters())


def _place(device: torch.device) -> dict[str, Any]:
    """Describe machine and versions."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        threads = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
        machine = f"CPU, {platform.machine()}, {threads}"
    packages = ("torch", "lightning", "higher", "torchopt", "betty-ml")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"machine": machine, "versions": versions}


if __name__ == "__main__":
    main()
