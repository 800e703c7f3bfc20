"""Add the callback to a plain Lightning script: it tunes the learning rate."""

import lightning as L
import torch
from data import digit_loaders, error_in_percent
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO


class Net(L.LightningModule):
    """A small network that reads digits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the training loss."""
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the validation loss: what the callback minimizes."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Use Adam, with a learning rate 100 times too small."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-5)


def main() -> None:
    silence_lightning()
    L.seed_everything(0, verbose=False)
    train, validation, test = digit_loaders()
    module = Net()
    callback = RTHO(["lr"])
    trainer = L.Trainer(accelerator="cpu", max_steps=1000, callbacks=[callback], **QUIET)
    trainer.fit(module, train, validation)

    callback.schedule.plot().savefig("quickstart.png")
    print(f"Test error in %: {error_in_percent(module.net, test):.1f}")


if __name__ == "__main__":
    main()
