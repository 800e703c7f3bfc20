"""Tune both learning rates of a small adversarial network that steps its optimizers by hand.

The generator draws the lower half of a digit from its upper half. Its loss is the squared error and
a weighted part that rewards it for fooling the critic; that weight is tuned, too.
"""

import lightning as L
import torch
from data import digit_loaders
from quiet import QUIET, silence_lightning
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import RTHO, Hyperparameter, Positive, stop_gradient


def network(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))


class Completion(L.LightningModule):
    """A generator, a critic and three hyperparameters."""

    automatic_optimization = False

    def __init__(self) -> None:
        super().__init__()
        self.generator = network(32, 32)
        self.critic = network(64, 1)
        self.generator_lr = Hyperparameter(1e-4, Positive())
        self.critic_lr = Hyperparameter(1e-4, Positive())
        self.fooling = Hyperparameter(0.1, Positive())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Update the critic, then the generator."""
        images, _ = batch
        upper, lower = images.chunk(2, dim=1)
        generator_optimizer, critic_optimizer = self.optimizers()

        drawn = stop_gradient(self.generator(upper))  # where a plain script has `.detach()`
        loss = F.softplus(self.score(upper, drawn)) + F.softplus(-self.score(upper, lower))
        critic_optimizer.zero_grad()
        self.manual_backward(loss.mean())
        critic_optimizer.step()

        drawn = self.generator(upper)
        fooled = F.softplus(-self.score(upper, drawn)).mean()
        generator_optimizer.zero_grad()
        self.manual_backward(F.mse_loss(drawn, lower) + self.fooling * fooled)
        generator_optimizer.step()

    def score(self, upper: Tensor, lower: Tensor) -> Tensor:
        """Return how real the critic takes the lower halves to be."""
        return self.critic(torch.cat([upper, lower], dim=1))

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the squared error of what is drawn: what the callback minimizes."""
        upper, lower = batch[0].chunk(2, dim=1)
        return F.mse_loss(self.generator(upper), lower)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Give each network an optimizer."""
        return [
            torch.optim.Adam(self.generator.parameters(), lr=self.generator_lr),
            torch.optim.Adam(self.critic.parameters(), lr=self.critic_lr),
        ]


def train(*callbacks: L.Callback, steps: int) -> float:
    """Return the squared error on test images."""
    L.seed_everything(0, verbose=False)
    train, validation, test = digit_loaders()
    module = Completion()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[*callbacks], **QUIET)
    trainer.fit(module, train, validation)
    with torch.no_grad():
        return module.validation_step(test.tensors, 0).item()


def main(steps: int = 1000) -> None:
    silence_lightning()
    callback = RTHO()
    fixed, tuned = train(steps=steps), train(callback, steps=steps)
    for name, value in callback.hyperparameters.items():
        print(f"{name:12} {value:.1e}")
    print(f"Squared error: {fixed:.4f} from the start's values, {tuned:.4f} tuned")
    print(f"Tuned / fixed: {tuned / fixed:.2f}")


if __name__ == "__main__":
    main()
