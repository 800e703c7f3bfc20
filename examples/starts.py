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
import json
import logging
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_rtho import RTHO, TRHO, OuterUpdate

START_LRS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
SEEDS = (0, 1, 2)
TUNED = {
    "SGD": {"lr": ["lr"], "all": ["lr", "momentum", "weight_decay"]},
    "Adam": {"lr": ["lr"], "all": ["lr", "beta1", "weight_decay"]},
}
CALLBACKS: dict[str, Callable[..., RTHO | TRHO]] = {"RTHO": RTHO, "TRHO": TRHO}
COLORS = {"fixed": "0.45", "RTHO": "tab:blue", "TRHO": "tab:orange"}


class Examples(Dataset):
    """Inputs and labels, handed out a batch at a time."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a batch."""
        rows = torch.tensor(indices)
        return [self.inputs_of(rows), self.labels[rows]]

    def inputs_of(self, rows: Tensor) -> Tensor:
        """Return the inputs of some examples."""
        return self.inputs[rows]


class Frames(Examples):
    """Frames of speech, each between the five before and the five after it in its utterance."""

    def __init__(
        self, frames: Tensor, labels: Tensor, rows: Tensor, first: Tensor, last: Tensor
    ) -> None:
        super().__init__(frames, labels[rows])
        self.rows, self.first, self.last = rows, first[rows, None], last[rows, None]

    def inputs_of(self, rows: Tensor) -> Tensor:
        """Return windows ``[len(rows), 11 * 123]``."""
        window = self.rows[rows, None] + torch.arange(-5, 6)
        window = window.maximum(self.first[rows]).minimum(self.last[rows])
        return self.inputs[window].flatten(1)


Split = tuple[Examples, Examples, Examples]


def load_digits(data: Path | None, seed: int) -> Split:
    """Return 600 images to train on, 600 to validate on, 597 to test on."""
    from sklearn import datasets

    images, labels = datasets.load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order[:600], order[600:1200], order[1200:]
    train, validation, test = (Examples(images[part], labels[part]) for part in parts)
    return train, validation, test


def load_mnist(data: Path | None, seed: int) -> Split:
    """Return 5,000 images to train on, 5,000 to validate on and the 10,000 test images."""
    if data is None:
        from sklearn.datasets import fetch_openml

        found = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
        images, labels = found.data.reshape(-1, 28, 28), found.target.astype(np.int64)
    else:
        with np.load(data) as arrays:
            images = np.concatenate([arrays["x_train"], arrays["x_test"]])
            labels = np.concatenate([arrays["y_train"], arrays["y_test"]])
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(seed))
    parts = order[:5000], order[5000:10_000], torch.arange(60_000, 70_000)
    train, validation, test = (
        Examples(
            torch.tensor(images[part], dtype=torch.float32)[:, None] / 255,
            torch.tensor(labels[part], dtype=torch.int64),
        )
        for part in parts
    )
    return train, validation, test


def load_speech(data: Path | None, seed: int) -> Split:
    """Return the frames of 2,400 utterances to train on, of 300 to validate and to test on."""
    if data is None:
        raise SystemExit("`--task speech` needs its data: pass `--data spoken_digits.npz`.")
    with np.load(data) as arrays:
        frames = torch.tensor((arrays["x"].astype(np.float32) - arrays["mean"]) / arrays["std"])
        labels = torch.tensor(arrays["y_state"], dtype=torch.int64)
        utterance = torch.tensor(arrays["frame_utt"], dtype=torch.int64)
        offset = torch.tensor(arrays["utt_offset"], dtype=torch.int64)
        part = torch.tensor(arrays["utt_split"])[utterance]
    first, last = offset[utterance], offset[utterance + 1] - 1
    train, validation, test = (
        Frames(frames, labels, (part == code).nonzero().squeeze(1), first, last)
        for code in (0, 1, 2)
    )
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

    @property
    def key(self) -> str:
        """Name of the run in the JSON file."""
        return "/".join(str(value) for value in asdict(self).values())


@dataclass
class Result:
    """What a run ended with; errors in percent."""

    setting: Setting
    test_error: float
    validation_error: float
    values: dict[str, float] = field(default_factory=dict)
    stuck: list[str] = field(default_factory=list)
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
    silence_lightning()
    torch.set_num_threads(1)  # the runs share the cores
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
        DataLoader(train, batch_size=50, shuffle=True, collate_fn=as_it_is),
        DataLoader(validation, batch_size=task.validation_batch, collate_fn=as_it_is),
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
        acted = [update.safeguard for update in callback.schedule if update.safeguard]
        result.safeguards = {kind: acted.count(kind) for kind in sorted(set(acted))}
    return result


def as_it_is(batch: list[Tensor]) -> list[Tensor]:
    return batch


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
    bounds = {"momentum": (2e-6, 1 - 2e-6), "beta1": (2e-6, 1 - 2e-6), "weight_decay": (0, 1e9)}
    return [
        name
        for name in names
        if name in bounds
        and all(
            not bounds[name][0] < update.values[name].item() < bounds[name][1]
            for update in last_half
        )
    ]


def settings_of(task: str, seeds: Sequence[int], tuned: Sequence[str]) -> list[Setting]:
    """Return all runs of a task, seed by seed."""
    chosen = []
    for seed, optimizer, lr in itertools.product(seeds, TUNED, START_LRS):
        chosen.append(Setting(task, optimizer, "fixed", "nothing", lr, seed))
        for names, method in itertools.product(tuned, CALLBACKS):
            chosen.append(Setting(task, optimizer, method, names, lr, seed))
    return chosen


def read(file: Path) -> dict[str, Result]:
    """Read the finished runs."""
    if not file.exists():
        return {}
    found = [Result(**entry) for entry in json.loads(file.read_text())]
    for result in found:
        result.setting = Setting(**result.setting)  # type: ignore[arg-type]
    return {result.setting.key: result for result in found}


def write(file: Path, results: dict[str, Result]) -> None:
    """Write the finished runs, so that a run killed meanwhile leaves the old file."""
    draft = file.with_suffix(".part")
    draft.write_text(json.dumps([asdict(result) for result in results.values()], indent=0))
    draft.replace(file)


def run_missing(
    settings: Sequence[Setting], file: Path, data: Path | None, steps: int | None, workers: int
) -> dict[str, Result]:
    """Run what the file lacks, in several processes."""
    results = read(file)
    missing = [setting for setting in settings if setting.key not in results]
    print(f"{len(missing)} of {len(settings)} runs to do", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in as_completed([pool.submit(run, s, data, steps) for s in missing]):
            result = done.result()
            results[result.setting.key] = result
            write(file, results)
    return results


def group_of(results: Sequence[Result], **wanted: Any) -> list[Result]:
    return [
        r for r in results if all(getattr(r.setting, k) == value for k, value in wanted.items())
    ]


def mean_and_error(results: Sequence[Result]) -> tuple[float, float]:
    """Return mean and standard error of test errors; one run's standard error is taken as 0."""
    if not results:  # a task that was stopped on the way
        return math.nan, 0.0
    errors = np.array([result.test_error for result in results])
    spread = errors.std(ddof=1) / len(errors) ** 0.5 if len(errors) > 1 else 0.0
    return float(errors.mean()), float(spread)


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
    best = min(mean_and_error(group_of(fixed, start_lr=lr))[0] for lr in lrs)
    no_worse = near_best = 0
    for lr in lrs:
        error, spread = mean_and_error(group_of(tuned, start_lr=lr))
        fixed_error, fixed_spread = mean_and_error(group_of(fixed, start_lr=lr))
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
    print(
        f"{'task':7} {'inside':6} {'method':6} {'tuned':7} "
        + " ".join(f"{lr:>6g}" for lr in lrs)
        + "    a    b  n  s  runs"
    )
    for task, optimizer, tuned, method in rows_of(results):
        row = group_of(results, task=task, optimizer=optimizer, tuned=tuned, method=method)
        fixed = group_of(results, task=task, optimizer=optimizer, method="fixed")
        cells = [f"{mean_and_error(group_of(row, start_lr=lr))[0]:6.1f}" for lr in lrs]
        no_worse, near_best, starts = judge(row, fixed)
        verdict = f"{no_worse}/{starts}" if method != "fixed" else "-"
        broken = sum(not result.is_finite for result in row)
        stuck = sum(bool(result.stuck) for result in row)
        print(
            f"{task:7} {optimizer:6} {method:6} {tuned:7} {' '.join(cells)}  {verdict:>3}  "
            f"{near_best}/{starts} {broken:2} {stuck:2}  {len(row):4}"
        )


def draw(results: Sequence[Result]) -> Figure:
    """Draw test error over the start of the learning rate: a row a task, a column an optimizer."""
    tasks = [task for task in TASKS if group_of(results, task=task)]
    figure = Figure(figsize=(11, 1 + 3.4 * len(tasks)), layout="constrained")
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
        points = [mean_and_error(group_of(row, start_lr=lr)) for lr in lrs]
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
    ax.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    ax.grid(alpha=0.25)


def silence_lightning() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning 2.6 with torch 2.13
    warnings.filterwarnings("ignore", "At step .* the")  # what the safeguards did is counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--data", type=Path, help="archive of the task's data")
    parser.add_argument("--quick", action="store_true", help="one seed: 3 minutes on 2 cores")
    parser.add_argument("--steps", type=int, help="optimizer steps of each run")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    seeds = SEEDS[:1] if args.quick else SEEDS
    settings = settings_of(args.task, seeds, ("lr", "all"))
    file = args.output / ("starts.json" if args.steps is None else f"starts-{args.steps}.json")
    results = list(run_missing(settings, file, args.data, args.steps, args.workers).values())
    print_table(results)
    draw(results).savefig(args.output / "starts.png", dpi=150)
    print(f"\nFigure: {args.output / 'starts.png'}")


if __name__ == "__main__":
    main()
