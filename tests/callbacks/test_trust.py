"""An observing callback leaves training bitwise as it was."""

import random
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger
from torch import nn, optim

from lightning_rtho import RTHO, TRHO, Hyperparameter, Interval, KeepGraph, Positive
from tests.callbacks.problems import FEATURES, SmallNet, fit, loader

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": optim.SGD, "lr": 0.1, "momentum": 0.9},
    "adam": {"optimizer": optim.Adam, "lr": 0.01},
}
TRAINERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "clipping": {"gradient_clip_val": 0.2},
    "value clipping": {
        "gradient_clip_val": 0.1,
        "gradient_clip_algorithm": "value",
        "accumulate_grad_batches": 2,
    },
}
OBSERVERS = {
    "rtho": lambda: RTHO(hyper_batch_size=3, outer_optimizer=None),
    "trho": lambda: TRHO(hyper_batch_size=3, outer_optimizer=None),
    "trho keeping graphs": lambda: TRHO(hyper_batch_size=3, outer_optimizer=None, tape=KeepGraph()),
}


class Busy(SmallNet):
    """Draws random numbers, normalizes by batch, keeps metrics, lists and counters, logs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            body=lambda: nn.Sequential(
                nn.Linear(FEATURES, 4),
                nn.BatchNorm1d(4),
                nn.Tanh(),
                nn.Dropout(0.3),
                nn.Linear(4, 1),
            ),
            **kwargs,
        )
        self.idle = nn.Linear(2, 2)
        self.train_error = torchmetrics.MeanSquaredError()
        self.val_error = torchmetrics.MeanSquaredError()
        self.seen: list[int] = []
        self.count = 0
        self.epoch_logs: list[tuple[str, float]] = []

    def training_step(self, batch, batch_idx):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        loss = super().training_step((batch[0] + 1e-3 * noise, batch[1]), batch_idx)
        self.train_error(self.net(batch[0]), batch[1])
        self.log("train_error", self.train_error)
        self.seen.append(batch_idx)
        self.count += 1
        return {"loss": loss, "noise": noise}

    def validation_step(self, batch, batch_idx):
        loss = super().validation_step(batch, batch_idx) + 1e-3 * torch.rand(())
        self.val_error.update(self.net(batch[0]), batch[1])
        self.log("val_error", self.val_error)
        self.seen.append(-batch_idx - 1)
        self.count += 1
        return loss

    def on_validation_epoch_end(self):
        self.epoch_logs.append(("seen", float(len(self.seen))))


def everything(module: Busy, trainer: L.Trainer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of the run by name, and everything else."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    state = trainer.optimizers[0].state_dict()["state"]
    tensors |= {f"optimizer.{i}.{k}": v for i, s in state.items() for k, v in s.items()}
    tensors["rng.torch"] = torch.get_rng_state()
    tensors |= {f"grad.{n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    others = {
        "seen": module.seen,
        "count": module.count,
        "logs": module.epoch_logs,
        "rng.python": random.getstate(),
        "rng.numpy": np.random.get_state()[1].tolist(),
        "groups": trainer.optimizers[0].state_dict()["param_groups"],
    }
    return tensors, others


def read_metrics(trainer: L.Trainer) -> list[str]:
    """The lines that the CSV logger wrote, without the columns and rows of the callback."""
    import csv
    from pathlib import Path

    with (Path(trainer.logger.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = ("hyperparameter/", "hypergradient/", "outer_objective", "sensitivity", "safeguard/")
    kept = [{k: v for k, v in row.items() if v and not k.startswith(ours)} for row in rows]
    return [str(sorted(row.items())) for row in kept if set(row) - {"step", "epoch"}]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("trainer_settings", TRAINERS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_observing_changes_nothing(observer, trainer_settings, settings, tmp_path):
    torch.set_default_dtype(torch.float32)
    runs = []
    for callbacks in ([], [OBSERVERS[observer]()]):
        module = Busy(**{**SETTINGS[settings], "l2": Hyperparameter(0.01, Positive())})
        module.rate = module.settings["lr"] = Hyperparameter(module.settings["lr"], Positive())
        trainer = fit(
            module,
            *callbacks,
            steps=9,
            val=loader(6, seed=2, batch_size=2, shuffle=True),
            check_val_every_n_epoch=1,
            limit_val_batches=1.0,
            num_sanity_val_steps=1,
            val_check_interval=2,
            log_every_n_steps=1,
            logger=CSVLogger(tmp_path, name=f"run{len(runs)}"),
            **TRAINERS[trainer_settings],
        )
        trainer.logger.save()
        runs.append((*everything(module, trainer), read_metrics(trainer)))
    (plain, plain_others, plain_metrics), (observed, observed_others, observed_metrics) = runs
    assert plain.keys() == observed.keys()
    different = [name for name in plain if not torch.equal(plain[name], observed[name])]
    assert different == []
    assert plain_others == observed_others
    assert plain_metrics == observed_metrics
    assert len(plain_metrics) > 9
    assert len(callbacks[0].schedule) == 3


@pytest.mark.parametrize("settings", SETTINGS)
def test_hyperparameters_train_as_the_plain_numbers_do(settings):
    torch.set_default_dtype(torch.float32)
    weights = []
    for wrap in (lambda v: v, lambda v: Hyperparameter(v, Positive())):
        chosen = {k: v if k == "optimizer" else wrap(v) for k, v in SETTINGS[settings].items()}
        module = Busy(**chosen, l2=wrap(0.01))
        fit(module, steps=9)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_nothing_is_done_before_start_step_and_after_stop_step():
    callback = RTHO(["lr"], hyper_batch_size=1, start_step=3, stop_step=6)
    module = SmallNet(lr=0.1)
    fit(module, callback, steps=9)
    assert [update.step for update in callback.schedule] == [4, 5, 6]


def test_following_from_start_step_sees_the_run_from_there_alone():
    late = RTHO(["lr"], hyper_batch_size=5, start_step=4, outer_optimizer=None)
    fit(SmallNet(lr=0.1), late, steps=9)
    window = TRHO(["lr"], hyper_batch_size=5, start_step=4, outer_optimizer=None)
    fit(SmallNet(lr=0.1), window, steps=9)
    # The two methods round differently; nothing else is between them.
    torch.testing.assert_close(late.hypergradients, window.hypergradients, rtol=1e-12, atol=0)


def test_fit_that_fails_leaves_no_trace():
    class Failing(SmallNet):
        def on_train_batch_end(self, *args: Any) -> None:
            if self.global_step == 3:
                raise KeyError("on purpose")

    module = Failing(lr=0.1, momentum=Hyperparameter(0.5, Interval(0, 1)))
    callback = TRHO(hyper_batch_size=10, tape=KeepGraph())
    with pytest.raises(KeyError):
        fit(module, callback, steps=9)
    assert "backward" not in vars(module)
    assert not module.settings["momentum"].requires_grad
    weight = torch.ones(2, requires_grad=True)
    square = weight.square().sum()
    with torch.no_grad():
        weight.add_(1)  # would be allowed while saved tensors are hooked
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


def test_second_fit_starts_afresh_with_the_tuned_values():
    module = SmallNet(lr=Hyperparameter(0.1, Positive()))
    callback = RTHO(hyper_batch_size=2)
    fit(module, callback, steps=4)
    tuned = module.settings["lr"].item()
    assert tuned != 0.1
    trainer = fit(module, callback, steps=4)
    assert len(callback.schedule) == 2
    assert type(trainer.optimizers[0]) is optim.SGD
    assert trainer.optimizers[0].param_groups[0]["lr"] == module.settings["lr"].item()


class SetsBuffer(SmallNet):
    """Replaces a buffer in validation, by a tensor of inference mode."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.register_buffer("last", torch.zeros(1))

    def validation_step(self, batch, batch_idx):
        self.last = batch[1].mean().reshape(1)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("observer", OBSERVERS)
def test_buffers_of_inference_mode_do_no_harm(observer):
    callback = OBSERVERS[observer]()
    callback._selection = ["lr"]
    fit(SetsBuffer(lr=0.1), callback, steps=9, check_val_every_n_epoch=1)
    assert len(callback.schedule) == 3
