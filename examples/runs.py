"""Many runs: those that are finished in a JSON file, those that are missing in other processes."""

import json
import math
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from matplotlib.figure import Figure
from quiet import silence_lightning

Setting = TypeVar("Setting")


class Result(Protocol):
    """What a run ended with: a dataclass with the setting, itself a frozen dataclass."""

    setting: object


R = TypeVar("R", bound=Result)


@dataclass
class Archive(Generic[Setting, R]):
    """Finished runs in a JSON file."""

    file: Path
    setting_type: type[Setting]
    result_type: type[R]

    def read(self) -> dict[Setting, R]:
        """Read the finished runs."""
        if not self.file.exists():
            return {}
        found = [self.result_type(**entry) for entry in json.loads(self.file.read_text())]
        for result in found:
            result.setting = self.setting_type(**result.setting)
        return {result.setting: result for result in found}

    def write(self, results: dict[Setting, R]) -> None:
        """Write the finished runs, so that a run killed meanwhile leaves the old file."""
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps([asdict(result) for result in results.values()], indent=0))
        draft.replace(self.file)


def run_missing(
    run: Callable[..., R],
    settings: Sequence[Setting],
    archive: Archive[Setting, R],
    *arguments: object,
    workers: int,
    alone: bool = False,
) -> dict[Setting, R]:
    """Run what the archive lacks in several processes; return the results of all settings.

    With `alone`, every run has a process of its own, so that its peak of memory is its own.
    """
    results = archive.read()
    missing = [setting for setting in settings if setting not in results]
    print(f"{len(missing)} of {len(settings)} runs to do", flush=True)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of several processes on one screen
    context = multiprocessing.get_context("spawn")
    tasks = 1 if alone else None
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=tasks) as pool:
        began = time.perf_counter()
        futures = [pool.submit(run, setting, *arguments) for setting in missing]
        for count, done in enumerate(as_completed(futures), start=1):
            result = done.result()
            results[result.setting] = result
            archive.write(results)
            minutes = (time.perf_counter() - began) / 60
            print(f"  {count}/{len(missing)} after {minutes:.1f} min: {result.setting}", flush=True)
    return {setting: results[setting] for setting in settings}


clock = time.process_time
"""Seconds of one core: what a run takes where nobody else is at work.

Budgets are in these, so that a search has its due on a busy machine, too.
"""


def prepare_process() -> None:
    """Let a run have one core, and let Lightning say only what a reader of the table needs."""
    torch.set_num_threads(1)  # the runs share the cores
    silence_lightning()
    warnings.filterwarnings("ignore", "At step .* the")  # what the safeguards did is counted


_STATUS = Path("/proc/self/status")


def reset_peak_memory(on_gpu: bool = False) -> int:
    """Begin a new peak where the system can; return the bytes that it begins from."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    elif _STATUS.exists():
        Path("/proc/self/clear_refs").write_text("5")  # of this process alone
    return peak_memory(on_gpu)


def peak_memory(on_gpu: bool = False) -> int:
    """Return the largest number of resident bytes of this process, or of those on the GPU."""
    if on_gpu:
        return torch.cuda.max_memory_allocated()
    if _STATUS.exists():  # a child's `getrusage` begins there with its parent's peak
        line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and standard error; that of one value is taken as 0."""
    spread = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return float(np.mean(values)), float(spread)


def cell(values: Sequence[float], digits: int) -> str:
    """Return mean and standard error as a cell of a table, empty where they are not known."""
    mean, error = mean_and_error(values)
    if math.isnan(mean):
        return ""
    return f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(values) > 1 else "")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> str:
    """Return a table with its caption above it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join([caption, "", *(f"| {' | '.join(line)} |" for line in lines)])


def report(path: Path, table: str, figure: Figure) -> None:
    """Print and write a table; write a figure beside it."""
    path.with_suffix(".md").write_text(table + "\n")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    print(f"\n{table}\n\nFigure: {path.with_suffix('.png')}")
