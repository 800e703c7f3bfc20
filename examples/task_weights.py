"""Weigh the tasks of a network that learns several: the loss weights are tuned."""

import lightning as L
import torch
from data import error_in_percent, split_digits
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rtho import RTHO, Hyperparameter, Positive


class Tasks(L.LightningModule):
    """Reads digits; two other tasks share its hidden layer, and one of them is nonsense."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.heads = nn.ModuleDict({
            "digit": nn.Linear(128, 10),
            "odd": nn.Linear(128, 2),
            "nonsense": nn.Linear(128, 2),
        })
        self.weight = {name: Hyperparameter(1.0, Positive()) for name in ("odd", "nonsense")}

    def losses(self, batch: list[Tensor]) -> dict[str, Tensor]:
        """Return the loss of each task."""
        images, digits, nonsense = batch
        targets = {"digit": digits, "odd": digits % 2, "nonsense": nonsense}
        features = self.body(images)
        return {
            name: F.cross_entropy(head(features), targets[name])
            for name, head in self.heads.items()
        }

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the weighted sum of the losses."""
        losses = self.losses(batch)
        return losses["digit"] + sum(w * losses[name] for name, w in self.weight.items())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss of the task that matters."""
        return self.losses(batch)["digit"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def main(steps: int = 600) -> None:
    silence_lightning()
    L.seed_everything(0, verbose=False)
    train, validation, test = split_digits(seed=0)
    for part in (train, validation):
        nonsense = torch.randint(2, (len(part),))
        part.tensors = (*part.tensors, nonsense)
    module, callback = Tasks(), RTHO()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[callback], **QUIET)
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(validation, 200))

    net = nn.Sequential(module.body, module.heads["digit"])
    print(f"Test error in %: {error_in_percent(net, test):.1f}")
    odd, nonsense = (w.item() for w in module.weight.values())
    print(f"Weight of the task odd or even {odd:.2g}, of the nonsense {nonsense:.2g}")
    print(f"Weight of the nonsense / weight of odd or even: {nonsense / odd:.3f}")


if __name__ == "__main__":
    main()
