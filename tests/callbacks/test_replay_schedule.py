"""A replayed schedule gives the weights of the run that learned it, without its cost."""

import csv
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    Interval,
    KeepGraph,
    OuterUpdate,
    Positive,
    Real,
    ReplaySchedule,
    Schedule,
    load_hyperparameters,
)
from tests.callbacks.problems import FEATURES, SmallNet, fit
from tests.callbacks.test_checkpoint import ResumableLoader
from tests.callbacks.test_company import AVERAGES
from tests.callbacks.test_manual import Adversarial, ByHand
from tests.callbacks.test_schedulers import SCHEDULERS, Scheduled

STEPS = 14


class Grouped(SmallNet):
    """Two parameter groups, whose settings have no name of their own in the module."""

    def configure_optimizers(self) -> optim.Optimizer:
        first, _, last = self.net
        groups = [{"params": first.parameters(), "lr": 0.02}, {"params": last.parameters()}]
        return optim.Adam(groups, lr=0.01)


class Weighted(SmallNet):
    """A weight for each example of a batch."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.weights = Hyperparameter(torch.full((4, 1), 0.5), Interval(0, 1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return (self.weights[: len(x)] * (self.net(x) - y) ** 2).mean()


def noisy() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    )


def positive(value: float) -> Hyperparameter:
    return Hyperparameter(value, Positive())


SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}

CASES: dict[str, tuple[Callable[[], L.LightningModule], Any, dict[str, Any]]] = {
    "sgd, named": (lambda: SmallNet(**SGD), list(SGD), {}),
    "adam, declared": (
        lambda: SmallNet(
            optim.Adam, body=noisy, lr=positive(0.01), l2=positive(1e-3), weight_decay=0.01
        ),
        None,
        {},
    ),
    "betas": (lambda: SmallNet(optim.AdamW, lr=0.01), ["lr", "beta1", "beta2"], {}),
    "groups": (lambda: Grouped(lr=0.1), ["lr"], {}),
    "example weights": (Weighted, None, {}),
    "momentum from 0": (lambda: SmallNet(lr=0.1, momentum=0.0), ["lr", "momentum"], {}),
    "accumulation": (lambda: SmallNet(**SGD), ["lr"], {"accumulate_grad_batches": 2}),
    "clipping": (lambda: SmallNet(**SGD), ["lr"], {"gradient_clip_val": 0.1}),
    "bf16": (
        lambda: SmallNet(lr=positive(0.1), l2=positive(0.01)),
        None,
        {"precision": "bf16-true"},
    ),
    **{
        f"scheduler {name}": (lambda name=name: Scheduled(SCHEDULERS[name], lr=0.1), ["lr"], {})
        for name in ("cosine", "cyclic", "sequential", "swa")
    },
    "by hand": (lambda: ByHand(**SGD), ["lr"], {}),
    "two optimizers": (
        lambda: Adversarial(lr=positive(0.05), critic_lr=positive(0.02), weight=positive(0.3)),
        None,
        {},
    ),
}


def weights(module: L.LightningModule, trainer: L.Trainer) -> list[Tensor]:
    """Everything that training has changed."""
    states = [o.state_dict()["state"] for o in trainer.optimizers]
    buffers = [v for state in states for s in state.values() for v in s.values()]
    return [*module.state_dict().values(), *buffers, torch.get_rng_state()]


def assert_bitwise(found: list[Tensor], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@pytest.mark.parametrize(
    ("case", "suffix"), [*((case, "json") for case in CASES), ("adam, declared", "csv")]
)
def test_replay_gives_bitwise_the_weights_of_the_run_that_learned(case, suffix, tmp_path):
    torch.set_default_dtype(torch.float32)
    make, names, settings = CASES[case]
    method = RTHO(names, hyper_batch_size=3)
    learned = make()
    trainer = fit(learned, method, steps=STEPS, **settings)
    assert len(method.schedule) >= 2
    expected = weights(learned, trainer)
    path = tmp_path / f"schedule.{suffix}"
    (method.schedule.to_json if suffix == "json" else method.schedule.to_csv)(path)

    replayed, callback = make(), ReplaySchedule(path)
    trainer = fit(replayed, callback, steps=STEPS, **settings)
    assert_bitwise(weights(replayed, trainer), expected)
    for name, value in method.hyperparameters.items():
        assert torch.equal(callback.hyperparameters[name], value)

    plain = make()
    trainer = fit(plain, steps=STEPS, **settings)
    assert not torch.equal(weights(plain, trainer)[0], expected[0])


@pytest.mark.parametrize("tape", [None, KeepGraph()], ids=["recompute", "keep graph"])
def test_replay_follows_reverse_mode_with_dropout_and_statistics(tape):
    make = CASES["adam, declared"][0]
    method, learned = TRHO(hyper_batch_size=3, tape=tape), make()
    expected = weights(learned, fit(learned, method, steps=STEPS))
    replayed = make()
    trainer = fit(replayed, ReplaySchedule(method.schedule), steps=STEPS)
    assert_bitwise(weights(replayed, trainer), expected)


def test_values_of_the_module_are_ignored():
    method, learned = RTHO(hyper_batch_size=3), SmallNet(lr=positive(0.1), l2=positive(0.01))
    expected = weights(learned, fit(learned, method, steps=STEPS))
    replayed = SmallNet(lr=positive(0.7), l2=positive(0.3))
    trainer = fit(replayed, ReplaySchedule(method.schedule), steps=STEPS)
    assert_bitwise(weights(replayed, trainer), expected)


# Runs that were lost or chaotic

LOST: dict[str, Callable[[], L.LightningModule]] = {
    "sgd": lambda: SmallNet(lr=positive(30.0), momentum=Hyperparameter(0.9, Interval(0, 1))),
    "adam": lambda: SmallNet(optim.Adam, body=noisy, lr=positive(30.0), l2=positive(1e-3)),
    "scheduler": lambda: Scheduled(SCHEDULERS["exponential"], lr=positive(30.0)),
    "momentum from 0": lambda: SmallNet(lr=positive(30.0), momentum=Hyperparameter(0.0, Real())),
}


def actions(schedule: Schedule) -> set[str | None]:
    return {update.safeguard for update in schedule}


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize("method", [RTHO, TRHO])
@pytest.mark.parametrize("case", LOST)
def test_replay_goes_back_where_the_run_that_learned_did(method, case):
    callback, learned = method(hyper_batch_size=2), LOST[case]()
    expected = weights(learned, fit(learned, callback, steps=40))
    assert "restored" in actions(callback.schedule)
    assert None in actions(callback.schedule)
    replayed = LOST[case]()
    trainer = fit(replayed, ReplaySchedule(callback.schedule), steps=40)
    assert_bitwise(weights(replayed, trainer), expected)


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize("name", AVERAGES)
def test_replay_gives_the_averages_of_the_run_that_learned(name):
    learning = RTHO(["lr"], hyper_batch_size=7)
    learned, replayed = SmallNet(lr=1e6), SmallNet(lr=1e6)
    settings = {"steps": 80, "max_epochs": 16}
    fit(learned, learning, AVERAGES[name](), **settings)
    fit(replayed, ReplaySchedule(learning.schedule), AVERAGES[name](), **settings)
    for one, other in zip(learned.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_velocity_that_torch_does_not_keep_is_in_a_checkpoint_of_the_end(tmp_path):
    schedule = Schedule(start={"momentum": torch.tensor(0.0)})
    callback = ReplaySchedule(schedule)
    trainer = fit(SmallNet(lr=0.1), callback, steps=4)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    (state,) = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"].values()
    assert [sorted(buffers) for buffers in state["derivative_buffers"]] == [["momentum_buffer"]] * 4


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize("start_step", [0, 4])
def test_replay_follows_a_rate_that_was_lowered(start_step, monkeypatch):
    monkeypatch.setattr("lightning_rtho.callbacks._safeguard._CHAOS", 1e-3)
    callback = RTHO(["lr"], hyper_batch_size=3, start_step=start_step)
    learned = SmallNet(lr=0.05, momentum=0.5)
    expected = weights(learned, fit(learned, callback, steps=STEPS))
    assert actions(callback.schedule) == {"lowered"}
    replayed = SmallNet(lr=0.05, momentum=0.5)
    trainer = fit(replayed, ReplaySchedule(callback.schedule), steps=STEPS)
    assert_bitwise(weights(replayed, trainer), expected)


def returning_schedule() -> Schedule:
    """Goes back from step 6 to step 2, but for the rate."""
    rates = {2: 0.1, 4: 0.2, 6: 0.05}
    updates = [OuterUpdate(t, {"lr": torch.tensor(v)}, {}, 0.0) for t, v in rates.items()]
    updates[-1] = dataclasses.replace(updates[-1], safeguard="restored", restored_step=2)
    return Schedule(updates, start={"lr": torch.tensor(0.1)})


@pytest.mark.parametrize("stretch", [1, 1.5])
def test_going_back_is_going_back_to_the_state_of_that_step(stretch):
    there = SmallNet(optim.Adam, lr=0.1)
    trainer = fit(there, ReplaySchedule(returning_schedule(), stretch=stretch), steps=2 * stretch)
    expected = weights(there, trainer)[:-1]
    back = SmallNet(optim.Adam, lr=0.1)
    callback = ReplaySchedule(returning_schedule(), stretch=stretch)
    trainer = fit(back, callback, steps=6 * stretch)
    assert_bitwise(weights(back, trainer)[:-1], expected)
    assert callback.hyperparameters["lr"] == torch.tensor(0.05)
    assert not callback.state_dict()["snapshot"]  # it is not gone back to again


def test_where_there_is_no_state_to_go_back_to_it_is_said(tmp_path):
    update = dataclasses.replace(returning_schedule()[-1], restored_step=None)
    schedule = Schedule([update], start={"lr": torch.tensor(0.1)})
    with pytest.warns(UserWarning, match="went back to an earlier state at step 6, of which"):
        fit(SmallNet(lr=0.1), ReplaySchedule(schedule), steps=8)


# Longer runs


class Watching(L.Callback):
    """Takes down the learning rate of every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def known_schedule() -> Schedule:
    updates = [(2, 0.2), (4, 0.05)]
    return Schedule(
        [OuterUpdate(t, {"lr": torch.tensor(v)}, {}, 0.0) for t, v in updates],
        start={"lr": torch.tensor(0.1)},
    )


@pytest.mark.parametrize(
    ("stretch", "rates"),
    [
        (1, [0.1, 0.1, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05, 0.05]),  # held after the last update
        (2, [0.1, 0.1, 0.1, 0.1, 0.2, 0.2, 0.2, 0.2, 0.05]),  # twice as long a run
        (1.25, [0.1, 0.1, 0.1, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05]),
        (0.25, [0.1, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]),
    ],
)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_longer_runs_hold_or_stretch_the_schedule(stretch, rates, accumulate):
    watching = Watching()
    callback = ReplaySchedule(known_schedule(), stretch=stretch)
    fit(SmallNet(lr=0.3), callback, watching, steps=9, accumulate_grad_batches=accumulate)
    assert watching.rates == rates


@pytest.mark.parametrize("scheduler", ["exponential", "cyclic"])
def test_a_schedule_of_the_base_scales_the_scheduler(scheduler):
    watching, plain = Watching(), Watching()
    fit(Scheduled(SCHEDULERS[scheduler], lr=0.1), plain, steps=6)
    base = {"lr": torch.tensor(0.4)}
    schedule = Schedule([OuterUpdate(3, base, {}, 0.0)], start={"lr": torch.tensor(0.1)})
    fit(Scheduled(SCHEDULERS[scheduler], lr=0.1), watching, ReplaySchedule(schedule), steps=6)
    expected = [*plain.rates[:3], *(4 * rate for rate in plain.rates[3:])]
    assert watching.rates == pytest.approx(expected, rel=1e-12)  # a few products


# Checkpoints


def resumable(
    module: L.LightningModule, callback: L.Callback, path: Path, ckpt_path: Path | None = None
) -> list[Any]:
    """What 11 steps make of a module, with a checkpoint after each."""
    checkpoints = ModelCheckpoint(path, save_top_k=-1, every_n_train_steps=1, filename="{step}")
    L.seed_everything(7, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=11,
        max_epochs=-1,
        callbacks=[callback, checkpoints],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    if ckpt_path is not None:
        torch.load(ckpt_path, weights_only=True)  # Lightning 2.5 has no such argument
    trainer.fit(module, ResumableLoader(), ckpt_path=ckpt_path)
    return weights(module, trainer)[:-1]  # Lightning keeps no random state


@pytest.mark.parametrize("learning", [True, False], ids=["learned until there", "replayed"])
@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduler", "constant"])
@pytest.mark.parametrize("interrupted_at", [6, 8])
def test_replay_resumes_where_it_stood(learning, scheduled, interrupted_at, tmp_path):
    def make() -> SmallNet:
        if scheduled:
            return Scheduled(SCHEDULERS["exponential"], lr=positive(0.1), l2=positive(0.01))
        return SmallNet(optim.Adam, lr=positive(0.01), l2=positive(0.01))

    method = RTHO(hyper_batch_size=3, dataloader=ResumableLoader())
    expected = resumable(make(), method, tmp_path)
    folder = tmp_path
    if not learning:
        folder /= "replayed"
        found = resumable(make(), ReplaySchedule(method.schedule), folder)
        assert_bitwise(found, expected)
    (path,) = folder.glob(f"step={interrupted_at}.ckpt")
    found = resumable(make(), ReplaySchedule(method.schedule), tmp_path / "resumed", path)
    assert_bitwise(found, expected)


@pytest.mark.parametrize("interrupted_at", [1, 2, 3, 5, 6, 7])
def test_replay_resumes_around_a_return(interrupted_at, tmp_path):
    make = lambda: SmallNet(optim.Adam, lr=0.1)
    expected = resumable(make(), ReplaySchedule(returning_schedule()), tmp_path)
    (path,) = tmp_path.glob(f"step={interrupted_at}.ckpt")
    resumed = ReplaySchedule(returning_schedule())
    assert_bitwise(resumable(make(), resumed, tmp_path / "resumed", path), expected)


def test_a_checkpoint_holds_the_replayed_values(tmp_path):
    module = SmallNet(lr=0.1, l2=positive(0.01))
    schedule = Schedule(start={"l2": torch.tensor(0.4)})
    trainer = fit(module, ReplaySchedule(schedule), steps=3)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    fresh = SmallNet(lr=0.1, l2=positive(0.01))
    load_hyperparameters(fresh, torch.load(tmp_path / "m.ckpt", weights_only=True))
    assert fresh.l2.item() == 0.4


def test_values_are_logged_where_they_change(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(SmallNet(lr=0.3), ReplaySchedule(known_schedule()), steps=6, logger=logger)
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["hyperparameter/lr"]]
    found = {int(row["step"]): float(row["hyperparameter/lr"]) for row in rows}
    assert found == pytest.approx({0: 0.1, 2: 0.2, 4: 0.05}, rel=1e-6)  # the file rounds


def test_optimizers_are_given_back():
    trainer = fit(SmallNet(lr=0.3), ReplaySchedule(known_schedule()), steps=3)
    assert type(trainer.optimizers[0]) is optim.SGD


# Refusals


def test_two_that_move_hyperparameters_are_refused():
    with pytest.raises(MisconfigurationException, match="must be alone"):
        fit(SmallNet(lr=0.1), RTHO(["lr"]), ReplaySchedule(known_schedule()))


@pytest.mark.parametrize(
    ("module", "schedule", "error", "message"),
    [
        (
            lambda: SmallNet(lr=0.1),
            Schedule(start={"rate": torch.tensor(0.1)}),
            ValueError,
            "names 'rate'",
        ),
        (
            lambda: Grouped(lr=0.1),
            Schedule(start={"lr/pg1": torch.tensor(0.1)}),
            MisconfigurationException,
            "as many parameter groups",
        ),
        (
            Weighted,
            Schedule(start={"weights": torch.ones(5, 1)}),
            MisconfigurationException,
            r"of shape \(5, 1\)",
        ),
    ],
)
def test_a_schedule_of_another_module_is_refused(module, schedule, error, message):
    with pytest.raises(error, match=message):
        fit(module(), ReplaySchedule(schedule))


@pytest.mark.parametrize("stretch", [0, -1, float("nan")])
def test_stretch_is_positive(stretch):
    with pytest.raises(ValueError, match="`stretch` must be positive"):
        ReplaySchedule(known_schedule(), stretch=stretch)


def test_an_empty_schedule_is_refused():
    with pytest.raises(ValueError, match="must name hyperparameters"):
        ReplaySchedule(Schedule())


def test_learned_values_may_lie_outside_of_the_natural_domain():
    schedule = Schedule(start={"momentum": torch.tensor(-0.1)})
    callback = ReplaySchedule(schedule)
    fit(SmallNet(lr=0.1, momentum=0.5), callback, steps=2)
    assert callback.hyperparameters["momentum"] == -0.1
    assert Real().contains(callback.hyperparameters["momentum"])
