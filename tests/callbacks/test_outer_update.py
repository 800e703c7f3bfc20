"""Outer updates: how hyperparameters move, what is written down, what is shown."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import optim
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, Hyperparameter, Interval, KeepGraph, Positive, Schedule
from tests.callbacks.problems import (
    VAL_SIZE,
    SmallNet,
    finite_difference,
    fit,
    loader,
    validation_loss,
)

METHODS = {"rtho": RTHO, "trho": TRHO}


@pytest.mark.parametrize("method", METHODS)
def test_learning_rate_grows_where_it_is_too_small(method):
    # Three updates: so few that no rate climbs, whatever its hypergradient is.
    callback = METHODS[method](["lr"], hyper_batch_size=12)
    fit(SmallNet(lr=1e-5), callback, steps=40)
    values = [update.values["lr"].item() for update in callback.schedule]
    assert values == sorted(values)
    assert values[-1] > 5e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_rate_that_does_nothing_grows_by_a_factor_of_e_by_default_alone(method):
    start = {"lr": 1e-6, "l2": 0.01}
    settings = {"default": {}, "own": {"outer_optimizer": partial(optim.Adam, lr=0.2)}}
    factors = {}
    for name, setting in settings.items():
        module = SmallNet(lr=start["lr"], l2=Hyperparameter(start["l2"], Positive()))
        domains = {"lr": Positive(), "l2": Positive()}
        callback = METHODS[method](domains, hyper_batch_size=2, **setting)
        fit(module, callback, steps=2)
        (update,) = callback.schedule
        factors[name] = [(update.values[key] / old).item() for key, old in start.items()]
    # Adam's first step has its full length, but for its eps of 1e-8 beside a derivative of 1e-5.
    assert factors["default"][0] == pytest.approx(math.e, rel=1e-2)
    assert factors["own"][0] == pytest.approx(math.exp(0.2), rel=1e-2)
    assert factors["default"][1] == factors["own"][1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "outer_optimizer",
    [
        partial(optim.SGD, lr=0.1),
        partial(optim.RMSprop, lr=0.1),
        partial(optim.Adam, lr=0.1),
    ],
    ids=["sgd", "rmsprop", "adam"],
)
def test_any_torch_optimizer_moves_them_against_the_hypergradient(method, outer_optimizer):
    module = SmallNet(lr=Hyperparameter(0.01, Positive()), l2=Hyperparameter(0.01, Positive()))
    callback = METHODS[method](hyper_batch_size=3, outer_optimizer=outer_optimizer)
    fit(module, callback, steps=3)
    (update,) = callback.schedule
    for name, value in update.values.items():
        assert (value - 0.01).sign() == -update.hypergradients[name].sign()
        assert value == callback.hyperparameters[name]
    assert module.l2.item() == callback.hyperparameters["l2"]


class _Along(L.Callback):
    """Gives the optimizer the settings of a schedule, by hand."""

    def __init__(self, values):
        self.values = values

    def on_train_batch_end(self, trainer, *args):
        trainer.optimizers[0].param_groups[0].update(self.values.get(trainer.global_step, {}))


def test_hypergradients_on_the_way_are_by_a_shift_of_all_raw_values_so_far():
    """Against plain runs along the same schedule, shifted in the coordinates that are moved."""
    start = {"lr": 0.02, "momentum": 0.6}
    callback = RTHO(["lr", "momentum"], hyper_batch_size=2, safeguard=False)
    fit(SmallNet(**start), callback, steps=10)
    past = {0: start} | {
        u.step: {name: value.item() for name, value in u.values.items()} for u in callback.schedule
    }
    del past[10]
    assert past[8]["lr"] > 1.4 * past[0]["lr"]  # so far that the coordinates matter

    def loss_at(shift, name):
        def shifted(values):
            lr, momentum = values["lr"], values["momentum"]
            lasting, logit = math.log(lr / (1 - momentum)), math.log(momentum / (1 - momentum))
            lasting, logit = lasting + shift * (name == "lr"), logit + shift * (name != "lr")
            momentum = 1 / (1 + math.exp(-logit))
            return {"lr": math.exp(lasting) * (1 - momentum), "momentum": momentum}

        module = SmallNet(**shifted(past[0]))
        fit(module, _Along({step: shifted(values) for step, values in past.items()}), steps=10)
        return validation_loss(module)

    lr, momentum = past[8].values()
    by_lr, by_momentum = (callback.hypergradients[name].item() for name in past[0])
    found = [lr * by_lr, (by_momentum - by_lr * lr / (1 - momentum)) * momentum * (1 - momentum)]
    expected = [finite_difference(0.0, partial(loss_at, name=name)) for name in past[0]]
    assert found == pytest.approx(expected, rel=1e-7)  # ten steps, differences of fourth order


def test_values_stay_in_their_domains():
    module = SmallNet(momentum=Hyperparameter(0.9, Interval(0, 1)), lr=0.1)
    callback = RTHO(hyper_batch_size=1, outer_optimizer=lambda raw: optim.SGD(raw, lr=1e6))
    fit(module, callback, steps=20)
    assert all(0 < update.values["settings.momentum"] < 1 for update in callback.schedule)


def test_example_weights_of_any_shape_are_tuned():
    class Weighted(SmallNet):
        def __init__(self) -> None:
            super().__init__(lr=0.1)
            self.weights = Hyperparameter(torch.full((4, 1), 0.5), Interval(0, 1))

        def training_step(self, batch, batch_idx):
            x, y = batch
            return (self.weights[: len(x)].sigmoid() * (self.net(x) - y) ** 2).mean()

    found = {}
    for name, callback in {
        "forward": RTHO(hyper_batch_size=4, outer_optimizer=None),
        "reverse": TRHO(hyper_batch_size=4, outer_optimizer=None),
        "kept": TRHO(hyper_batch_size=4, outer_optimizer=None, tape=KeepGraph()),
    }.items():
        fit(Weighted(), callback, steps=4)
        found[name] = callback.hypergradients["weights"]
        assert found[name].shape == (4, 1)
        assert (found[name] != 0).all()
    # One method against the other: rounding alone is between them.
    torch.testing.assert_close(found["forward"], found["reverse"], rtol=1e-10, atol=1e-15)
    assert torch.equal(found["reverse"], found["kept"])


@pytest.mark.parametrize("method", METHODS)
def test_hypergradient_that_is_not_finite_skips_the_update_and_says_so_once(method):
    class Overflowing(SmallNet):
        def validation_step(self, batch, batch_idx):
            loss = super().validation_step(batch, batch_idx)
            return loss * float("inf") if 2 < self.global_step <= 6 else loss

    callback = METHODS[method](["lr"], hyper_batch_size=2)
    module = Overflowing(lr=0.1)
    with pytest.warns(UserWarning, match="outer objective .* not finite at step 4") as warned:
        fit(module, callback, steps=10)
    assert len([w for w in warned if "not finite" in str(w.message)]) == 1
    assert [update.step for update in callback.schedule] == [2, 8, 10]
    assert all(update.hypergradients["lr"].isfinite() for update in callback.schedule)
    assert all(p.isfinite().all() for p in module.parameters())


def test_every_logger_gets_every_update(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path)]
    callback = RTHO(["lr", "momentum"], hyper_batch_size=3)
    fit(
        SmallNet(lr=0.1, momentum=0.5),
        callback,
        steps=9,
        logger=loggers,
        accumulate_grad_batches=2,
    )
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    expected = {
        "outer_objective": [u.outer_objective for u in callback.schedule],
        **{
            f"hyperparameter/{name}": [u.values[name].item() for u in callback.schedule]
            for name in ("lr", "momentum")
        },
        **{
            f"hypergradient/{name}": [u.hypergradients[name].item() for u in callback.schedule]
            for name in ("lr", "momentum")
        },
    }
    for tag, values in expected.items():
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [3, 6, 9]
        # TensorBoard keeps float32.
        assert [s.value for s in scalars] == pytest.approx(values, rel=1e-6)
    loggers[1].save()
    text = Path(loggers[1].log_dir, "metrics.csv").read_text()
    assert all(tag in text.splitlines()[0] for tag in expected)


def test_values_are_on_the_progress_bar_and_can_be_monitored(tmp_path):
    seen: list[dict[str, Any]] = []

    class Watching(TQDMProgressBar):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            seen.append(self.get_metrics(trainer, trainer.lightning_module))

    checkpoint = ModelCheckpoint(tmp_path, monitor="outer_objective", every_n_train_steps=4)
    callback = RTHO(["lr"], hyper_batch_size=4)  # an epoch has 5 steps
    trainer = fit(
        SmallNet(lr=0.1),
        callback,
        Watching(),
        checkpoint,
        steps=8,
        enable_progress_bar=True,
        enable_checkpointing=True,
    )
    assert "hyperparameter/lr" not in seen[0]
    assert all("hyperparameter/lr" in metrics for metrics in seen[3:])
    assert trainer.callback_metrics["hyperparameter/lr"] == callback.hyperparameters["lr"]
    assert checkpoint.best_model_score.item() == pytest.approx(
        min(u.outer_objective for u in callback.schedule if u.step % 4 == 0)
    )


def test_outer_step_takes_the_place_of_validation_step():
    class WithOuterStep(SmallNet):
        def outer_step(self, batch, batch_idx):
            assert not self.training
            return (self.net(batch[0]) - batch[1]).abs().mean()

    callback = RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None)
    module = WithOuterStep(lr=0.1)
    fit(module, callback, steps=2)
    (batch,) = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)
    expected = F.l1_loss(module.net(batch[0]), batch[1]).item()
    assert callback.schedule[-1].outer_objective == pytest.approx(expected, rel=1e-12)


def test_own_dataloader_and_several_batches_are_averaged():
    data = loader(6, seed=5, batch_size=2)
    callback = RTHO(
        ["lr"], hyper_batch_size=2, outer_optimizer=None, dataloader=data, outer_batches=3
    )
    module = SmallNet(lr=0.1)
    fit(module, callback, steps=2)
    module.eval()
    expected = sum(F.mse_loss(module.net(x), y).item() for x, y in data) / 3
    assert callback.schedule[-1].outer_objective == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "settings",
    [
        {"fast_dev_run": 3},
        {"barebones": True, "enable_checkpointing": None, "logger": None,
         "enable_progress_bar": None, "enable_model_summary": None, "num_sanity_val_steps": None},
        {"enable_progress_bar": True},
        {"accumulate_grad_batches": 7},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_trainer_flags_do_no_harm(settings):
    plain, observed = SmallNet(lr=0.1), SmallNet(lr=0.1)
    fit(plain, steps=4, **settings)
    callback = TRHO(["lr"], hyper_batch_size=2, outer_optimizer=None)
    fit(observed, callback, steps=4, **settings)
    assert callback.schedule
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_other_trainer_verbs_ignore_the_callback():
    callback = RTHO(["lr"], hyper_batch_size=2)
    module = SmallNet(lr=0.1)
    trainer = L.Trainer(
        accelerator="cpu", logger=False, callbacks=[callback], enable_progress_bar=False
    )
    trainer.validate(module, loader(4, 1, 2), verbose=False)
    assert callback.hyperparameters == {}
    assert callback.hypergradients == {}


def test_run_too_short_for_an_update_says_so():
    with pytest.warns(UserWarning, match="RTHO made no update in 3 followed steps"):
        fit(SmallNet(lr=0.1), RTHO(["lr"], hyper_batch_size=10), steps=3)


class Arguments(SmallNet):
    """Keeps its hyperparameters where `save_hyperparameters` does, and nowhere else."""

    def __init__(self, lr: Any, l2: Any) -> None:
        super().__init__(optim.SGD)
        self.save_hyperparameters()
        del self.l2

    def __getattr__(self, name: str) -> Any:
        return self.hparams["l2"] if name == "l2" else super().__getattr__(name)

    def configure_optimizers(self):
        return optim.SGD(self.net.parameters(), lr=self.hparams.lr)


def test_hyperparameters_that_stand_in_hparams_alone_are_found():
    make = lambda: Arguments(Hyperparameter(0.1, Positive()), Hyperparameter(0.01, Positive()))
    callback = RTHO(hyper_batch_size=2)
    fit(make(), callback, steps=4)
    assert set(callback.hyperparameters) == {"hparams.lr", "hparams.l2"}
    start = callback.schedule.start
    assert all(value != start[name] for name, value in callback.hyperparameters.items())
    with pytest.raises(ValueError, match=r"Name that one: hparams\.lr"):
        fit(make(), RTHO(["lr"]), steps=1)
    fit(make(), RTHO(["hparams.lr"]), steps=1)


class LogsThem(SmallNet):
    """Takes one as an argument, keeps a record of its arguments, logs them everywhere."""

    def __init__(self, rate: Any) -> None:
        super().__init__(optim.SGD)
        self.save_hyperparameters()
        self.rate = rate
        self.l2 = Hyperparameter(0.01, Positive())

    def training_step(self, batch, batch_idx):
        self.log("rate", self.rate, prog_bar=True)
        self.log("double", self.l2 * 2, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.log("l2", self.l2)
        return super().validation_step(batch, batch_idx)

    def configure_optimizers(self):
        return optim.SGD(self.parameters(), lr=self.rate)


@pytest.mark.parametrize("callbacks", [[], [RTHO(hyper_batch_size=4)]], ids=["without", "with"])
def test_hyperparameters_may_be_arguments_and_be_logged(callbacks, tmp_path):
    module = LogsThem(Hyperparameter(0.2, Positive()))
    checkpoint = ModelCheckpoint(tmp_path)
    trainer = fit(
        module,
        *callbacks,
        checkpoint,
        steps=12,
        logger=CSVLogger(tmp_path),
        enable_checkpointing=True,
        check_val_every_n_epoch=1,
        log_every_n_steps=1,
    )
    metrics = trainer.callback_metrics
    assert metrics["rate"] == pytest.approx(module.rate.item(), rel=0.1)
    assert metrics["double"] == pytest.approx(2 * metrics["l2"].item(), rel=0.1)
    if callbacks:
        assert set(callbacks[0].hyperparameters) == {"rate", "l2"}
    loaded = LogsThem.load_from_checkpoint(checkpoint.best_model_path)
    assert loaded.rate.domain == Positive()


def test_schedule_of_a_run_can_be_kept(tmp_path):
    callback = RTHO(["lr"], hyper_batch_size=2)
    fit(SmallNet(lr=0.1), callback, steps=6)
    callback.schedule.to_json(tmp_path / "schedule.json")
    kept = Schedule.load(tmp_path / "schedule.json")
    assert kept.steps == [2, 4, 6]
    assert kept.values_at(1)["lr"].item() == pytest.approx(0.1)
    assert kept.values_at(6)["lr"] == callback.hyperparameters["lr"]
    assert kept.domains["lr"] == "Positive()"
