"""Find wrong labels: `TRHO` tunes one weight for each of 5,000 training images of MNIST.

Half of the training images have a wrong label, the 5,000 validation images have none. A linear
classifier is trained on all of them, on the clean half alone (which nobody knows: the oracle), and
with a weight in (0, 1) for each image, which starts at 0.5 and is moved by the gradient of the
validation loss. Images whose weight ends below 0.5 are taken for mislabelled.

    python examples/hypercleaning.py --data mnist.npz
    python examples/hypercleaning.py              # downloads MNIST by scikit-learn

Every run keeps the weights of its best validation error. Test images are read once, at its end.
"""

import argparse
import copy
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import lightning as L
import numpy as np
import torch
from data import Examples, batches_of, load_mnist
from matplotlib.figure import Figure
from runs import Archive, clock, markdown, mean_and_error, prepare_process, report, run_missing
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import TRHO, Hyperparameter, Interval

SEEDS = (0, 1, 2, 3, 4)
METHODS = {"all": "all 5,000", "oracle": "clean half (oracle)", "TRHO": "`TRHO`: weighted"}
TRAIN_SIZE = 5000
"""Images to train on, and as many to validate on."""


@dataclass(frozen=True)
class Setting:
    """What distinguishes a run from the others."""

    method: str
    seed: int
    steps: int = 3000
    lr: float = 0.1


@dataclass
class Result:
    """What a run ended with; accuracies in percent."""

    setting: Setting
    test_accuracy: float
    validation_accuracy: float
    best_step: int
    seconds: float
    curve: list[tuple[int, float]] = field(default_factory=list)
    precision: float = float("nan")
    recall: float = float("nan")
    weights: dict[str, list[int]] = field(default_factory=dict)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall of the images taken for mislabelled."""
        return 2 * self.precision * self.recall / (self.precision + self.recall)


class Labelled(Examples):
    """Images, labels, and the position of each image among the training images."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a batch."""
        return [*super().__getitems__(indices), torch.tensor(indices)]


class Cleaner(L.LightningModule):
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
    """The weights of the best validation accuracy."""

    best: dict[str, Tensor] = field(default_factory=dict)
    best_step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take down the accuracy, and the weights where it is the best so far."""
        accuracy = trainer.callback_metrics["val_accuracy"].item()
        if accuracy > max((known for _, known in self.curve), default=0):
            self.best_step = trainer.global_step
            self.best = copy.deepcopy(pl_module.state_dict())
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
    chosen = ~is_wrong if setting.method == "oracle" else torch.ones_like(is_wrong)
    images = Labelled(train.inputs[chosen], labels[chosen])
    weights: Tensor = torch.ones(len(images))
    if setting.method == "TRHO":
        weights = Hyperparameter(torch.full((len(images),), 0.5), Interval(0, 1))
    module, keeper = Cleaner(setting.lr, weights), KeepBest()
    trainer = L.Trainer(
        max_steps=setting.steps,
        check_val_every_n_epoch=None,
        val_check_interval=50,
        num_sanity_val_steps=0,
        callbacks=[TRHO(), keeper] if setting.method == "TRHO" else [keeper],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    began = clock()
    trainer.fit(module, batches_of(images, 500, shuffle=True), batches_of(validation, TRAIN_SIZE))
    seconds = clock() - began
    module.load_state_dict(keeper.best)
    result = Result(
        setting,
        accuracy(module.net, test),
        accuracy(module.net, validation),
        keeper.best_step,
        seconds,
        keeper.curve,
    )
    if setting.method == "TRHO":
        judge(result, module.weights.detach(), is_wrong)
    return result


@torch.no_grad()
def accuracy(net: nn.Module, data: Examples) -> float:
    return 100 * (net(data.inputs).argmax(dim=1) == data.labels).float().mean().item()


def judge(result: Result, weights: Tensor, is_wrong: Tensor) -> None:
    """Write down how well the weights tell wrong labels from right ones."""
    suspected = weights < 0.5
    found = (suspected & is_wrong).sum().item()
    result.precision = found / max(1, suspected.sum().item())
    result.recall = found / is_wrong.sum().item()
    for name, part in {"right": weights[~is_wrong], "wrong": weights[is_wrong]}.items():
        result.weights[name] = part.histc(20, 0, 1).int().tolist()


def table(results: dict[Setting, Result]) -> str:
    """Return the table of what was trained on."""
    rows = []
    for method, title in METHODS.items():
        row = [result for result in results.values() if result.setting.method == method]
        cells = [column(row, name, 1) for name in ("test_accuracy", "validation_accuracy")]
        found = [column(row, name, 3) for name in ("precision", "recall", "f1")]
        rows.append([
            title,
            *cells,
            *(found if method == "TRHO" else "---"),
            column(row, "seconds"),
        ])
    setting = next(iter(results))
    caption = (
        f"Mean ± standard error over {len({s.seed for s in results})} seeds; {setting.steps:,} "
        f"steps of SGD at a fixed rate of {setting.lr:g}, minibatches of 500; `TRHO` with its "
        "defaults. Accuracies in %, seconds of one core."
    )
    header = ["trained on", "test", "validation", "precision", "recall", "F1", "seconds"]
    return markdown(header, rows, caption)


def column(results: list[Result], name: str, digits: int = 0) -> str:
    """Return the table's cell for a field of some results."""
    mean, error = mean_and_error([getattr(result, name) for result in results])
    return f"{mean:.{digits}f} ± {error:.{digits}f}" if digits else f"{mean:.0f}"


def draw(results: dict[Setting, Result]) -> Figure:
    """Draw the weights of right and wrong labels, and accuracies over steps."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    cleaned = [result for result in results.values() if result.setting.method == "TRHO"]
    edges = np.linspace(0, 1, 21)
    for name, color in {"wrong": "tab:red", "right": "tab:blue"}.items():
        counts = np.mean([result.weights[name] for result in cleaned], axis=0)
        left.stairs(counts, edges, fill=True, alpha=0.5, color=color, label=f"{name} label")
    left.axvline(0.5, color="0.3", linewidth=0.8, linestyle=":")
    left.set(title="Weights at the end", xlabel="Weight of an image", ylabel="Images")
    left.legend(frameon=False)
    colors = {"all": "0.45", "oracle": "tab:green", "TRHO": "tab:orange"}
    for method, title in METHODS.items():
        curves = [r.curve for r in results.values() if r.setting.method == method]
        steps, accuracies = np.mean(curves, axis=0).T
        right.plot(steps, accuracies, color=colors[method], label=title.replace("`", ""))
    right.set(title="Validation accuracy (%)", xlabel="Optimizer step")
    right.legend(frameon=False)
    right.grid(alpha=0.25)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="archive of MNIST; downloaded by default")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    settings = [Setting(m, s, args.steps) for s, m in itertools.product(args.seeds, METHODS)]
    archive = Archive(args.output / "hypercleaning.json", Setting, Result)
    results = run_missing(run, settings, archive, args.data, workers=args.workers)
    report(args.output / "hypercleaning", table(results), draw(results))


if __name__ == "__main__":
    main()
