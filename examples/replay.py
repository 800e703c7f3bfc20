"""Learn a schedule once, then train along it again at the cost of plain training.

The second run ends with the same weights to the last bit. The third makes three times as many
steps, along the same schedule stretched.
"""

from pathlib import Path

import lightning as L
import torch
from data import digit_loaders, error_in_percent
from quickstart import Net
from quiet import QUIET, silence_lightning

from lightning_rtho import RTHO, ReplaySchedule

FILE = Path("schedule.json")


def train(callback: L.Callback, steps: int) -> torch.Tensor:
    """Return the weights, one after the other."""
    L.seed_everything(0, verbose=False)
    train, validation, test = digit_loaders()
    module = Net()
    trainer = L.Trainer(accelerator="cpu", max_steps=steps, callbacks=[callback], **QUIET)
    trainer.fit(module, train, validation)
    error = error_in_percent(module.net, test)
    print(f"{type(callback).__name__:14} {steps:5} steps: test error {error:.1f} %")
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def main(steps: int = 1000) -> None:
    silence_lightning()
    rtho = RTHO(["lr"])
    learned = train(rtho, steps)
    rtho.schedule.to_json(FILE)
    replayed = train(ReplaySchedule(FILE), steps)
    train(ReplaySchedule(FILE, stretch=3), 3 * steps)
    print(f"Largest difference of a replayed weight: {(replayed - learned).abs().max()}")


if __name__ == "__main__":
    main()
