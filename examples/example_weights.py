"""Find wrong labels: `TRHO` tunes one weight for each training image."""

import lightning as L
import torch
from data import split_digits
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rtho import TRHO, Hyperparameter, Interval


class WeightedDigits(L.LightningModule):
    """Each training image has a weight in (0, 1), which starts at one half."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.net = nn.Linear(64, 10)
        self.weights = Hyperparameter(torch.full((images,), 0.5), Interval(0, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the weighted mean of the images' losses; a batch says which images they are."""
        images, labels, rows = batch
        losses = F.cross_entropy(self.net(images), labels, reduction="none")
        return (self.weights[rows] * losses).mean()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss on images whose labels are right."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-2)


def main(steps: int = 1000) -> None:
    silence_lightning()
    L.seed_everything(0, verbose=False)
    train, validation, _ = split_digits(seed=0)
    images, labels = train.tensors
    wrong = torch.arange(len(images)) % 3 == 0  # every third label
    noisy = torch.where(wrong, (labels + torch.randint(1, 10, labels.shape)) % 10, labels)
    train = TensorDataset(images, noisy, torch.arange(len(images)))
    module = WeightedDigits(len(images))
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[TRHO()], **QUIET)
    trainer.fit(module, DataLoader(train, 50, shuffle=True), DataLoader(validation, 600))

    suspects = module.weights.argsort()[: wrong.sum()]
    found = wrong[suspects].float().mean()
    print(f"Share of wrong labels among the {len(suspects)} images of least weight: {found:.3f}")


if __name__ == "__main__":
    main()
