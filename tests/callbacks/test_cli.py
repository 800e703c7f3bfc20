"""Every argument works from a YAML file, and the saved file reproduces the run."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from torch import optim

from lightning_rtho import RTHO, TRHO, Interval, Offload, Positive, ReplaySchedule
from tests.callbacks.problems import SmallNet, loader

EVERYTHING = {
    "hyperparameters": {
        "lr": {"class_path": "lightning_rtho.Positive"},
        "momentum": {
            "class_path": "lightning_rtho.Interval",
            "init_args": {"low": 0, "high": 1},
        },
    },
    "hyper_batch_size": 5,
    "outer_optimizer": {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 0.05}},
    "outer_batches": 2,
    "objective": {"class_path": "torchmetrics.MeanSquaredError"},
    "start_step": 5,
    "stop_step": 15,
    "summary": False,
    "diagnostics": ["hypergradient_cosine"],
}


class CommandLineNet(SmallNet):
    """A module that the command line can make."""

    def __init__(self, rate: float = 0.05) -> None:
        super().__init__(optim.SGD, lr=rate, momentum=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def train_dataloader(self) -> Any:
        return loader(20, seed=1, batch_size=4, shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(6, seed=2, batch_size=2)


def run(path: Path, callback: dict[str, Any] | None, config: Path | None = None) -> Any:
    if config is None:
        config = path / "written.yaml"
        trainer = {
            "accelerator": "cpu",
            "max_steps": 20,
            "default_root_dir": str(path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [callback],
        }
        config.write_text(yaml.safe_dump({"seed_everything": 7, "trainer": trainer}))
    cli = LightningCLI(
        CommandLineNet,
        args=["fit", "--config", str(config)],
        save_config_kwargs={"overwrite": True},
    )
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, (RTHO, TRHO, ReplaySchedule)))
    return found, Path(cli.trainer.log_dir or path) / "config.yaml"


@pytest.mark.parametrize(
    ("class_path", "own"),
    [
        ("lightning_rtho.RTHO", {"discount": 0.9}),
        (
            "lightning_rtho.TRHO",
            {"tape": {"class_path": "lightning_rtho.Offload", "init_args": {"device": "cpu"}}},
        ),
    ],
)
def test_yaml_sets_every_argument_and_the_saved_file_reproduces_the_run(class_path, own, tmp_path):
    callback = {"class_path": class_path, "init_args": {**EVERYTHING, **own}}
    first, saved = run(tmp_path, callback)
    assert [update.step for update in first.schedule] == [10, 15]
    assert first._selection == {"lr": Positive(), "momentum": Interval(0, 1)}
    assert first.hyperparameters["lr"] != 0.05
    assert first._metric is not None
    if isinstance(first, TRHO):
        assert isinstance(first.tape, Offload)
    else:
        assert first.discount == 0.9
    second, _ = run(tmp_path, None, saved)
    assert second.hyperparameters.keys() == first.hyperparameters.keys()
    for name, value in first.hyperparameters.items():
        assert torch.equal(second.hyperparameters[name], value)


@pytest.mark.parametrize("outer_optimizer", [None, "default"])
def test_yaml_may_name_settings_alone_and_observe(outer_optimizer, tmp_path):
    arguments: dict[str, Any] = {"hyperparameters": ["lr", "weight_decay"], "hyper_batch_size": 10}
    if outer_optimizer is None:
        arguments["outer_optimizer"] = None
    callback, _ = run(tmp_path, {"class_path": "lightning_rtho.RTHO", "init_args": arguments})
    assert len(callback.schedule) == 2
    assert (callback.hyperparameters["lr"] == 0.05) == (outer_optimizer is None)


def test_yaml_may_replay_a_schedule(tmp_path):
    arguments: dict[str, Any] = {"hyperparameters": ["lr"], "hyper_batch_size": 5}
    learned, _ = run(tmp_path, {"class_path": "lightning_rtho.RTHO", "init_args": arguments})
    path = tmp_path / "schedule.json"
    learned.schedule.to_json(path)
    arguments = {"schedule": str(path), "stretch": 2.0}
    callback = {"class_path": "lightning_rtho.ReplaySchedule", "init_args": arguments}
    replayed, _ = run(tmp_path, callback)
    halfway = learned.schedule.values_at(10)["lr"]  # of 20 steps, for which it would need 40
    assert torch.equal(replayed.hyperparameters["lr"], halfway)
