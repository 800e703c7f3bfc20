"""Tune learning rate and L2 coefficient on handwritten digits while a small network trains.

The same module trains with Adam three times, from the same weights and on the same batches: as it
is, with `RTHO` and with `TRHO`. By validation error, fixed learning rates from 1e-3 to 1e-2 do best
here. The runs start 100 times below that range, then 10 times above it, both times with an L2
coefficient about 100 times too large.

    python examples/digits.py
    tensorboard --logdir examples/output/digits

The callbacks see training and validation images. Test images are for the report alone.
"""

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import error_in_percent, split_digits
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quiet import silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rtho import RTHO, TRHO, Hyperparameter, OuterUpdate, Positive

GOOD_LRS = (1e-3, 1e-2)
STARTS = {"100x too small": 1e-5, "10x too large": 1e-1}  # learning rates
START_L2 = 1e-2
COLORS = {"baseline": "0.45", "RTHO": "tab:blue", "TRHO": "tab:orange"}


class DigitClassifier(L.LightningModule):
    """An ordinary module, but for the two numbers that became a `Hyperparameter`."""

    def __init__(self, lr: float, l2: float) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
        self.lr = Hyperparameter(lr, Positive())
        self.l2 = Hyperparameter(l2, Positive())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss, L2 penalty included."""
        images, labels = batch
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return F.cross_entropy(self.net(images), labels) + self.l2 * penalty

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callbacks minimize."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give Adam the hyperparameter where it takes a number."""
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)


@dataclass
class ErrorCurves(L.Callback):
    """Misread validation and test images in percent, every 20 steps, for the report."""

    validation: TensorDataset
    test: TensorDataset
    steps: list[int] = field(default_factory=list)
    validation_errors: list[float] = field(default_factory=list)
    test_errors: list[float] = field(default_factory=list)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Measure."""
        step = trainer.global_step
        if step % 20 != 0 and step != trainer.max_steps:
            return
        self.steps.append(step)
        self.validation_errors.append(error_in_percent(pl_module.net, self.validation))
        self.test_errors.append(error_in_percent(pl_module.net, self.test))
        pl_module.logger.log_metrics(
            {"error/validation": self.validation_errors[-1], "error/test": self.test_errors[-1]},
            step,
        )


@dataclass
class Run:
    """One finished run."""

    start: str
    method: str
    curves: ErrorCurves
    updates: list[OuterUpdate]
    lr: float
    l2: float
    seconds: float

    @property
    def test_error(self) -> float:
        """Misread test images after the last step, in percent."""
        return self.curves.test_errors[-1]


def train(
    start: str, method: str, callback: RTHO | TRHO | None, steps: int, seed: int, output: Path
) -> Run:
    """Train a fresh module, with the callback if there is one."""
    L.seed_everything(seed, verbose=False)
    train_data, validation_data, test_data = split_digits(seed)
    module = DigitClassifier(lr=STARTS[start], l2=START_L2)
    curves = ErrorCurves(validation_data, test_data)
    trainer = L.Trainer(
        max_steps=steps,
        check_val_every_n_epoch=5,
        callbacks=[callback, curves] if callback else [curves],
        logger=TensorBoardLogger(output / "digits", name=f"lr{STARTS[start]:g}-{method}"),
        log_every_n_steps=10,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = time.perf_counter()
    trainer.fit(
        module,
        DataLoader(train_data, batch_size=50, shuffle=True),
        DataLoader(validation_data, batch_size=200),
    )
    seconds = time.perf_counter() - began
    print(f"{method:8} from lr {STARTS[start]:g}: {steps} steps in {seconds:.1f} s", flush=True)
    updates = callback.schedule if callback else []
    return Run(start, method, curves, updates, module.lr.item(), module.l2.item(), seconds)


def print_table(runs: list[Run]) -> None:
    print(f"\nEvery run starts from L2 coefficient {START_L2:g}.")
    print("start lr                 method    test error  final lr  final L2  seconds")
    for run in runs:
        start = f"{STARTS[run.start]:g} ({run.start})"
        print(
            f"{start:23}  {run.method:8}  {run.test_error:8.1f} %  {run.lr:8.1e}  {run.l2:8.1e}"
            f"  {run.seconds:7.1f}"
        )


def draw(runs: list[Run]) -> Figure:
    """Draw hyperparameters, hypergradients and errors over steps, for runs of one start."""
    figure = Figure(figsize=(12, 6), layout="constrained")
    axes = figure.subplots(2, 3, sharex=True)
    for run in runs:
        style = {"color": COLORS[run.method], "linewidth": 1.6}
        draw_hyperparameter(axes[:, 0], run, "lr", STARTS[run.start], style)
        draw_hyperparameter(axes[:, 1], run, "l2", START_L2, style)
        axes[0, 2].plot(run.curves.steps, run.curves.validation_errors, **style)
        axes[1, 2].plot(run.curves.steps, run.curves.test_errors, label=run.method, **style)
    titles = [
        ["Learning rate", "L2 coefficient", "Validation error (%)"],
        ["Hypergradient dE/d(lr)", "Hypergradient dE/d(L2)", "Test error (%)"],
    ]
    axes[0, 0].axhspan(*GOOD_LRS, color="tab:green", alpha=0.12, label="fixed rates that do well")
    for row, row_titles in zip(axes, titles, strict=True):
        for ax, title in zip(row, row_titles, strict=True):
            ax.set_title(title, fontsize=11)
            ax.grid(alpha=0.25)
    for ax in axes[:, 2]:
        ax.set_yscale("log")
        ax.set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    for ax in axes[1]:
        ax.set_xlabel("Optimizer step")
    start = runs[0].start
    figure.suptitle(
        f"Digits, from a learning rate {start} ({STARTS[start]:g}) and an L2 coefficient of "
        f"{START_L2:g}; E is the validation loss"
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def draw_hyperparameter(
    axes: list[Axes], run: Run, name: str, start: float, style: dict[str, Any]
) -> None:
    """Draw the values of a hyperparameter in the first panel, its hypergradient in the second."""
    updates = run.updates
    last_step = run.curves.steps[-1]
    steps = [0, *(u.step for u in updates), last_step]
    values = [start, *(u.values[name].item() for u in updates)]
    axes[0].plot(steps, [*values, values[-1]], drawstyle="steps-post", **style)
    axes[0].set_yscale("log")
    if updates:
        axes[1].plot(steps[1:-1], [u.hypergradients[name].item() for u in updates], **style)
    axes[1].axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes[1].set_yscale("symlog", linthresh={"lr": 10, "l2": 0.1}[name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and batch order")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    silence_lightning()
    torch.set_num_threads(1)  # layers this small gain nothing from a second one

    runs = [
        train(start, method, callback, args.steps, args.seed, args.output)
        for start in STARTS
        for method, callback in [
            ("baseline", None),
            ("RTHO", RTHO()),
            ("TRHO", TRHO()),
        ]
    ]
    print_table(runs)
    baseline, rtho, trho = runs[:3]
    draw([baseline, rtho, trho]).savefig(args.output / "digits.png", dpi=150)
    print(f"\nFigure, of the first three runs: {args.output / 'digits.png'}")
    print(f"TRHO test error / baseline test error: {trho.test_error / baseline.test_error:.2f}")
    print(f"RTHO test error / baseline test error: {rtho.test_error / baseline.test_error:.2f}")


if __name__ == "__main__":
    main()
