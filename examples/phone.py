"""Tune a phone recognizer's learning rate, momentum, penalty and secondary task while it trains.

Frames of spoken digits take the place of TIMIT in the paper's experiment: a window of 11 frames,
1,353 numbers, is one of 58 phone states. A secondary task, the phones to the left and to the right,
shares the hidden layers; its loss has a weight. SGD with momentum trains; the learning rate, the
momentum, the weight of the secondary task and an L2 coefficient are tuned.

    python examples/phone.py --data spoken_digits.npz           # an hour on 2 cores
    python examples/phone.py --data spoken_digits.npz --full    # the paper's network, for a GPU

The learning rate and momentum of the paper's plain network are the teacher: `RTHO` and `TRHO` start
there, with no penalty and no secondary task; without a teacher (NT) `RTHO` starts from nothing.

Runs keep the weights of its best validation error. Test frames are read once, at the end of a run.
"""

import gc
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import optuna
import torch
from comparison import (
    Result,
    Setting,
    arguments,
    compare,
    draw_errors,
    draw_values,
    of_method,
    train_and_test,
)
from data import Examples, Split, batches_of, load_speech
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, ScalarFormatter
from methods import Fixed, Range, RateFinder, Search, Task, Tuned, Values
from runs import (
    Archive,
    cell,
    markdown,
    peak_memory,
    prepare_process,
    report,
    reset_peak_memory,
    run_missing,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, Hyperparameter, Interval, NonNegative, Positive

SEEDS = (0, 1, 2)
TEACHER = {"lr": 0.075, "momentum": 0.5, "secondary": 0.0, "l2": 0.0}
NOTHING = {"lr": 1e-6, "momentum": 0.0, "secondary": 0.0, "l2": 0.0}
DOMAINS = {
    "lr": Positive(),
    "momentum": Interval(0, 1),
    "secondary": NonNegative(),
    "l2": NonNegative(),
}
SPACE = {
    "lr": Range(1e-4, 1.0),
    "momentum": Range(0.0, 0.99, log=False),
    "secondary": Range(1e-3, 10.0),
    "l2": Range(1e-8, 1e-2),
}
METHODS = {
    "fixed": Fixed("plain network, early stopping", TEACHER),
    "random": Search(
        "random search, twice the time of `RTHO`",
        SPACE,
        optuna.samplers.RandomSampler,
        optuna.pruners.NopPruner,
        share=2.0,
    ),
    "RTHO": Tuned("`RTHO`", TEACHER, RTHO),
    "RTHO-quarter": Tuned(
        "`RTHO`, `curvature_fraction=0.25`", TEACHER, partial(RTHO, curvature_fraction=0.25)
    ),
    "RTHO-NT": Tuned("`RTHO`, no teacher", NOTHING, RTHO),
    "TRHO": Tuned("`TRHO`", TEACHER, TRHO),
    "finder": RateFinder("`LearningRateFinder`, then fixed", TEACHER),
    "optuna": Search(
        "Optuna, TPE with pruning, time of `RTHO`",
        SPACE,
        optuna.samplers.TPESampler,
        optuna.pruners.MedianPruner,
        share=1.0,
    ),
}
COLORS = {"fixed": "0.45", "RTHO": "tab:blue", "RTHO-NT": "tab:purple", "TRHO": "tab:orange"}
STATES, PHONES = 58, 20


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    hidden: tuple[int, ...]
    steps: int
    check_every: int


SIZES = {
    "small": Size((256, 256), 3000, 250),
    "full": Size((2000, 2000, 2000, 2000), 10_000, 500),
    "quick": Size((32,), 40, 20),
    "warm-up": Size((64,), 20, 20),
}
WARM_UPS = {"small": "warm-up", "full": "warm-up", "quick": "quick"}
"""Sizes trained before memory is measured, so that what is needed is imported and compiled."""


class PhoneRecognizer(L.LightningModule):
    """An ordinary module, but for the four numbers that became a `Hyperparameter`."""

    def __init__(
        self, hidden: Sequence[int], lr: float, momentum: float, secondary: float, l2: float
    ) -> None:
        super().__init__()
        widths = (1353, *hidden)
        layers = [(nn.Linear(*pair), nn.ReLU()) for pair in itertools.pairwise(widths)]
        self.net = nn.Sequential(
            *itertools.chain(*layers), nn.Linear(widths[-1], STATES + 2 * PHONES)
        )
        self.lr, self.momentum, self.secondary, self.l2 = lr, momentum, secondary, l2

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of the state and of the phones to the left and to the right."""
        state, left, right = self.net(frames).split([STATES, PHONES, PHONES], dim=1)
        return state, left, right

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss, secondary task and penalty included."""
        frames, labels = batch
        tasks = zip(self(frames), labels.T, strict=True)
        state, left, right = (F.cross_entropy(*task) for task in tasks)
        penalty = sum(layer.weight.square().sum() for layer in self.net[::2])
        return state + self.secondary * (left + right) + self.l2 * penalty

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss of the state alone: what the callbacks minimize."""
        frames, labels = batch
        logits = self(frames)[0]
        self.log("val_error", 100 * (logits.argmax(dim=1) != labels[:, 0]).float().mean())
        return F.cross_entropy(logits, labels[:, 0])

    def misread(self, batch: list[Tensor]) -> Tensor:
        """Tell which frames ``[batch]`` are taken for another state."""
        return self(batch[0])[0].argmax(dim=1) != batch[1][:, 0]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give SGD the hyperparameters where it takes numbers."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def run(setting: Setting, data: Path | None) -> Result:
    """Train a network by one of the methods and test it."""
    task, test = task_of(SIZES[setting.size], setting.steps, load_speech(data, 0, neighbours=True))
    return train_and_test(setting, METHODS[setting.method], task, test)


def task_of(size: Size, steps: int, split: Split) -> tuple[Task, Examples]:
    """Return a task and its test data."""
    train, validation, test = split

    def make(values: Values, *, tuned: bool) -> PhoneRecognizer:
        if tuned:
            values = {name: Hyperparameter(v, DOMAINS[name]) for name, v in values.items()}
        return PhoneRecognizer(size.hidden, **values)

    return Task(
        make,
        batches_of(train, 200, shuffle=True),
        batches_of(validation, 500),
        steps,
        min(size.check_every, steps),
        patience=4,
        accelerator="auto" if size == SIZES["full"] else "cpu",
    ), test


@dataclass(frozen=True)
class Probe:
    """A short run in a process of its own, for its memory."""

    method: str
    size: str


@dataclass
class Peak:
    """The peak of memory, of the GPU's where it trains there, above that before the run."""

    setting: Probe
    megabytes: float


def measure_memory(probe: Probe, data: Path | None) -> Peak:
    """Train a small network, which imports and compiles what is needed, then the one asked for."""
    prepare_process()
    split = load_speech(data, 0, neighbours=True)
    for size in (SIZES[WARM_UPS[probe.size]], SIZES[probe.size]):
        task, _ = task_of(size, 40, split)
        gc.collect()
        on_gpu = task.accelerator == "auto" and torch.cuda.is_available()
        before = reset_peak_memory(on_gpu)
        METHODS[probe.method](task, 0, 0.0)
    return Peak(probe, (peak_memory(on_gpu) - before) / 2**20)


def table(results: list[Result], peaks: dict[str, float]) -> str:
    """Return the table of the methods."""
    setting = results[0].setting
    rows = []
    for name, method in METHODS.items():
        row = of_method(results, name)
        rows.append([
            method.title,
            cell([100 - result.test_error for result in row], 2),
            cell([100 - result.validation_error for result in row], 2),
            f"{np.mean([result.trials for result in row]):.0f}",
            f"{np.mean([result.seconds for result in row]):.0f}",
            f"{peaks[name]:.0f}" if name in peaks else "-",
        ])
    caption = (
        f"Network 1353-{'-'.join(map(str, SIZES[setting.size].hidden))}-58, {setting.steps:,} "
        "steps of SGD with momentum, minibatches of 200; frame accuracy in %, mean ± standard "
        f"error over {len(of_method(results, 'fixed'))} seeds; seconds of one core, MB above the "
        "process before training. `RTHO` and `TRHO` have their defaults. The searches draw lr "
        "from 1e-4 to 1, momentum from 0 to 0.99, the secondary task's weight from 1e-3 to 10, "
        "L2 from 1e-8 to 1e-2, and stop trainings early."
    )
    header = ["hyperparameters", "test", "validation", "runs", "seconds", "MB"]
    return markdown(header, rows, caption)


def draw(results: list[Result]) -> Figure:
    """Draw validation errors and the four hyperparameters over steps."""
    figure = Figure(figsize=(12, 6.2), layout="constrained")
    axes = figure.subplots(2, 3)
    names = {name: method.title.replace("`", "") for name, method in METHODS.items()}
    draw_errors(axes[0, 0], results, COLORS, names, ticks=[15, 20, 30, 50, 90])
    axes[0, 0].set(title="Validation frame error (%), mean")
    for ax, name in zip(axes.flat[1:], DOMAINS, strict=False):
        draw_values(ax, results, name, COLORS)
    axes[0, 1].set(title="Learning rate, each seed", yscale="log")
    axes[0, 2].set(title="Momentum")
    axes[1, 0].set(title="Weight of the secondary task")
    axes[1, 0].set_yscale("symlog", linthresh=1e-6)
    axes[1, 1].set(title="L2 coefficient")
    axes[1, 1].set_yscale("symlog", linthresh=1e-6)
    draw_time(axes[1, 2], results)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_time(ax: Axes, results: list[Result]) -> None:
    """Draw test accuracy over what it took: each seed, and a name at the mean."""
    searches = {"random": "tab:red", "optuna": "tab:brown", "finder": "tab:green"}
    colors = {**COLORS, **searches, "RTHO-quarter": "tab:cyan"}
    on_the_left = {"fixed", "RTHO-quarter", "TRHO"}  # of points that meet others
    raised = {"fixed": 5, "RTHO-quarter": 5, "TRHO": -5, "finder": -5}
    for name in METHODS:
        row = of_method(results, name)
        seconds = [result.seconds for result in row]
        accuracies = [100 - result.test_error for result in row]
        ax.scatter(seconds, accuracies, s=14, color=colors[name])
        side = -1 if name in on_the_left else 1
        ax.annotate(name, (np.mean(seconds), np.mean(accuracies)), color=colors[name],
                    xytext=(6 * side, raised.get(name, 0)), textcoords="offset points",
                    ha="right" if side < 0 else "left", va="center", fontsize=8)  # fmt: skip
    ax.set(title="Test frame accuracy (%)", xlabel="Seconds of one core", xscale="log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.minorticks_off()
    ax.margins(x=0.2, y=0.12)
    ax.grid(alpha=0.25)


def main() -> None:
    args = arguments(__doc__)
    steps = args.steps or SIZES[args.size].steps
    archive = Archive(args.output / "phone_memory.json", Probe, Peak)
    probes = [Probe(method, args.size) for method in ("fixed", "RTHO", "TRHO")]
    found = run_missing(measure_memory, probes, archive, args.data, workers=1, alone=True)
    peaks = {probe.method: peak.megabytes for probe, peak in found.items()}
    results = compare(run, METHODS, args.seeds or SEEDS, steps, "phone", args)
    report(args.output / "phone", table(results, peaks), draw(results))


if __name__ == "__main__":
    main()
