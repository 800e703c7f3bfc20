"""Runs that are chaotic or lost: what the callback does with them, and that it does no harm."""

import copy
import csv
import itertools
import math
import warnings

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler
from lightning.pytorch.loggers import CSVLogger
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset

from lightning_rtho import RTHO, TRHO, Hyperparameter, Interval, Positive
from lightning_rtho.callbacks._coupling import decoupled_coordinates
from lightning_rtho.callbacks._snapshot import distance_from, restore_snapshot, take_snapshot
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import adam, relative_slopes
from tests.callbacks.problems import (
    FEATURES,
    TRAIN_SIZE,
    SmallNet,
    fit,
    loader,
    validation_loss,
)
from tests.callbacks.test_checkpoint import final, run

METHODS = {"forward": RTHO, "reverse": TRHO}
each_method = pytest.mark.parametrize("method", METHODS)
quiet = pytest.mark.filterwarnings("ignore:At step")


def actions(callback):
    return [update.safeguard for update in callback.schedule]


# Lost runs


@each_method
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam])
def test_a_rate_that_destroys_the_network_is_survived(method, optimizer):
    start = validation_loss(SmallNet())
    found = {}
    for safeguard in (True, False):
        callback = METHODS[method](["lr"], hyper_batch_size=2, safeguard=safeguard)
        module = SmallNet(optimizer, lr=30.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, callback, steps=60)
        found[safeguard] = validation_loss(module), callback
    assert found[True][0] < start
    assert not found[False][0] < start
    assert "restored" in actions(found[True][1])
    assert set(actions(found[False][1])) <= {None}


@quiet
@each_method
def test_going_back_is_exact_and_divides_the_rate_by_ten(method):
    """With an update after each step, the first is lost: the run stands where it began."""
    begin = SmallNet(optim.SGD, lr=1e6, momentum=0.9)
    callback = METHODS[method](["lr"], hyper_batch_size=1)
    module = SmallNet(optim.SGD, lr=1e6, momentum=0.9)
    trainer = fit(module, callback, steps=1)
    assert actions(callback) == ["restored"]
    for one, other in zip(module.parameters(), begin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not trainer.optimizers[0].state
    assert callback.hyperparameters["lr"].item() == pytest.approx(1e6 / 10, rel=1e-12)
    assert trainer.optimizers[0].param_groups[0]["lr"] == callback.hyperparameters["lr"].item()
    assert callback.hypergradients["lr"].isnan()


def test_it_is_said_once_and_counted_in_the_log(tmp_path):
    callback = RTHO(["lr"], hyper_batch_size=1)
    with pytest.warns(UserWarning, match="went back to its best state") as warned:
        fit(SmallNet(lr=1e6), callback, steps=4, logger=CSVLogger(tmp_path))
    assert sum("went back" in str(w.message) for w in warned) == 1
    assert actions(callback) == ["restored"] * 4
    (log,) = tmp_path.rglob("metrics.csv")
    with log.open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["safeguard/restored"]) for row in rows] == [1, 2, 3, 4]


@quiet
def test_the_schedule_goes_on_from_the_lower_base():
    class Scheduled(SmallNet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [
                {"scheduler": optim.lr_scheduler.ExponentialLR(optimizer, 0.5), "interval": "step"}
            ]

    callback = RTHO(["lr"], hyper_batch_size=1)
    trainer = fit(Scheduled(lr=1e6), callback, steps=2)
    assert actions(callback) == ["restored"] * 2
    # One halving a step, one tenth a step back.
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate == pytest.approx(1e6 / 100 / 4, rel=1e-12)


@quiet
def test_without_a_rate_only_moved_hyperparameters_go_back():
    """The first update finds the start's values: what was lost is not their doing."""
    module = SmallNet(lr=1e3, l2=Hyperparameter(0.01, Positive()))
    callback = RTHO(["l2"], hyper_batch_size=1)
    fit(module, callback, steps=1)
    assert "restored" not in actions(callback)

    class Jumping(SmallNet):
        """Learns for three steps, then is destroyed by an outer step."""

    module = Jumping(lr=0.1, l2=Hyperparameter(0.01, Positive()))
    callback = RTHO(["l2"], hyper_batch_size=1, outer_optimizer=lambda raw: Leap(raw, at=3))
    fit(module, callback, steps=8)
    assert "restored" in actions(callback)
    assert callback.hyperparameters["l2"].item() < 1


class Leap(optim.SGD):
    """Descends, but for one step that leads far up."""

    def __init__(self, params, at):
        super().__init__(params, lr=0.01)
        self.calls, self.at = 0, at

    def step(self, closure=None):
        super().step(closure)
        self.calls += 1
        if self.calls == self.at:
            with torch.no_grad():
                self.param_groups[0]["params"][0] += 15


@each_method
def test_noisy_data_do_not_send_a_good_run_back(method):
    class Noisy(SmallNet):
        def validation_step(self, batch, batch_idx):
            noise = 1.0 if self.global_step in (0, 1) else 3.0
            return noise * super().validation_step(batch, batch_idx)

    callback = METHODS[method](["lr"], hyper_batch_size=1)
    fit(Noisy(lr=0.01), callback, steps=6)
    assert actions(callback) == [None] * 6


# Rates that climb, in reverse mode


class StopAfter(L.Callback):
    """Ends a run early that was to be longer."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.global_step >= self.step


def rates(callback):
    """The rate at the start and after each update."""
    values = [callback.schedule.start["lr"], *(u.values["lr"] for u in callback.schedule)]
    return [value.item() for value in values]


class Regressor(SmallNet):
    """Has predictions for a metric."""

    def forward(self, x):
        return self.net(x)


def climbing_run(*others, callback=None, steps=120, lr=1e-3, **settings):
    callback = callback or TRHO(["lr", "momentum"], hyper_batch_size=2)
    module = Regressor(optim.SGD, lr=lr, momentum=0.5)
    trainer = fit(module, callback, *others, steps=steps, **settings)
    return module, callback, trainer


def test_a_rate_climbs_until_the_run_is_lost_and_begins_again_with_a_tenth(recwarn, caplog):
    with caplog.at_level("INFO", "lightning.pytorch"):
        _, callback, _ = climbing_run()
    lost = actions(callback).index("restored")
    values = rates(callback)
    # What acts is lr / (1 - momentum).
    momenta = [0.5, *(u.values["momentum"].item() for u in callback.schedule)]
    steps = [value / (1 - momentum) for value, momentum in zip(values, momenta, strict=True)]
    assert lost > 4
    for before, after in itertools.pairwise(steps[1 : lost + 1]):
        assert after / before == pytest.approx(math.e, rel=1e-5)  # rounding of float32
    assert callback.schedule[lost].restored_step == 0
    assert values[lost + 1] == pytest.approx(values[lost] / 10, rel=1e-6)
    assert momenta[lost] != momenta[lost + 1] == 0.5
    for before, after in itertools.pairwise(steps[lost + 1 :]):
        assert abs(math.log(after / before)) < 0.5  # ordinary steps from there
    step = callback.schedule[lost].step
    assert f"climbed until the run was lost, at step {step};" in caplog.text
    assert not [w for w in recwarn if "At step" in str(w.message)]  # it was no accident


def test_an_accident_after_the_climb_is_said():
    class Spoiled(L.Callback):
        """Destroys the weights when the run has learned."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 100:
                with torch.no_grad():
                    pl_module.net[0].weight.mul_(1e3)

    with pytest.warns(UserWarning, match="At step 102 the weights had moved by"):
        _, callback, _ = climbing_run(Spoiled())
    assert actions(callback).count("restored") == 2


def test_a_rate_that_loses_the_run_before_it_has_climbed_is_warned_of(caplog):
    with (
        caplog.at_level("INFO", "lightning.pytorch"),
        pytest.warns(UserWarning, match="At step 2 the outer objective"),
    ):
        _, callback, _ = climbing_run(lr=1e3)
    assert actions(callback)[0] == "restored"
    assert rates(callback)[1] == pytest.approx(1e3 / 10, rel=1e-6)
    assert "climbed" not in caplog.text


def test_after_the_climb_the_run_stands_where_it_began():
    _, callback, _ = climbing_run()
    step = callback.schedule[actions(callback).index("restored")].step
    begin = SmallNet(optim.SGD, lr=1e-3, momentum=0.5)
    module, _, trainer = climbing_run(StopAfter(step))
    assert trainer.global_step == step
    for one, other in zip(module.parameters(), begin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not trainer.optimizers[0].state


@quiet
@pytest.mark.parametrize(
    "callback",
    [
        RTHO(["lr", "momentum"], hyper_batch_size=2),
        TRHO(["lr", "momentum"], hyper_batch_size=2, safeguard=False),
        TRHO(["lr", "momentum"], hyper_batch_size=2, objective=torchmetrics.R2Score()),
        TRHO(["lr", "momentum"], hyper_batch_size=2, outer_optimizer=lambda raw: adam(raw)),
        TRHO(["lr", "momentum"], hyper_batch_size=40),
        TRHO(["lr", "momentum"], hyper_batch_size=2, stop_step=7),
        TRHO(["lr", "momentum"], hyper_batch_size=2, start_step=113),
    ],
    ids=["history", "no way back", "maximized", "own optimizer", "short", "stopped", "late"],
)
def test_no_rate_climbs_where_it_could_not_be_taken_back_or_need_not(callback):
    _, callback, _ = climbing_run(callback=callback, lr=0.1)
    moves = [math.log(after / before) for before, after in itertools.pairwise(rates(callback))]
    assert moves
    assert max(moves) < 0.9


@pytest.mark.parametrize(
    ("others", "length"),
    [
        ([], {"steps": 32}),
        ([GradientAccumulationScheduler({0: 2})], {"steps": -1, "max_epochs": 11}),  # 3 each
        ([GradientAccumulationScheduler({0: 2})], {"steps": 32}),
    ],
)
def test_a_climb_that_loses_nothing_ends_after_a_quarter_of_the_run(others, length):
    class Unmoved(SmallNet):
        """The rate is that of weights which the objective does not depend on."""

        def configure_optimizers(self):
            self.idle = nn.Linear(1, 1)
            free = {"params": self.idle.parameters(), "lr": self.settings["lr"]}
            return optim.SGD([{"params": self.net.parameters()}, free], lr=0.01)

    callback = TRHO(hyper_batch_size=2)
    fit(Unmoved(lr=Hyperparameter(1e-3, Positive())), callback, *others, **length)
    values = [callback.schedule.start["settings.lr"].item()]
    values += [update.values["settings.lr"].item() for update in callback.schedule]
    assert set(actions(callback)) == {None}
    assert values[4] / values[0] == pytest.approx(math.e**4, rel=1e-5)
    assert values[4:] == [values[4]] * 13  # after 16 updates


class Stream(IterableDataset):
    """Data whose length nobody knows."""

    def __iter__(self):
        yield from loader(TRAIN_SIZE, seed=1, batch_size=4).dataset


@pytest.mark.parametrize("max_epochs", [-1, 5])
def test_a_run_of_unknown_length_does_not_climb(max_epochs):
    callback = TRHO(["lr"], hyper_batch_size=2)
    stream = DataLoader(Stream(), batch_size=4)
    module = SmallNet(optim.SGD, lr=0.1)
    fit(module, StopAfter(20), callback, steps=-1, train=stream, max_epochs=max_epochs)
    for before, after in itertools.pairwise(rates(callback)):
        assert after / before < 1.5


def test_a_run_that_ends_on_its_climb_says_so():
    with pytest.warns(UserWarning, match="has ended at step 6, in its range test"):
        climbing_run(StopAfter(6))


def test_a_run_that_is_lost_just_after_its_climb_keeps_what_that_has_found():
    """The climb ends with its share of the run; the rate of the start says nothing."""
    make = lambda: TRHO(["lr"], hyper_batch_size=2)
    _, callback, _ = climbing_run(callback=make())
    lost = actions(callback).index("restored")
    with pytest.warns(UserWarning, match="went back to its best state"):  # not on the climb
        _, callback, _ = climbing_run(callback=make(), steps=4 * 2 * lost)
    values = rates(callback)
    assert actions(callback).index("restored") == lost
    assert values[lost + 1] == pytest.approx(values[lost] / 10, rel=1e-6)
    assert values[lost] > 10 * 1e-3


class Fragile(SmallNet):
    """Does not stand weights that are not finite."""

    def training_step(self, batch, batch_idx):
        self.stand()
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.stand()
        return super().validation_step(batch, batch_idx)

    def stand(self):
        if not all(param.isfinite().all() for param in self.parameters()):
            raise ValueError("weights are not finite")


def test_a_climb_ends_before_the_users_code_meets_weights_that_are_not_finite():
    callback = TRHO(["lr"], hyper_batch_size=200)
    body = lambda: nn.Linear(FEATURES, 1)
    module = Fragile(optim.SGD, body=body, lr=1e4)
    with pytest.warns(UserWarning, match="went back to its best state"):
        fit(module, callback, steps=1600)
    steps = [0, *(update.step for update in callback.schedule)]
    windows = [after - before for before, after in itertools.pairwise(steps)]
    early = [n for n, window in enumerate(windows) if window < 200]
    assert len(early) >= 2  # on the climb, and on trial after it
    values = rates(callback)
    for n in early:
        assert math.isnan(callback.schedule[n].outer_objective)
        assert values[n + 1] == pytest.approx(values[n] / 10, rel=1e-6)
    assert windows[-1] == 200  # whole from there
    assert all(bool(param.isfinite().all()) for param in module.parameters())


@pytest.mark.parametrize("patience", [0, 3])
def test_early_stopping_waits_for_the_end_of_a_climb(patience):
    """It begins with the validation after that, whatever the lost run has reached."""
    seen = []

    class Watching(EarlyStopping):
        def on_validation_end(self, trainer, pl_module):
            super().on_validation_end(trainer, pl_module)
            value = trainer.callback_metrics["val_loss"].item()
            seen.append((trainer.global_step, self.wait_count, self.best_score.item(), value))

    stopping = Watching("val_loss", patience=patience, check_finite=False)
    settings = {"val_check_interval": 1, "check_val_every_n_epoch": None}
    _, callback, trainer = climbing_run(stopping, **settings)
    lost = callback.schedule[actions(callback).index("restored")].step
    assert trainer.global_step > lost
    assert all(wait <= 0 for step, wait, *_ in seen if step < lost)
    step, wait, best, value = next(found for found in seen if found[0] >= lost)
    assert (step, wait, best) == (lost, 0, value)


def test_weights_that_no_optimizer_trains_go_back_too():
    class Teaching(SmallNet):
        """Its teacher follows its weights; another part stands still."""

        def __init__(self):
            super().__init__(optim.SGD, lr=1e6)
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
            self.still = nn.Linear(2, 2).requires_grad_(False)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            for own, followed in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.lerp_(followed.detach(), 0.01)

    callback = RTHO(["lr"], hyper_batch_size=2)
    module = Teaching()
    with pytest.warns(UserWarning, match="went back to its best state"):
        fit(module, callback, steps=40)
    assert actions(callback)[-1] is None
    own, followed = (
        nn.utils.parameters_to_vector(net.parameters()) for net in (module.teacher, module.net)
    )
    assert (own - followed).norm() < 10 * followed.norm()  # far from 1e6
    moving = callback.state_dict()["run"]["safeguard"]["moving"]
    assert moving == sorted(f"teacher.{name}" for name, _ in module.net.named_parameters())


def test_after_its_last_update_nobody_takes_a_run_back():
    class Spoiled(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 30:
                with torch.no_grad():
                    pl_module.net[0].weight.fill_(math.nan)

    callback = TRHO(["lr"], hyper_batch_size=2, stop_step=8)
    _, callback, trainer = climbing_run(Spoiled(), callback=callback, steps=40)
    assert [update.step for update in callback.schedule] == [2, 4, 6, 8]
    assert trainer.global_step == 40


# Runs that set out too fast

TOO_FAST = {"forward": 0.66, "reverse": 0.67}
"""Rates by which three steps lower the objective, but far less than a lower rate would."""


def weights_after_three_steps(lr):
    module = SmallNet(optim.SGD, lr=lr)
    fit(module, steps=3)
    return validation_loss(module), nn.utils.parameters_to_vector(module.parameters()).detach()


@quiet
@each_method
def test_a_run_that_sets_out_too_fast_begins_again_with_a_tenth_of_the_rate(method):
    """By its sensitivity where that is known; else by how far its weights have gone."""
    lr, begin = TOO_FAST[method], SmallNet(optim.SGD)
    loss, weights = weights_after_three_steps(lr)
    assert loss < validation_loss(begin)
    callback = METHODS[method](["lr"], hyper_batch_size=3)
    module = SmallNet(optim.SGD, lr=lr)
    trainer = fit(module, callback, steps=3)
    if method == "forward":
        nearby = [weights_after_three_steps(lr * factor)[1] for factor in (1 - 1e-5, 1 + 1e-5)]
        sensitivity = (nearby[1] - nearby[0]).norm() / 2e-5 / weights.norm()
        # Float64 differences at a step of 1e-5 err by about 1e-9.
        assert callback.schedule[0].sensitivity == pytest.approx(sensitivity.item(), rel=1e-6)
    assert actions(callback) == ["restored"]
    for one, other in zip(module.parameters(), begin.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not trainer.optimizers[0].state
    assert callback.hyperparameters["lr"].item() == pytest.approx(lr / 10, rel=1e-12)


@each_method
@pytest.mark.parametrize("lr", [1e-4, 0.1, 0.3])
def test_a_run_that_sets_out_well_is_left_alone(method, lr):
    callback = METHODS[method](["lr"], hyper_batch_size=3)
    fit(SmallNet(optim.SGD, lr=lr, momentum=0.5), callback, steps=3)
    assert actions(callback) == [None]


# Chaotic runs


def sensitivity_of_run(lr: float) -> float:
    """||dw/dlog lr|| / ||w|| after four steps, by central differences."""
    weights = []
    for factor in (1 - 1e-5, 1.0, 1 + 1e-5):
        module = SmallNet(optim.SGD, lr=lr * factor, momentum=0.5)
        fit(module, steps=4)
        weights.append(nn.utils.parameters_to_vector(module.parameters()).detach())
    return ((weights[2] - weights[0]).norm() / 2e-5 / weights[1].norm()).item()


def test_sensitivity_is_the_relative_change_of_the_weights_by_the_relative_change_of_the_rate():
    callback = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None)
    fit(SmallNet(optim.SGD, lr=0.1, momentum=0.5), callback, steps=4)
    # Float64 differences at a step of 1e-5 err by about 1e-9.
    assert callback.schedule[-1].sensitivity == pytest.approx(sensitivity_of_run(0.1), rel=1e-6)


def test_sensitivity_of_reverse_mode_is_not_known_and_not_logged(tmp_path):
    callback = TRHO(["lr"], hyper_batch_size=2)
    fit(SmallNet(lr=0.1), callback, steps=4, logger=CSVLogger(tmp_path))
    assert all(math.isnan(update.sensitivity) for update in callback.schedule)
    (log,) = tmp_path.rglob("metrics.csv")
    assert "sensitivity" not in log.read_text().splitlines()[0]


def test_a_chaotic_run_gets_a_lower_rate_and_a_fresh_history(monkeypatch):
    monkeypatch.setattr("lightning_rtho.callbacks._safeguard._CHAOS", 1e-3)
    callback = RTHO(["lr", "momentum"], hyper_batch_size=2)
    module = SmallNet(optim.SGD, lr=0.01, momentum=0.5)
    with pytest.warns(UserWarning, match="sensitivity"):
        fit(module, callback, steps=6)
    assert actions(callback)[:2] == ["lowered"] * 2
    values = [update.values["lr"].item() for update in callback.schedule]
    assert values[0] == pytest.approx(0.01 / 2, rel=1e-12)
    assert callback.schedule[0].values["momentum"].item() == 0.5
    sensitivities = [update.sensitivity for update in callback.schedule]
    assert sensitivities[1] < 2 * sensitivities[0]  # of two steps again, not of four


def test_after_chaos_the_outer_optimizer_begins_anew(monkeypatch):
    """What it has gathered meanwhile is as random as the hypergradients were."""
    monkeypatch.setattr("lightning_rtho.callbacks._safeguard._CHAOS", 1e-3)
    made = []

    def outer_optimizer(raw):
        made.append(optim.SGD(raw, lr=0.1))
        return made[-1]

    callback = RTHO(["lr"], hyper_batch_size=2, outer_optimizer=outer_optimizer)
    with pytest.warns(UserWarning, match="sensitivity"):
        fit(SmallNet(optim.SGD, lr=0.01), callback, steps=6)
    assert len(made) == 1 + actions(callback).count("lowered")


# Doing no harm


@each_method
def test_observing_is_bitwise_harmless_whatever_happens(method):
    plain = SmallNet(optim.SGD, lr=3.0)
    fit(plain, steps=6)
    observed = SmallNet(optim.SGD, lr=3.0)
    callback = METHODS[method](["lr"], hyper_batch_size=1, outer_optimizer=None)
    fit(observed, callback, steps=6)
    assert max(u.outer_objective for u in callback.schedule) > 1.05 * validation_loss(SmallNet())
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one, other)


@each_method
def test_a_run_that_learns_is_left_alone(method):
    values = []
    for safeguard in (True, False):
        # Three updates: so few that no rate climbs.
        callback = METHODS[method](hyper_batch_size=6, safeguard=safeguard)
        module = SmallNet(optim.Adam, lr=Hyperparameter(1e-3, Positive()))
        fit(module, callback, steps=20)
        values.append([update.values for update in callback.schedule])
        assert set(actions(callback)) == {None}
    assert values[0] == values[1]


@quiet
@each_method
def test_a_resumed_run_goes_back_to_the_same_state_bit_for_bit(method, tmp_path):
    def lost_run(path, **settings):
        module = SmallNet(optim.Adam, lr=Hyperparameter(300.0, Positive()))
        callback = METHODS[method](hyper_batch_size=2)
        return final(*run(callback, path, module=module, **settings), callback), callback

    expected, whole = lost_run(tmp_path / "whole")
    file = tmp_path / "whole" / "step=3.ckpt"
    torch.load(file, weights_only=True)
    found, _ = lost_run(tmp_path / "rest", ckpt_path=file, seed=99)
    assert "restored" in actions(whole)[1:]  # after the interruption
    different = [
        k for k in expected if not torch.equal(found[k].nan_to_num(), expected[k].nan_to_num())
    ]
    assert different == []


@quiet
def test_a_run_that_is_resumed_on_its_climb_goes_on_bit_for_bit(tmp_path):
    def climb(path, **settings):
        module, callback = SmallNet(optim.SGD, lr=0.01), TRHO(["lr"], hyper_batch_size=1)
        return final(*run(callback, path, module=module, **settings), callback), callback

    expected, whole = climb(tmp_path / "whole")
    file = tmp_path / "whole" / "step=2.ckpt"
    found, resumed = climb(tmp_path / "rest", ckpt_path=file, seed=99)
    moves = [math.log(after / before) for before, after in itertools.pairwise(rates(whole))]
    assert moves[:3] == pytest.approx([1.0] * 3, rel=1e-5)  # two before the interruption
    assert max(moves[3:]) < 0.9
    assert rates(resumed) == rates(whole)
    assert [k for k in expected if not torch.equal(found[k], expected[k])] == []


# Snapshots


def small_run(optimizer=optim.Adam):
    module = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    inner = DifferentiableOptimizer(optimizer(module.parameters(), lr=0.1))
    return module, list(module.parameters()), [inner]


def train(module, optimizers, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        module(torch.randn(8, FEATURES, generator=generator)).square().mean().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()


def held(module, optimizers):
    tensors = [*module.state_dict().values()]
    return tensors + [v for s in optimizers[0].state.values() for v in s.values()]


@pytest.mark.parametrize("before", [0, 3])
def test_training_goes_on_from_a_snapshot_bit_for_bit_and_more_than_once(before):
    module, params, optimizers = small_run()
    train(module, optimizers, before)
    snapshot = take_snapshot(module, params, optimizers)
    train(module, optimizers, 4)
    expected = [tensor.clone() for tensor in held(module, optimizers)]
    for _ in range(2):
        restore_snapshot(snapshot, module, params, optimizers)
        assert bool(optimizers[0].state) == bool(before)
        train(module, optimizers, 4)
        found = held(module, optimizers)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_distance_is_measured_in_lengths_of_the_snapshot():
    module, params, optimizers = small_run()
    snapshot = take_snapshot(module, params, optimizers)
    with torch.no_grad():
        for param in params:
            param.mul_(-2)
    assert distance_from(snapshot, params) == pytest.approx(3.0, rel=1e-6)  # float32
    zero = {"params": [torch.zeros_like(param) for param in params]}
    assert distance_from(zero, params) == 0.0


# Coupling


def coordinates_of(groups):
    hypers = []
    for group in groups:
        for value in group.values():
            if isinstance(value, Hyperparameter) and not any(value is h for h in hypers):
                hypers.append(value)
    weights = [{"params": [torch.zeros(1, requires_grad=True)], **group} for group in groups]
    optimizer = DifferentiableOptimizer(optim.SGD(weights, lr=0.1, momentum=0.5))
    return hypers, decoupled_coordinates(hypers, [optimizer])


def test_rate_and_momentum_of_each_group_are_coupled_if_they_are_a_pair():
    def rate():
        return Hyperparameter(0.1, Positive())

    def momentum():
        return Hyperparameter(0.5, Interval(0, 1))

    _, pairs = coordinates_of([{"lr": rate(), "momentum": momentum()} for _ in range(2)])
    raw = [value.exp().item() for value in pairs.read()]
    assert raw[0] == pytest.approx(0.2)  # 0.1 / (1 - 0.5)
    assert raw[2] == pytest.approx(0.2)
    shared = momentum()
    _, single = coordinates_of([{"lr": rate(), "momentum": shared} for _ in range(2)])
    assert single.read()[0].exp().item() == pytest.approx(0.1)


def test_slopes_follow_the_order_of_the_hyperparameters():
    hypers, _ = coordinates_of([{"lr": Hyperparameter(0.1, Positive())}])
    assert relative_slopes(hypers).tolist() == pytest.approx([0.1])
