"""Tune learning rate and L2 coefficient of a convolutional network while it learns MNIST.

Adam inside; the L2 penalty is in the loss, on the fully connected weights. `RTHO` starts from a
learning rate of 1e-4 and an L2 coefficient of 1e-6, and so do a run that stays there and one whose
learning rate is found by Lightning. A search by Optuna is given the time that `RTHO` took.

    python examples/mnist_cnn.py --data mnist.npz           # half an hour on 2 cores
    python examples/mnist_cnn.py --data mnist.npz --full    # the paper's size, for a GPU
    python examples/mnist_cnn.py                            # downloads MNIST by scikit-learn

Every run keeps the weights of its best validation error. Test images are read once, at its end.
"""

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
from data import batches_of, load_mnist
from matplotlib.figure import Figure
from methods import Fixed, Range, RateFinder, Search, Task, Tuned, Values
from runs import cell, markdown, report
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO, Hyperparameter, Positive

SEEDS = (0, 1, 2, 3, 4)
START = {"lr": 1e-4, "l2": 1e-6}
DOMAINS = {"lr": Positive(), "l2": Positive()}
SPACE = {"lr": Range(1e-5, 1e-1), "l2": Range(1e-7, 1e-1)}
METHODS = {
    "fixed": Fixed("start values, fixed", START),
    "RTHO": Tuned("`RTHO`, hyper-batches of 100", START, partial(RTHO, hyper_batch_size=100)),
    "RTHO-10": Tuned("`RTHO`, hyper-batches of 10 (default)", START, RTHO),
    "RTHO-quarter": Tuned(
        "`RTHO`, hyper-batches of 100, `curvature_fraction=0.25`",
        START,
        partial(RTHO, hyper_batch_size=100, curvature_fraction=0.25),
    ),
    "finder": RateFinder("`LearningRateFinder`, then fixed", START),
    "optuna": Search(
        "Optuna, TPE with pruning, time of the first `RTHO`",
        SPACE,
        optuna.samplers.TPESampler,
        optuna.pruners.MedianPruner,
        share=1.0,
    ),
}
COLORS = {
    "fixed": "0.45",
    "RTHO": "tab:blue",
    "RTHO-10": "tab:cyan",
    "finder": "tab:green",
}


@dataclass(frozen=True)
class Size:
    """How large the experiment is."""

    channels: tuple[int, int]
    hidden: int
    steps: int
    train_images: int
    check_every: int


SIZES = {
    "small": Size((8, 16), 128, 4000, 10_000, 500),
    "full": Size((32, 64), 1024, 20_000, 55_000, 1000),
    "quick": Size((2, 4), 16, 100, 500, 50),
}


class ImageClassifier(L.LightningModule):
    """An ordinary module, but for the two numbers that became a `Hyperparameter`."""

    def __init__(self, size: Size, lr: float, l2: float) -> None:
        super().__init__()
        first, second = size.channels
        self.features = nn.Sequential(
            *(nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(first, second, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        )
        self.dense = nn.Sequential(
            nn.Linear(16 * second, size.hidden), nn.ReLU(), nn.Linear(size.hidden, 10)
        )
        self.lr, self.l2 = lr, l2

    def forward(self, images: Tensor) -> Tensor:
        """Return logits ``[batch, 10]``."""
        return self.dense(self.features(images))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss, L2 penalty included."""
        images, labels = batch
        penalty = sum(layer.weight.square().sum() for layer in self.dense[::2])
        return F.cross_entropy(self(images), labels) + self.l2 * penalty

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        images, labels = batch
        logits = self(images)
        self.log("val_error", 100 * (logits.argmax(dim=1) != labels).float().mean())
        return F.cross_entropy(logits, labels)

    def misread(self, batch: list[Tensor]) -> Tensor:
        """Tell which images ``[batch]`` are taken for another digit."""
        return self(batch[0]).argmax(dim=1) != batch[1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give Adam the hyperparameter where it takes a number."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def run(setting: Setting, data: Path | None) -> Result:
    """Train a network by one of the methods and test it."""
    size = SIZES[setting.size]
    train, validation, test = load_mnist(
        data, setting.seed, train_size=size.train_images, validation_size=5000
    )

    def make(values: Values, *, tuned: bool) -> ImageClassifier:
        if tuned:
            values = {name: Hyperparameter(v, DOMAINS[name]) for name, v in values.items()}
        return ImageClassifier(size, **values)

    task = Task(
        make,
        batches_of(train, 50, shuffle=True),
        batches_of(validation, 500),
        setting.steps,
        min(size.check_every, setting.steps),
        accelerator="auto" if setting.size == "full" else "cpu",
    )
    return train_and_test(setting, METHODS[setting.method], task, test)


def table(results: list[Result]) -> str:
    """Return the table of the methods."""
    setting = results[0].setting
    size = SIZES[setting.size]
    baseline = np.mean([result.test_error for result in of_method(results, "fixed")])
    rows = []
    for name, method in METHODS.items():
        row = of_method(results, name)
        test_errors = [result.test_error for result in row]
        rows.append([
            method.title,
            cell(test_errors, 2),
            f"{100 * (np.mean(test_errors) / baseline - 1):+.0f} %",
            cell([result.validation_error for result in row], 2),
            f"{np.mean([result.trials for result in row]):.0f}",
            f"{np.mean([result.seconds for result in row]):.0f}",
        ])
    caption = (
        f"{size.train_images:,} images to train on, {setting.steps:,} steps of Adam; errors in %, "
        f"mean ± standard error over {len(of_method(results, 'fixed'))} seeds; seconds of one "
        "core. Start: lr 1e-4, L2 1e-6. Hyper-batches of 100 are the paper's; all else of `RTHO` "
        "is default. Optuna draws lr from 1e-5 to 0.1 and L2 from 1e-7 to 0.1."
    )
    header = ["hyperparameters", "test", "against start values", "validation", "runs", "seconds"]
    return markdown(header, rows, caption)


def draw(results: list[Result]) -> Figure:
    """Draw validation errors and both hyperparameters over steps."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    errors, rates, penalties = figure.subplots(1, 3)
    names = {name: method.title.replace("`", "") for name, method in METHODS.items()}
    draw_errors(errors, results, COLORS, names, ticks=[2, 5, 10, 20])
    errors.set(title="Validation error (%), mean")
    for ax, name, title in [(rates, "lr", "Learning rate"), (penalties, "l2", "L2 coefficient")]:
        draw_values(ax, results, name, COLORS)
        ax.axhline(START[name], color=COLORS["fixed"], linewidth=0.9)
        ax.set(title=f"{title}, each seed", yscale="log")
    handles, labels = errors.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def main() -> None:
    args = arguments(__doc__)
    steps = args.steps or SIZES[args.size].steps
    results = compare(run, METHODS, args.seeds or SEEDS, steps, "mnist_cnn", args)
    report(args.output / "mnist_cnn", table(results), draw(results))


if __name__ == "__main__":
    main()
