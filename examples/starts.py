"""Start the learning rate anywhere from 1e-6 to 10: fixed, tuned by `RTHO`, tuned by `TRHO`.

Every run of a task trains the same network for the same number of steps; the callbacks have their
default settings. They tune the learning rate alone, or together with momentum (Adam: beta1) and
weight decay, which start at 0.9 and 0. Finished runs are kept in a JSON file: started again, the
script goes on where it was stopped, and with another `--task` its table and figure grow.

    python examples/starts.py --quick
    python examples/starts.py
    python examples/starts.py --task mnist --data mnist.npz
    python examples/starts.py --task speech --data spoken_digits.npz

Training and validation data are for the runs. Test data are for the report alone, read once, at
the end of a run.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import Examples, Split, batches_of, load_mnist, load_speech
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from runs import Archive, mean_and_error, prepare_process, run_missing
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, OuterUpdate

START_LRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEEDS = (0, 1, 2)
TUNED = {
    "SGD": {"lr": ["lr"], "all": ["lr", "momentum", "weight_decay"]},
    "Adam": {"lr": ["lr"], "all": ["lr", "beta1", "weight_decay"]},
}
CALLBACKS: dict[str, Callable[..., RTHO | TRHO]] = {"RTHO": RTHO, "TRHO": TRHO}
BOUNDS = {"momentum": (2e-6, 1 - 2e-6), "beta1": (2e-6, 1 - 2e-6), "weight_decay": (0, 1e9)}
COLORS = {"fixed": "0.45", "RTHO": "tab:blue", "TRHO": "tab:orange"}


def load_digits(data: Path | None, seed: int) -> Split:
    """Return 600 images to train on, 600 to validate on, 597 to test on."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[:600], order[600:1200], order[1200:]
    train, validation, test = (Examples(images[part], labels[part]) for part in parts)
    return train, validation, test


def digit_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def image_net() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


def speech_net() -> nn.Module:
    return nn.Sequential(
        nn.Linear(1353, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 58)
    )


@dataclass(frozen=True)
class Task:
    """Data, network and length of a task's runs."""

    title: str
    load: Callable[[Path | None, int], Split]
    net: Callable[[], nn.Module]
    steps: int
    validation_batch: int


TASKS = {
    "digits": Task("Digits, MLP", load_digits, digit_net, 1000, 200),
    "mnist": Task("MNIST (5,000 images), CNN", load_mnist, image_net, 1000, 200),
    "speech": Task("Spoken digits (frames), MLP", load_speech, speech_net, 1000, 200),
}


@dataclass(frozen=True)
class Setting:
    """What distinguishes a run from the others."""

    task: str
    optimizer: str
    method: str
    tuned: str
    start_lr: float
    seed: int


@dataclass
class Result:
    """What a run ended with; errors in percent."""

    setting: Setting
    test_error: float
    validation_error: float
    values: dict[str, float] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)
    safeguards: dict[str, int] = field(default_factory=dict)
    is_finite: bool = True
    seconds: float = 0.0


class Classifier(L.LightningModule):
    """An ordinary module."""

    def __init__(self, net: nn.Module, optimizer: str, lr: float) -> None:
        super().__init__()
        self.net, self.optimizer, self.lr = net, optimizer, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callbacks minimize."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Start at the given rate, with momentum."""
        if self.optimizer == "SGD":
            return torch.optim.SGD(self.net.parameters(), lr=self.lr, momentum=0.9)
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)


def run(setting: Setting, data: Path | None, steps: int | None = None) -> Result:
    """Train a fresh network and test it."""
    prepare_process()
    L.seed_everything(setting.seed, verbose=False)
    task = TASKS[setting.task]
    train, validation, test = task.load(data, setting.seed)
    module = Classifier(task.net(), setting.optimizer, setting.start_lr)
    callback = None
    if setting.method in CALLBACKS:
        callback = CALLBACKS[setting.method](TUNED[setting.optimizer][setting.tuned])
    trainer = L.Trainer(
        max_steps=steps or task.steps,
        check_val_every_n_epoch=None,
        val_check_interval=10**9,
        num_sanity_val_steps=0,
        callbacks=[callback] if callback else [],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = time.perf_counter()
    trainer.fit(
        module,
        batches_of(train, 50, shuffle=True),
        batches_of(validation, task.validation_batch),
    )
    seconds = time.perf_counter() - began
    result = Result(
        setting, error_in_percent(module.net, test), error_in_percent(module.net, validation)
    )
    result.seconds = seconds
    result.is_finite = all(bool(p.isfinite().all()) for p in module.parameters())
    if callback:
        result.values = {name: v.item() for name, v in callback.hyperparameters.items()}
        result.is_finite &= all(math.isfinite(value) for value in result.values.values())
        result.stuck = stuck_at_a_bound(callback.schedule)
        result.held = held_at_a_bound(callback.schedule, result.stuck)
        acted = [update.safeguard for update in callback.schedule if update.safeguard]
        result.safeguards = {kind: acted.count(kind) for kind in sorted(set(acted))}
    return result


@torch.no_grad()
def error_in_percent(net: nn.Module, data: Examples) -> float:
    """Return the share of examples that are misread; NaN reads every one as the first class."""
    wrong = 0
    for rows in torch.arange(len(data)).split(1000):
        wrong += (net(data.inputs_of(rows)).argmax(dim=1) != data.labels[rows]).sum().item()
    return 100 * wrong / len(data)


def stuck_at_a_bound(updates: Sequence[OuterUpdate]) -> list[str]:
    """Return what stayed at an end of its domain for the last half of the run."""
    names = updates[0].values if updates else {}
    last_half = updates[len(updates) // 2 :]
    return [
        name
        for name in names
        if name in BOUNDS
        and all(
            not BOUNDS[name][0] < update.values[name].item() < BOUNDS[name][1]
            for update in last_half
        )
    ]


def held_at_a_bound(updates: Sequence[OuterUpdate], names: Sequence[str]) -> list[str]:
    """Return those of the values at a bound that descent would take off it in the last half.

    The others are where they should be: the objective falls towards the bound.
    """
    last_half = updates[len(updates) // 2 :]
    held = []
    for name in names:
        slopes = [update.hypergradients[name].item() for update in last_half]
        slope = sum(slope for slope in slopes if math.isfinite(slope))
        at_lower_bound = last_half[-1].values[name].item() <= BOUNDS[name][0]
        if slope < 0 if at_lower_bound else slope > 0:
            held.append(name)
    return held


def settings_of(task: str, seeds: Sequence[int], tuned: Sequence[str]) -> list[Setting]:
    """Return all runs of a task, seed by seed."""
    chosen = []
    for seed, optimizer, lr in itertools.product(seeds, TUNED, START_LRS):
        chosen.append(Setting(task, optimizer, "fixed", "nothing", lr, seed))
        for names, method in itertools.product(tuned, CALLBACKS):
            chosen.append(Setting(task, optimizer, method, names, lr, seed))
    return chosen


def group_of(results: Sequence[Result], **wanted: Any) -> list[Result]:
    return [
        r for r in results if all(getattr(r.setting, k) == value for k, value in wanted.items())
    ]


def error_of(results: Sequence[Result]) -> tuple[float, float]:
    """Return mean and standard error of test errors; NaN where a task was stopped on the way."""
    errors = [result.test_error for result in results]
    return mean_and_error(errors) if errors else (math.nan, 0.0)


def rows_of(results: Sequence[Result]) -> list[tuple[str, str, str, str]]:
    """Return task, optimizer, what is tuned and method of the table's rows, in order."""
    found = {
        (r.setting.task, r.setting.optimizer, r.setting.tuned, r.setting.method) for r in results
    }
    tuned = ["nothing", "lr", "all"]
    return sorted(
        found, key=lambda r: (list(TASKS).index(r[0]), r[1] != "SGD", tuned.index(r[2]), r[3])
    )


def judge(tuned: Sequence[Result], fixed: Sequence[Result]) -> tuple[int, int, int]:
    """Count starts at least as good as fixed, starts near the best fixed rate, and all starts."""
    lrs = sorted({result.setting.start_lr for result in tuned})
    best = min(error_of(group_of(fixed, start_lr=lr))[0] for lr in lrs)
    no_worse = near_best = 0
    for lr in lrs:
        error, spread = error_of(group_of(tuned, start_lr=lr))
        fixed_error, fixed_spread = error_of(group_of(fixed, start_lr=lr))
        no_worse += error <= fixed_error + 2 * math.hypot(spread, fixed_spread)
        near_best += error <= 1.1 * best
    return no_worse, near_best, len(lrs)


def print_table(results: Sequence[Result]) -> None:
    """Print mean test errors by start, and how many starts reach what is asked of them."""
    lrs = sorted({result.setting.start_lr for result in results})
    print("\nMean test error in %, by start of the learning rate.")
    print("a: starts with an error of at most the fixed run's + 2 standard errors")
    print("b: starts with an error of at most 1.1 times that of the best fixed rate")
    print("n: runs that end in NaN; s: runs with a value at a bound for their last half")
    print("h: those of s whose mean hypergradient there points inside")
    print(
        f"{'task':7} {'inside':6} {'method':6} {'tuned':7} "
        + " ".join(f"{lr:>6g}" for lr in lrs)
        + "    a    b  n  s  h  runs"
    )
    for task, optimizer, tuned, method in rows_of(results):
        row = group_of(results, task=task, optimizer=optimizer, tuned=tuned, method=method)
        fixed = group_of(results, task=task, optimizer=optimizer, method="fixed")
        cells = [f"{error_of(group_of(row, start_lr=lr))[0]:6.1f}" for lr in lrs]
        no_worse, near_best, starts = judge(row, fixed)
        verdict = f"{no_worse}/{starts}" if method != "fixed" else "-"
        broken = sum(not result.is_finite for result in row)
        stuck = sum(bool(result.stuck) for result in row)
        held = sum(bool(result.held) for result in row)
        print(
            f"{task:7} {optimizer:6} {method:6} {tuned:7} {' '.join(cells)}  {verdict:>3}  "
            f"{near_best}/{starts} {broken:2} {stuck:2} {held:2}  {len(row):4}"
        )


def draw(results: Sequence[Result]) -> Figure:
    """Draw test error over the start of the learning rate: a row a task, a column an optimizer."""
    tasks = [task for task in TASKS if group_of(results, task=task)]
    figure = Figure(figsize=(11, 1 + 2.7 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(TUNED), sharex=True, sharey="row", squeeze=False)
    for row, task in zip(panels, tasks, strict=True):
        for ax, optimizer in zip(row, TUNED, strict=True):
            draw_panel(ax, group_of(results, task=task, optimizer=optimizer))
            ax.set_title(f"{TASKS[task].title}, {optimizer}", fontsize=11)
        row[0].set_ylabel("Test error (%)")
    for ax in panels[-1]:
        ax.set_xlabel("Start of the learning rate")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    return figure


def draw_panel(ax: Axes, results: Sequence[Result]) -> None:
    """Draw mean and standard error of each method."""
    names = {"nothing": "", "lr": ": lr", "all": ": lr, momentum, decay"}
    for *_, tuned, method in rows_of(results):
        row = group_of(results, tuned=tuned, method=method)
        lrs = sorted({result.setting.start_lr for result in row})
        points = [error_of(group_of(row, start_lr=lr)) for lr in lrs]
        ax.errorbar(
            lrs,
            [mean for mean, _ in points],
            [spread for _, spread in points],
            label=method + names[tuned],
            color=COLORS[method],
            linestyle="--" if tuned == "all" else "-",
            marker="o",
            markersize=3,
            capsize=2,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(FixedLocator([2, 3, 5, 10, 20, 30, 50, 100]))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(alpha=0.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="archive of the task's data")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--quick", action="store_true", help="one seed: 3 minutes on 2 cores")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = args.seeds[:1] if args.quick else args.seeds
    settings = settings_of(args.task, seeds, ("lr", "all"))
    file = args.output / ("starts.json" if args.steps is None else f"starts-{args.steps}.json")
    archive = Archive(file, Setting, Result)
    run_missing(run, settings, archive, args.data, args.steps, workers=args.workers)
    results = list(archive.read().values())
    print_table(results)
    draw(results).savefig(args.output / "starts.png", dpi=110)
    print(f"\nFigure: {args.output / 'starts.png'}")


if __name__ == "__main__":
    main()
