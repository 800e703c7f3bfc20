"""Find wrong labels: `TRHO` tunes one weight for each of 5,000 training images of MNIST.

Half of the training images have a wrong label, the 5,000 validation images have none. A linear
classifier is trained on all of them, on the clean half alone (which nobody knows: the oracle), and
with a weight in (0, 1) for each image, which starts at 0.5 and is moved by the gradient of the
validation loss. Images whose weight ends below 0.5 are taken for mislabelled. As in the paper,
another classifier is then trained on the images that are kept and those for validation together.

    python examples/hypercleaning.py --data mnist.npz    # 3 minutes on 2 cores
    python examples/hypercleaning.py                     # downloads MNIST by scikit-learn

Runs keep the weights of their best validation accuracy; those that train on the validation images
keep the last. Test images are read once, at the end of a run.
"""

import argparse
import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import torch
from data import Examples, batches_of, load_mnist
from matplotlib.figure import Figure
from runs import (
    Archive,
    cell,
    clock,
    markdown,
    prepare_process,
    report,
    run_missing,
)
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import TRHO, Hyperparameter, Interval

SEEDS = (0, 1, 2, 3, 4)
ROWS = {
    ("all", False): "all",
    ("clean", False): "clean half (oracle)",
    ("weighted", False): "all, weighted by `TRHO`",
    ("none", True): "validation images alone",
    ("all", True): "all, and validation images",
    ("clean", True): "clean half, and validation images (oracle)",
    ("weighted", True): "those that `TRHO` keeps, and validation images",
}
"""Which images are trained on, and whether the validation images are trained on, too."""
COLORS = {"all": "0.45", "clean": "tab:green", "weighted": "tab:orange"}
TRAIN_SIZE = 5000
"""Images to train on, and as many to validate on."""


@dataclass(frozen=True)
class Setting:
    """What distinguishes a run from the others."""

    images: str
    joined: bool
    seed: int
    steps: int = 3000
    lr: float = 0.1


@dataclass
class Result:
    """What a run ended with; accuracies in percent."""

    setting: Setting
    test_accuracy: float = math.nan
    validation_accuracy: float = math.nan
    seconds: float = math.nan
    curve: list[tuple[int, float]] = field(default_factory=list)
    precision: float = math.nan
    recall: float = math.nan
    f1: float = math.nan
    weights: dict[str, list[int]] = field(default_factory=dict)


class Labelled(Examples):
    """Images, labels, and the position of each image among the training images."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a batch."""
        return [*super().__getitems__(indices), torch.tensor(indices)]

    def only(self, chosen: Tensor) -> "Labelled":
        """Return the chosen images."""
        return Labelled(self.inputs[chosen], self.labels[chosen])

    def with_those_of(self, others: Examples) -> "Labelled":
        """Return these images and others."""
        return Labelled(
            torch.cat([self.inputs, others.inputs]), torch.cat([self.labels, others.labels])
        )


class Classifier(L.LightningModule):
    """A linear classifier whose training loss has a weight for each image."""

    def __init__(self, lr: float, weights: Tensor) -> None:
        super().__init__()
        self.net, self.lr, self.weights = nn.Linear(784, 10), lr, weights

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the weighted training loss."""
        images, labels, positions = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return (self.weights[positions] * losses).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        images, labels = batch
        logits = self.net(images)
        self.log("val_accuracy", 100 * (logits.argmax(dim=1) == labels).float().mean())
        return F.cross_entropy(logits, labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descend without momentum."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)


@dataclass
class KeepBest(L.Callback):
    """Validation accuracies, and the weights of the best."""

    best: dict[str, Tensor] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down the accuracy, and the weights where it is the best so far."""
        accuracy = trainer.callback_metrics["val_accuracy"].item()
        if accuracy > max((known for _, known in self.curve), default=0):
            self.best = copy.deepcopy(pl_module.net.state_dict())
        self.curve.append((trainer.global_step, accuracy))


def corrupt(labels: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Give half of the images another label; return the labels and which of them are wrong."""
    draw = torch.Generator().manual_seed(seed)
    is_wrong = torch.zeros(len(labels), dtype=torch.bool)
    is_wrong[torch.randperm(len(labels), generator=draw)[: len(labels) // 2]] = True
    shift = torch.randint(1, 10, labels.shape, generator=draw)
    return torch.where(is_wrong, (labels + shift) % 10, labels), is_wrong


def run(setting: Setting, data: Path | None) -> Result:
    """Train a fresh classifier and test it."""
    prepare_process()
    L.seed_everything(setting.seed, verbose=False)
    parts = load_mnist(data, setting.seed, train_size=TRAIN_SIZE, validation_size=TRAIN_SIZE)
    train, validation, test = (Examples(part.inputs.flatten(1), part.labels) for part in parts)
    labels, is_wrong = corrupt(train.labels, setting.seed)
    images, result, began = Labelled(train.inputs, labels), Result(setting), clock()
    keeper = KeepBest()
    if setting.images == "weighted":
        weights = Hyperparameter(torch.full((TRAIN_SIZE,), 0.5), Interval(0, 1))
        net = fit(setting, images, validation, weights, [TRHO(), keeper])
        grade(result, weights.detach(), is_wrong)
        chosen = weights.detach() >= 0.5
    else:
        everything = torch.ones_like(is_wrong)
        chosen = {"all": everything, "clean": ~is_wrong, "none": ~everything}[setting.images]
        if not setting.joined:
            net = fit(setting, images.only(chosen), validation, torch.ones(TRAIN_SIZE), [keeper])
    if setting.joined:
        images = images.only(chosen).with_those_of(validation)
        net = fit(setting, images, validation, torch.ones(len(images)))
    else:
        net.load_state_dict(keeper.best)
        result.curve, result.validation_accuracy = keeper.curve, accuracy(net, validation)
    result.seconds = clock() - began
    result.test_accuracy = accuracy(net, test)
    return result


def fit(
    setting: Setting,
    images: Labelled,
    validation: Examples,
    weights: Tensor,
    callbacks: Sequence[L.Callback] = (),
) -> nn.Module:
    """Train a fresh network on images of given weights."""
    module = Classifier(setting.lr, weights)
    trainer = L.Trainer(
        max_steps=setting.steps,
        check_val_every_n_epoch=None,
        val_check_interval=min(50, setting.steps),
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, batches_of(images, 500, shuffle=True), batches_of(validation, TRAIN_SIZE))
    return module.net


@torch.no_grad()
def accuracy(net: nn.Module, data: Examples) -> float:
    return 100 * (net(data.inputs).argmax(dim=1) == data.labels).float().mean().item()


def grade(result: Result, weights: Tensor, is_wrong: Tensor) -> None:
    """Write down how well the weights tell wrong labels from right ones."""
    suspected = weights < 0.5
    found = (suspected & is_wrong).sum().item()
    result.precision = found / max(1, suspected.sum().item())
    result.recall = found / is_wrong.sum().item()
    result.f1 = 2 * found / (suspected.sum() + is_wrong.sum()).item()
    for name, part in {"right": weights[~is_wrong], "wrong": weights[is_wrong]}.items():
        result.weights[name] = part.histc(20, 0, 1).int().tolist()


def of_row(results: Sequence[Result], images: str, joined: bool) -> list[Result]:
    return [r for r in results if (r.setting.images, r.setting.joined) == (images, joined)]


def table(results: Sequence[Result]) -> str:
    """Return the table of what was trained on."""
    rows = []
    for (images, joined), title in ROWS.items():
        row = of_row(results, images, joined)
        digits = {"test_accuracy": 1, "validation_accuracy": 1, "f1": 3, "seconds": 0}
        rows.append([
            title,
            *(cell([getattr(r, name) for r in row], n) for name, n in digits.items()),
        ])
    setting = results[0].setting
    caption = (
        f"{setting.steps:,} steps of SGD at a rate of {setting.lr:g} with minibatches of 500; "
        f"mean ± standard error over {len({r.setting.seed for r in results})} seeds; accuracies "
        "in %, F1 of the images taken for mislabelled, seconds of one core. `TRHO` has its "
        "defaults."
    )
    header = ["trained on", "test", "validation", "F1", "seconds"]
    return markdown(header, rows, caption)


def draw(results: Sequence[Result]) -> Figure:
    """Draw the weights of right and wrong labels, and accuracies over steps."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, 1, 21)
    for name, color in {"wrong": "tab:red", "right": "tab:blue"}.items():
        counts = np.mean([r.weights[name] for r in of_row(results, "weighted", False)], axis=0)
        left.stairs(counts, edges, fill=True, alpha=0.5, color=color, label=f"{name} label")
    left.axvline(0.5, color="0.3", linewidth=0.8, linestyle=":")
    left.set(title="Weights at the end", xlabel="Weight of an image", ylabel="Images")
    left.legend(frameon=False)
    for images, color in COLORS.items():
        steps, accuracies = np.mean([r.curve for r in of_row(results, images, False)], axis=0).T
        label = ROWS[images, False].replace("`", "")
        right.plot(steps, accuracies, color=color, label=label)
    right.set(title="Validation accuracy (%)", xlabel="Optimizer step")
    right.legend(frameon=False)
    right.grid(alpha=0.25)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="archive of MNIST; downloaded by default")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    settings = [Setting(*row, s, args.steps) for s, row in itertools.product(args.seeds, ROWS)]
    archive = Archive(args.output / "hypercleaning.json", Setting, Result)
    results = list(run_missing(run, settings, archive, args.data, workers=args.workers).values())
    report(args.output / "hypercleaning", table(results), draw(results))


if __name__ == "__main__":
    main()
