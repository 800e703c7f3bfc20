"""Draw how the weights move while `RTHO` changes the loss that they descend.

Two weights fit ten noisy samples by gradient descent on the squared error and an L2 penalty; the
learning rate and the L2 coefficient rho are tuned, both of them start too small. Each panel of the
figure is one hyper-batch: rho has just been changed, and with it the training loss whose contours
are drawn. After Figure 1 of Franceschi et al.'s poster "Real-time Hyperparameter Optimization".

    python examples/toy_trajectories.py
"""

import argparse
from pathlib import Path
from typing import Any

import lightning as L
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from quiet import silence_lightning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_rtho import RTHO, Hyperparameter, OuterUpdate, Positive

SEED = 21  # ten samples that mislead an unregularized fit
TRUE_WEIGHTS = (1.2, 0.8)
START_WEIGHTS = (0.2, -1.2)
START_LR = 0.03
START_RHO = 0.02
HYPER_BATCH_SIZE = 5
PANELS = 8

SO_FAR = {"label": "RTHO so far", "color": "tab:blue", "marker": ".", "markersize": 5}
HYPER_BATCH = {"label": "in this hyper-batch", "color": "tab:orange", "marker": ".", "lw": 2}
UNTUNED = {
    "label": f"untuned: lr {START_LR:g}, $\\rho$ {START_RHO:g}",
    "color": "0.2",
    "linestyle": ":",
    "marker": "x",
}
TRAINING_MINIMUM = {
    "label": "least training loss at this $\\rho$ (contours)",
    "linestyle": "none",
    "marker": "o",
    "color": "white",
    "markeredgecolor": "steelblue",
}
VALIDATION_MINIMUM = {
    "label": "least validation loss",
    "linestyle": "none",
    "marker": "*",
    "markersize": 11,
    "color": "black",
}


class Regression(L.LightningModule):
    """Linear regression on two inputs, with an L2 penalty."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(START_WEIGHTS))
        self.lr = Hyperparameter(START_LR, Positive())
        self.rho = Hyperparameter(START_RHO, Positive())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss, L2 penalty included."""
        return squared_error(self.weights, *batch) + self.rho * self.weights.square().sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        return squared_error(self.weights, *batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descend."""
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class WeightPath(L.Callback):
    """Writes down where the weights are."""

    def __init__(self) -> None:
        self.points = [START_WEIGHTS]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Write down a point."""
        self.points.append(tuple(pl_module.weights.tolist()))


def squared_error(weights: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean squared error ``[...]`` of weights ``[..., 2]``."""
    return (weights @ inputs.T - targets).square().mean(dim=-1)


def noisy_data(samples: int, generator: torch.Generator) -> TensorDataset:
    """Return two correlated inputs and a target that is linear in them but for noise."""
    first, other = torch.randn(samples, 2, generator=generator).T
    inputs = torch.stack([first, 0.8 * first + 0.6 * other], dim=1)
    targets = inputs @ torch.tensor(TRUE_WEIGHTS) + torch.randn(samples, generator=generator)
    return TensorDataset(inputs, targets)


def train(
    callbacks: list[L.Callback], steps: int, data: TensorDataset, validation: TensorDataset
) -> Tensor:
    """Train from the start; return the path of the weights ``[steps + 1, 2]``."""
    path = WeightPath()
    trainer = L.Trainer(
        max_steps=steps,
        callbacks=[*callbacks, path],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(), DataLoader(data, len(data)), DataLoader(validation, len(validation)))
    return torch.tensor(path.points)


def minimum(data: TensorDataset, rho: float = 0.0) -> Tensor:
    """Return the weights ``[2]`` of least squared error plus penalty."""
    inputs, targets = data.tensors
    curvature = inputs.T @ inputs / len(inputs) + rho * torch.eye(2)
    return torch.linalg.solve(curvature, inputs.T @ targets / len(inputs))


def draw_losses(ax: Axes, rho: float, data: TensorDataset, validation: TensorDataset) -> None:
    """Draw contours of the training loss at this rho, and where both losses are least."""
    w1, w2 = torch.linspace(-0.5, 2.9, 200), torch.linspace(-1.5, 1.6, 200)
    grid = torch.stack(torch.meshgrid(w1, w2, indexing="xy"), dim=-1)
    loss = squared_error(grid, *data.tensors) + rho * grid.square().sum(dim=-1)
    excess = loss - loss.min()
    levels = [0.01 * 2.5**i for i in range(8)]
    ax.contourf(w1, w2, excess, [0, *levels], cmap="Blues_r", alpha=0.3)
    ax.contour(w1, w2, excess, levels, colors="steelblue", linewidths=0.6)
    ax.plot(*minimum(data, rho), **TRAINING_MINIMUM)
    ax.plot(*minimum(validation), **VALIDATION_MINIMUM)


def draw(
    tuned: Tensor,
    untuned: Tensor,
    updates: list[OuterUpdate],
    data: TensorDataset,
    validation: TensorDataset,
) -> Figure:
    """Draw a panel for each hyper-batch, from the paths ``[steps + 1, 2]`` of the weights."""
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    axes = figure.subplots(2, PANELS // 2, sharex=True, sharey=True)
    lrs = [START_LR, *(update.values["lr"].item() for update in updates)]
    rhos = [START_RHO, *(update.values["rho"].item() for update in updates)]
    for i, ax in enumerate(axes.flat):
        first, last = i * HYPER_BATCH_SIZE, (i + 1) * HYPER_BATCH_SIZE
        draw_losses(ax, rhos[i], data, validation)
        ax.plot(*tuned[: first + 1].T, **SO_FAR)
        ax.plot(*tuned[first : last + 1].T, **HYPER_BATCH)
        ax.plot(*untuned[: last + 1].T, **UNTUNED, markevery=[last])
        ax.set_title(f"Steps {first + 1} to {last}: lr {lrs[i]:.2g}, $\\rho$ {rhos[i]:.2g}")
    figure.supxlabel("$w_1$")
    figure.supylabel("$w_2$")
    styles = [SO_FAR, HYPER_BATCH, UNTUNED, TRAINING_MINIMUM, VALIDATION_MINIMUM]
    entries = [Line2D([], [], **style) for style in styles]
    figure.legend(handles=entries, loc="outside upper center", ncols=5, frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=SEED, help="of the data")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output")
    args = parser.parse_args()
    silence_lightning()

    generator = torch.Generator().manual_seed(args.seed)
    data, validation = noisy_data(10, generator), noisy_data(200, generator)
    steps = PANELS * HYPER_BATCH_SIZE
    rtho = RTHO(
        hyper_batch_size=HYPER_BATCH_SIZE,
        outer_optimizer=lambda raw: torch.optim.Adam(raw, lr=0.5),
    )
    untuned = train([], steps, data, validation)
    tuned = train([rtho], steps, data, validation)

    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "toy_trajectories.png"
    draw(tuned, untuned, rtho.schedule, data, validation).savefig(path, dpi=130)
    least, fixed, moved = (
        squared_error(weights, *validation.tensors).item()
        for weights in (minimum(validation), untuned[-1], tuned[-1])
    )
    print(f"Figure: {path}")
    print(f"Validation loss: untuned {fixed:.2f}, RTHO {moved:.2f}, least possible {least:.2f}")
    print(f"RTHO validation loss / untuned validation loss: {moved / fixed:.2f}")


if __name__ == "__main__":
    main()
