"""Give each layer a learning rate of its own: one `Hyperparameter` for each parameter group."""

import lightning as L
import torch
from data import digit_loaders, error_in_percent
from matplotlib.figure import Figure
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO, Hyperparameter, Positive, Schedule


class LayerRates(L.LightningModule):
    """Three layers, each a parameter group with its rate; all of them start 100 times too small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (
            nn.Linear(64, 128),
            nn.Linear(128, 128),
            nn.Linear(128, 10),
        )
        self.net = nn.Sequential(self.first, nn.ReLU(), self.second, nn.ReLU(), self.last)
        self.lr = {name: Hyperparameter(1e-5, Positive()) for name in ("first", "second", "last")}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        return self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give each group its hyperparameter where it takes a number."""
        return torch.optim.Adam([
            {"params": getattr(self, name).parameters(), "lr": lr} for name, lr in self.lr.items()
        ])


def draw(schedule: Schedule) -> Figure:
    """Draw the rates over the steps."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name in schedule.names:
        rates = [update.values[name] for update in schedule]
        axes.step(schedule.steps, rates, where="post", label=name)
    axes.set(yscale="log", xlabel="Optimizer step", ylabel="Learning rate")
    axes.legend()
    return figure


def main(steps: int = 1000) -> None:
    silence_lightning()
    L.seed_everything(0, verbose=False)
    train, validation, test = digit_loaders()
    module, callback = LayerRates(), RTHO()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[callback], **QUIET)
    trainer.fit(module, train, validation)

    draw(callback.schedule).savefig("layer_rates.png")
    for name, rate in callback.hyperparameters.items():
        print(f"{name:9} {rate:.1e}")
    print(f"Test error in %: {error_in_percent(module.net, test):.1f}")


if __name__ == "__main__":
    main()
