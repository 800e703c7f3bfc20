"""Weigh the tasks of a network that learns several at once: the weights of the losses are tuned."""

import lightning as L
import torch
from data import error_in_percent, split_digits
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rtho import RTHO, Hyperparameter, Positive


class ThreeTasks(L.LightningModule):
    """Reads digits through eight units that it has to share with two other tasks.

    One of them asks whether a digit is odd, the other cannot be learned. Both begin with too large
    a weight.
    """

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8), nn.Tanh())
        self.heads = nn.ModuleDict({
            "digit": nn.Linear(8, 10),
            "odd": nn.Linear(8, 2),
            "noise": nn.Linear(8, 10),
        })
        self.weight = {
            "odd": Hyperparameter(3.0, Positive()),
            "noise": Hyperparameter(3.0, Positive()),
        }

    def losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Return the loss of each task."""
        images, digits, noise = batch
        labels = {"digit": digits, "odd": digits % 2, "noise": noise}
        features = self.body(images)
        return {task: F.cross_entropy(self.heads[task](features), labels[task]) for task in labels}

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses."""
        losses = self.losses(batch)
        return losses["digit"] + sum(self.weight[task] * losses[task] for task in self.weight)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss of the task that matters."""
        return self.losses(batch)["digit"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def train(*callbacks: L.Callback, steps: int) -> float:
    """Return the test error in percent."""
    L.seed_everything(0, verbose=False)
    *parts, test = split_digits(seed=0)
    train, validation = (
        TensorDataset(*part.tensors, torch.randint(10, (len(part),))) for part in parts
    )
    module = ThreeTasks()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[*callbacks], **QUIET)
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(validation, 200))
    for task, weight in module.weight.items():
        print(f"weight of {task:6} {weight:.2f}")
    return error_in_percent(nn.Sequential(module.body, module.heads["digit"]), test)


def main(steps: int = 600) -> None:
    silence_lightning()
    fixed, tuned = train(steps=steps), train(RTHO(), steps=steps)
    print(f"Test error: {fixed:.1f} % with the first weights, {tuned:.1f} % with tuned ones")
    print(f"Tuned / fixed: {tuned / fixed:.2f}")


if __name__ == "__main__":
    main()
