"""Tune an optimizer of your own: write its update as an `UpdateRule` and check the hypergradients.

The optimizer here is Lion made smooth: it steps along tanh(sharpness * velocity), not its sign.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import lightning as L
import torch
from data import digit_loaders
from quiet import silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import (
    Hyperparameter,
    Interval,
    Positive,
    UpdateRule,
    hypergradcheck,
    register_rule,
)


class SmoothLion(torch.optim.Optimizer):
    """v' = beta v + (1 - beta) g, then w' = w - lr tanh(sharpness v')."""

    def __init__(
        self, params: Iterable[Tensor], lr: float, beta: float = 0.9, sharpness: float = 100.0
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "sharpness": sharpness})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Make an update; the closure computes the gradients."""
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                velocity = self.state[param].setdefault("velocity", torch.zeros_like(param))
                velocity += (1 - group["beta"]) * (param.grad - velocity)
                param -= group["lr"] * torch.tanh(group["sharpness"] * velocity)
        return loss


@dataclass(frozen=True)
class SmoothLionRule(UpdateRule):
    """The same update as a pure function: which settings, what state, how both change."""

    domains = {"lr": Positive(), "beta": Interval(0, 1), "sharpness": Positive()}
    buffers = ("velocity",)

    def init(self, param: Tensor, hyper: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state before the first update."""
        return {"velocity": torch.zeros_like(param)}

    def update(
        self, state: dict[str, Tensor], grad: Tensor, hyper: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the state after an update."""
        velocity = hyper["beta"] * state["velocity"] + (1 - hyper["beta"]) * grad
        step = hyper["lr"] * torch.tanh(hyper["sharpness"] * velocity)
        return {"param": state["param"] - step, "velocity": velocity}


register_rule(SmoothLion, SmoothLionRule)


class Net(L.LightningModule):
    """Reads digits; all settings of its optimizer are hyperparameters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.lr = Hyperparameter(1e-3, Positive())
        self.beta = Hyperparameter(0.9, Interval(0, 1))
        self.sharpness = Hyperparameter(100.0, Positive())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use the optimizer as any other."""
        return SmoothLion(self.net.parameters(), self.lr, self.beta, self.sharpness)


def main() -> None:
    silence_lightning()
    L.seed_everything(0, verbose=False)
    train, validation, _ = digit_loaders()
    result = hypergradcheck(Net(), train, validation)
    worst = max(abs(row.forward / row.differences - 1) for row in result.rows)
    print(f"Largest relative difference from finite differences: {worst:.1e}")


if __name__ == "__main__":
    main()
