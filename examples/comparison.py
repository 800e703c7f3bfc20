"""Methods side by side: every method on every seed, and what the runs ended with."""

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import torch
from data import Examples
from matplotlib.axes import Axes
from methods import Method, Task, Values
from runs import Archive, prepare_process, run_missing


@dataclass(frozen=True)
class Setting:
    """What distinguishes a run from the others."""

    method: str
    seed: int
    size: str
    steps: int
    budget: float = 0.0


@dataclass
class Result:
    """What a run ended with; errors in percent, seconds of one core."""

    setting: Setting
    test_error: float
    validation_error: float
    best_step: int
    seconds: float
    trials: int
    values: Values
    curve: list[tuple[int, float]] = field(default_factory=list)
    schedule: list[tuple[int, Values]] = field(default_factory=list)


def train_and_test(setting: Setting, method: Method, task: Task, test: Examples) -> Result:
    """Train by a method, then read the test data."""
    prepare_process()
    L.seed_everything(setting.seed, verbose=False)
    trained = method(task, setting.seed, setting.budget)
    return Result(
        setting,
        error_in_percent(trained.module, test),
        trained.kept.best_error,
        trained.kept.best_step,
        trained.seconds,
        trained.trials,
        trained.values,
        trained.kept.curve,
        trained.schedule,
    )


@torch.no_grad()
def error_in_percent(module: L.LightningModule, data: Examples) -> float:
    parts = torch.arange(len(data)).split(1000)
    wrong = [module.misread([data.inputs_of(rows), data.labels[rows]]) for rows in parts]
    return 100 * torch.cat(wrong).float().mean().item()


def arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, help="archive of the data")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", dest="size", action="store_const", const="full", default="small",
                      help="the paper's size, for a GPU")  # fmt: skip
    size.add_argument("--quick", dest="size", action="store_const", const="quick",
                      help="a tiny network, to see that all runs")  # fmt: skip
    parser.add_argument("--steps", type=int, help="optimizer steps of each training")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--workers", type=int, default=2, help="processes; one with --full")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def compare(
    run: Callable[[Setting, Path | None], Result],
    methods: dict[str, Method],
    seeds: Sequence[int],
    steps: int,
    name: str,
    args: argparse.Namespace,
) -> list[Result]:
    """Run every method on every seed; those that are given RTHO's time or a part come last."""
    size, workers = args.size, 1 if args.size == "full" else args.workers
    archive = Archive(args.output / f"{name}.json", Setting, Result)
    alone = size != "quick"  # what one run has compiled, the next shall compile, too

    def run_all(settings: list[Setting]) -> dict[Setting, Result]:
        return run_missing(run, settings, archive, args.data, workers=workers, alone=alone)

    pairs = list(itertools.product(seeds, methods))
    first = run_all([Setting(m, s, size, steps) for s, m in pairs if not methods[m].share])
    seconds = {s: first[Setting("RTHO", s, size, steps)].seconds for s in seeds}
    searches = [
        Setting(m, s, size, steps, round(methods[m].share * seconds[s], 1))
        for s, m in pairs
        if methods[m].share
    ]
    return [*first.values(), *run_all(searches).values()]


def of_method(results: Sequence[Result], method: str) -> list[Result]:
    return [result for result in results if result.setting.method == method]


def draw_errors(
    ax: Axes,
    results: Sequence[Result],
    colors: dict[str, str],
    names: dict[str, str],
    ticks: Sequence[int],
) -> None:
    """Draw mean validation errors over steps, of methods that train once and to the end."""
    for method, color in colors.items():
        curves = [result.curve for result in of_method(results, method)]
        if curves:
            length = min(map(len, curves))  # where the first has stopped early
            steps, errors = np.mean([curve[:length] for curve in curves], axis=0).T
            ax.plot(steps, errors, color=color, label=names[method])
    ax.set(xlabel="Optimizer step", yscale="log")
    ax.set_yticks(ticks, [str(tick) for tick in ticks])
    ax.minorticks_off()
    ax.grid(alpha=0.25)


def draw_values(ax: Axes, results: Sequence[Result], name: str, colors: dict[str, str]) -> None:
    """Draw a hyperparameter over steps, a line a seed."""
    for method, color in colors.items():
        for result in of_method(results, method):
            steps = [step for step, _ in result.schedule]
            values = [values[name] for _, values in result.schedule]
            ax.plot(steps, values, color=color, linewidth=0.9, alpha=0.8)
    ax.set(xlabel="Optimizer step")
    ax.grid(alpha=0.25)
