"""Train from a YAML file by `LightningCLI`: it names the hyperparameters and the callback.

python examples/cli.py fit --config examples/cli.yaml
python examples/cli.py fit --config examples/cli.yaml --model.lr.init_args.value 0.1
"""

import lightning as L
import torch
from data import digit_loaders, error_in_percent
from lightning.pytorch.cli import LightningCLI
from quiet import silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rtho import Hyperparameter


class Digits(L.LightningDataModule):
    """Digits of scikit-learn."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.train, self.validation, self.test = digit_loaders(seed)

    def train_dataloader(self) -> DataLoader:
        """Return batches to train on."""
        return self.train

    def val_dataloader(self) -> DataLoader:
        """Return batches to validate on."""
        return self.validation


class Net(L.LightningModule):
    """A small network; a number in the file is fixed, a `Hyperparameter` is tuned."""

    def __init__(self, lr: float | Hyperparameter, l2: float | Hyperparameter) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.lr, self.l2 = lr, l2

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss, L2 penalty included."""
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return self.validation_step(batch, batch_idx) + self.l2 * penalty

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam."""
        return torch.optim.Adam(self.net.parameters(), lr=self.lr)


def main() -> None:
    silence_lightning()
    cli = LightningCLI(Net, Digits, seed_everything_default=0, save_config_callback=None)
    print(f"Test error in %: {error_in_percent(cli.model.net, cli.datamodule.test):.1f}")


if __name__ == "__main__":
    main()
