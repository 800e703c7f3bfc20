"""A small smooth Lightning module, and fits of it with and without a callback."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_rtho import Hyperparameter, Real

TRAIN_SIZE, VAL_SIZE, FEATURES = 20, 6, 3


def loader(size: int, seed: int, batch_size: int, *, shuffle: bool = False) -> DataLoader:
    """Random regression data; the last feature is always zero, as MNIST's borders are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, FEATURES, generator=generator)
    x[:, -1] = 0
    y = torch.sin(x.sum(1, keepdim=True)) + 0.1 * torch.randn(size, 1, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


class SmallNet(L.LightningModule):
    """Tanh network; `settings` go to the optimizer, as numbers or as hyperparameters."""

    def __init__(
        self,
        optimizer: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        body: Callable[[], nn.Module] | None = None,
        l2: Any = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = (
            body() if body else nn.Sequential(nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, 1))
        )
        self.l2 = l2
        self.optimizer_class = optimizer
        self.settings = settings

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        loss = loss + self.l2 * sum(p.square().sum() for p in self.net.parameters())
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(self.net(x), y)
        self.log("val_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = dict(self.settings)
        if "beta1" in settings or "beta2" in settings:
            settings["betas"] = (settings.pop("beta1", 0.8), settings.pop("beta2", 0.9))
        return self.optimizer_class(self.net.parameters(), **settings)


class TwiceABatch(SmallNet):
    """Is stepped by hand, twice a batch, and logs its loss."""

    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for _ in range(2):
            loss = super().training_step(batch, batch_idx)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("loss", loss)


def fit(
    module: L.LightningModule,
    *callbacks: L.Callback,
    steps: int = 5,
    train: DataLoader | None = None,
    val: DataLoader | None = None,
    ckpt_path: Path | None = None,
    **trainer_settings: Any,
) -> L.Trainer:
    """Train for some optimizer steps on one device, quietly."""
    L.seed_everything(7, verbose=False)
    trainer = quiet_trainer(*callbacks, max_steps=steps, **trainer_settings)
    trainer.fit(
        module,
        loader(TRAIN_SIZE, seed=1, batch_size=4, shuffle=True) if train is None else train,
        loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE) if val is None else val,
        ckpt_path=ckpt_path,
    )
    return trainer


def quiet_trainer(*callbacks: L.Callback, **settings: Any) -> L.Trainer:
    """Make a trainer on one device that says, writes and validates nothing of itself."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 1,
        "check_val_every_n_epoch": 1000,
        "max_epochs": 1000,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **settings})


def validation_loss(module: L.LightningModule) -> float:
    """Loss on all validation data, in evaluation mode."""
    module.eval()
    with torch.no_grad():
        (batch,) = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)
        return F.mse_loss(module.net(batch[0]), batch[1]).item()


def finite_difference(
    value: float, loss_at: Callable[[float], float], *, relative_step: float = 1e-4
) -> float:
    """Derivative of `loss_at` by fourth-order central differences.

    The error is of order h^4 in truncation and eps / h in rounding: at a relative step of 1e-4
    both lie below 1e-10 of a smooth function's size.
    """
    h = relative_step * (abs(value) or 1.0)
    near = loss_at(value + h) - loss_at(value - h)
    far = loss_at(value + 2 * h) - loss_at(value - 2 * h)
    return (8 * near - far) / (12 * h)


def as_hyperparameters(settings: dict[str, float]) -> dict[str, Hyperparameter]:
    """Turn numbers into hyperparameters."""
    return {name: Hyperparameter(value, Real()) for name, value in settings.items()}
