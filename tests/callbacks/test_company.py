"""Other callbacks and changes in mid-run."""

import io
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from tests.callbacks.problems import (
    FEATURES,
    SmallNet,
    finite_difference,
    fit,
    validation_loss,
)

STEPS = 8
METHODS = {
    "forward": lambda names=("lr",), **kw: RTHO([*names], **kw),
    "recompute": lambda names=("lr",), **kw: TRHO([*names], **kw),
    "keep graph": lambda names=("lr",), **kw: TRHO([*names], tape=KeepGraph(), **kw),
}
COMPANY: dict[str, Any] = {
    "accumulation scheduler": lambda: GradientAccumulationScheduler({0: 1, 1: 2}),
    "early stopping": lambda: EarlyStopping("train_loss", patience=100),
}

for _name in ("WeightAveraging", "EMAWeightAveraging"):  # since Lightning 2.6
    if hasattr(callbacks, _name):
        COMPANY[_name] = getattr(callbacks, _name)


def observed(make: Any, *others: Any, module: Any = None, **settings: Any) -> Any:
    callback = make(hyper_batch_size=STEPS, outer_optimizer=None)
    module = module or SmallNet(lr=0.1, momentum=0.5)
    fit(module, callback, *[other() for other in others], steps=STEPS, **settings)
    return callback.hypergradients["lr"].item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", COMPANY)
def test_exact_in_company(name, method):
    def loss_at(lr: float) -> float:
        weights: dict[str, Tensor] = {}

        class Last(L.Callback):  # the callback itself may swap the weights at the end
            def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
                if trainer.global_step == STEPS:
                    weights.update({k: v.clone() for k, v in module.state_dict().items()})

        module = SmallNet(lr=lr, momentum=0.5)
        fit(module, COMPANY[name](), Last(), steps=STEPS)
        module.load_state_dict(weights)
        return validation_loss(module)

    found = observed(METHODS[method], COMPANY[name])
    assert found == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_stochastic_weight_averaging_brings_a_schedule(method):
    average = lambda: StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1, annealing_epochs=2)

    def rates(*callbacks: Any) -> list[float]:
        seen: list[float] = []

        class Watch(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        fit(SmallNet(lr=0.1), *callbacks, average(), Watch(), steps=20, max_epochs=4)
        return seen

    plain = rates()
    tuned = rates(METHODS[method](hyper_batch_size=10, outer_optimizer=None))
    assert plain == tuned
    assert plain[-1] < 0.1


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_an_epoch_of_batch_statistics_after_training_is_none_of_it(method, accumulated):
    def trained(*others: Callback) -> tuple[SmallNet, L.Trainer]:
        average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
        module = SmallNet(body=normed, lr=0.05)
        settings = {"max_epochs": 4, "accumulate_grad_batches": accumulated}
        return module, fit(module, *others, average, steps=-1, **settings)

    callback = METHODS[method](hyper_batch_size=2, outer_optimizer=None)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*hypergradients count the run after it")
        (plain, alone), (observed, followed) = trained(), trained(callback)
    assert alone.global_step == followed.global_step
    assert len(callback.schedule) == {1: 10, 2: 6}[accumulated]  # of 5 batches an epoch
    for name, value in plain.state_dict().items():
        assert torch.equal(value, observed.state_dict()[name]), name


class TwoParts(SmallNet):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__(optim.SGD, lr=lr)
        self.backbone, self.head = self.net[0], self.net[2]

    def configure_optimizers(self):
        lively = [p for p in self.parameters() if p.requires_grad]
        return optim.SGD(lively, lr=self.settings["lr"], momentum=0.5)


def unfreezing() -> BackboneFinetuning:
    # The added group has the rate of the head at that moment; a constant one keeps FD honest.
    return BackboneFinetuning(1, lambda epoch: 1.0, backbone_initial_lr=0.03, verbose=False)


def test_groups_added_in_mid_run_are_followed():
    def loss_at(lr: float) -> float:
        module = TwoParts(lr)
        fit(module, unfreezing(), steps=STEPS)
        return validation_loss(module)

    found = observed(METHODS["forward"], unfreezing, module=TwoParts())
    assert found == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


class Thawed(TwoParts):
    """Trains its backbone from the fifth step on, with the rate of its head."""

    def configure_optimizers(self):
        return optim.SGD(self.head.parameters(), lr=self.settings["lr"], momentum=0.5)

    def on_train_batch_start(self, batch, batch_idx):
        if self.global_step == 4:
            group = {"params": list(self.backbone.parameters()), "lr": self.settings["lr"]}
            self.add_to(self.trainer.optimizers[0], group)

    def add_to(self, optimizer, group):
        optimizer.add_param_group(group)


class ThawedBelow(Thawed):
    def add_to(self, optimizer, group):
        getattr(optimizer, "optimizer", optimizer).add_param_group(group)


@pytest.mark.parametrize("module_type", [Thawed, ThawedBelow])
@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_hyperparameters_in_groups_added_in_mid_run_are_followed(make, module_type):
    def loss_at(lr: float) -> float:
        module = module_type(lr)
        fit(module, steps=STEPS)
        return validation_loss(module)

    callback = make(hyper_batch_size=STEPS, outer_optimizer=None)
    fit(module_type(Hyperparameter(0.1, Positive())), callback, steps=STEPS)
    (found,) = callback.schedule[-1].hypergradients.values()

    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_a_group_added_in_mid_run_may_have_a_rate_of_its_own(make):
    class Apart(Thawed):
        def add_to(self, optimizer, group):
            super().add_to(optimizer, group | {"lr": self.own_rate})

    module = Apart(Hyperparameter(0.1, Positive()))
    module.own_rate = Hyperparameter(0.2, Positive())
    callback = make(hyper_batch_size=2, start_step=4, outer_optimizer=None)
    fit(module, callback, steps=8)
    assert callback.schedule[-1].hypergradients["own_rate"] != 0


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_adagrad_gives_groups_that_are_added_a_sum_of_their_own(make):
    class Divided(SmallNet):
        def configure_optimizers(self):
            first, second = (list(self.net[i].parameters()) for i in (0, 2))
            rate = self.settings["lr"]
            optimizer = optim.Adagrad(first, lr=rate, initial_accumulator_value=0.1)
            optimizer.add_param_group({"params": second, "lr": rate})
            return optimizer

    def loss_at(lr: float) -> float:
        module = Divided(lr=lr)
        fit(module, steps=STEPS)
        return validation_loss(module)

    callback = make(hyper_batch_size=STEPS, outer_optimizer=None)
    fit(Divided(lr=Hyperparameter(0.1, Positive())), callback, steps=STEPS)
    (found,) = callback.hypergradients.values()
    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


class Freezing(SmallNet):
    def on_train_batch_start(self, batch, batch_idx):
        self.net[0].weight.requires_grad_(self.global_step < 4)


def normed() -> nn.Module:
    layers = [nn.Linear(FEATURES, 3), nn.BatchNorm1d(3, momentum=0.4), nn.Tanh(), nn.Linear(3, 1)]
    return nn.Sequential(*layers)


class FreezingNorm(SmallNet):
    """Its batch normalization keeps its statistics from the fifth step on."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(body=normed, **settings)

    def training_step(self, batch, batch_idx):
        self.net[1].train(self.global_step < 4)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    ("freezing", "said"),
    [
        (Freezing, "Weights were frozen at step 4"),
        (FreezingNorm, "Batch normalization that has trained was in evaluation mode at step 4"),
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_in_mid_run_begins_a_new_history(method, freezing, said):
    found = []
    for start in (0, 5):  # four steps, one that is left out, four more
        count = 8 if start == 0 else 4
        callback = METHODS[method](hyper_batch_size=count, start_step=start, outer_optimizer=None)
        expected = pytest.warns(UserWarning, match=said) if start == 0 else nullcontext()
        with expected:
            fit(freezing(lr=0.1, momentum=0.5), callback, steps=9)
        found.append(callback.hypergradients["lr"].item())
    assert found[0] == found[1]


class Skipping(SmallNet):
    """Looks at each third batch and learns nothing from it."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize("method", ["forward", "keep graph"])
def test_batch_statistics_of_steps_without_a_loss_are_followed(method):
    def loss_at(lr: float) -> float:
        module = Skipping(body=normed, lr=lr, momentum=0.5)
        fit(module, steps=STEPS)
        return validation_loss(module)

    # Of five batches the second and the fifth have no loss.
    callback = METHODS[method](hyper_batch_size=5, outer_optimizer=None)
    fit(Skipping(body=normed, lr=0.1, momentum=0.5), callback, steps=STEPS)
    (found,) = callback.hypergradients.values()
    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


class Widened(Skipping):
    """A hyperparameter scales what is normalized first: it acts through batch statistics."""

    def __init__(self, width: Any) -> None:
        super().__init__(body=lambda: nn.Sequential(nn.BatchNorm1d(3), normed()), lr=0.1)
        self.width = width

    def training_step(self, batch, batch_idx):
        return super().training_step([batch[0] * self.width, batch[1]], batch_idx)


@pytest.mark.parametrize("method", ["forward", "keep graph"])
def test_hyperparameters_act_through_statistics_of_steps_without_a_loss(method):
    def loss_at(width: float) -> float:
        fit(module := Widened(width), steps=STEPS)
        return validation_loss(module)

    callback = METHODS[method](["width"], hyper_batch_size=5, outer_optimizer=None)
    fit(Widened(Hyperparameter(1.3, Positive())), callback, steps=STEPS)
    expected = finite_difference(1.3, loss_at)
    assert callback.hypergradients["width"].item() == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_made_again_without_a_loss_begins_a_new_history():
    module = Skipping(body=normed, lr=0.1, momentum=0.5)
    callback = TRHO(["lr"], hyper_batch_size=1, outer_optimizer=None)
    with pytest.warns(UserWarning, match="A training step with batch normalization had no loss"):
        fit(module, callback, steps=STEPS)
    # Steps 2, 5 and 7 have no loss; those after them are left out.
    assert [update.step for update in callback.schedule] == [1, 4]
    assert next(iter(callback.hypergradients.values())).isfinite()


AVERAGES: dict[str, Any] = {
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1)
}
if "EMAWeightAveraging" in COMPANY:
    AVERAGES["ema"] = COMPANY["EMAWeightAveraging"]


@pytest.mark.parametrize("name", AVERAGES)
def test_averages_of_weights_begin_anew_where_a_run_goes_back(name):
    callback = RTHO(["lr"], hyper_batch_size=7)  # an epoch has 5 steps, and ends with lost weights
    module = SmallNet(lr=1e6)  # lost in the first steps, far away
    start = validation_loss(SmallNet(lr=1e6))
    with pytest.warns(UserWarning, match="went back to its best state"):
        fit(module, callback, AVERAGES[name](), steps=80, max_epochs=16)
    assert callback.schedule[-1].safeguard is None
    assert validation_loss(module) < start


def test_steps_of_a_lost_run_are_not_counted_against_the_one_after_it(recwarn):
    callback = RTHO(["lr"], hyper_batch_size=200)
    fit(SmallNet(lr=1e6), callback, steps=1600)  # not finite after 50 steps
    assert callback.schedule[0].safeguard == "restored"
    assert not [w for w in recwarn if "is not finite at step" in str(w.message)]


MONITORED: dict[str, Any] = {
    "outer_objective": lambda update: update.outer_objective,
    "hyperparameter/lr": lambda update: update.values["lr"].item(),
    "hypergradient/lr": lambda update: update.hypergradients["lr"].item(),
}


@pytest.mark.parametrize("monitor", MONITORED)
@pytest.mark.parametrize("method", ["forward", "recompute"])
def test_what_is_measured_can_be_monitored(method, monitor, tmp_path):
    def make() -> Any:
        return METHODS[method](hyper_batch_size=5)  # steps in an epoch

    free = make()
    fit(SmallNet(lr=0.01), free, steps=20)
    first, second, *rest = (MONITORED[monitor](update) for update in free.schedule)
    mode = "min" if second < first else "max"
    best = (min if mode == "min" else max)(first, second, *rest)
    checkpoint = ModelCheckpoint(tmp_path, monitor=monitor, mode=mode, every_n_train_steps=5)
    fit(SmallNet(lr=0.01), make(), checkpoint, steps=20, enable_checkpointing=True)
    # Lightning keeps metrics in float32.
    assert checkpoint.best_model_score.item() == pytest.approx(best, rel=1e-6)

    stop = EarlyStopping(
        monitor,
        mode=mode,
        patience=100,
        stopping_threshold=(first + second) / 2,
        check_on_train_epoch_end=True,
    )
    stopped = make()
    fit(SmallNet(lr=0.01), stopped, stop, steps=20)
    assert [update.step for update in stopped.schedule] == [5, 10]


def on_screen(make_bar: Callable[[], Callback], *callbacks: Callback, lr: float) -> str:
    """Train and return what the bar has shown."""
    screen = io.StringIO()
    module = SmallNet(lr=lr)
    with redirect_stdout(screen), redirect_stderr(screen):
        fit(module, *callbacks, make_bar(), steps=4, enable_progress_bar=True)
    return screen.getvalue()


def rich(metrics_format: str = ".3f") -> RichProgressBar:
    return RichProgressBar(
        theme=RichProgressBarTheme(metrics_format=metrics_format),
        console_kwargs={"force_terminal": True, "width": 200},
    )


@pytest.mark.parametrize(
    ("make_bar", "shown"),
    [
        (TQDMProgressBar, "hyperparameter/lr={:.3g}"),
        (rich, "hyperparameter/lr: {:.3g}"),
        (lambda: rich(".9f"), "hyperparameter/lr: {:.9f}"),
    ],
    ids=["tqdm", "rich", "rich with a format of the user's"],
)
@pytest.mark.parametrize("lr", [1e-1, 1e-4, 1e-7])
def test_progress_bar_shows_small_values(make_bar, shown, lr):
    callback = RTHO(["lr"], hyper_batch_size=2)
    screen = on_screen(make_bar, callback, lr=lr)
    text = shown.format(callback.hyperparameters["lr"].item())
    assert text.replace("e-0", "e-") in screen.replace("e-0", "e-")  # TQDM writes 1e-07 as 1e-7


def test_progress_bar_shows_what_others_log_as_without_the_callback():
    class Logging(SmallNet):
        def training_step(self, batch, batch_idx):
            self.log("small", 1e-4, prog_bar=True)
            return super().training_step(batch, batch_idx)

    screen = io.StringIO()
    with redirect_stdout(screen):
        fit(Logging(lr=0.1), RTHO(["lr"], hyper_batch_size=2), rich(), enable_progress_bar=True)
    assert "small: 0.000" in screen.getvalue()


def test_progress_bar_is_given_back():
    bar = rich()
    before = bar.get_metrics
    fit(SmallNet(lr=0.1), RTHO(["lr"], hyper_batch_size=2), bar, enable_progress_bar=True)
    assert bar.get_metrics == before


class OwnWarmup(SmallNet):
    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (self.global_step + 1)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)


@pytest.mark.parametrize("method", METHODS)
def test_tuned_setting_that_someone_else_writes_is_refused(method):
    with pytest.raises(MisconfigurationException, match="`lr` is tuned, but something other"):
        observed(METHODS[method], module=OwnWarmup(lr=0.1))


def test_two_hypergradient_callbacks_are_refused():
    with pytest.raises(MisconfigurationException, match="one hypergradient callback"):
        fit(SmallNet(lr=0.1), RTHO(["lr"]), TRHO(["momentum"]))


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("optimizer", [optim.SGD, optim.Adam, optim.AdamW])
def test_every_implementation_of_an_optimizer_is_followed(optimizer, options):
    torch.set_default_dtype(torch.float64)
    found = [
        observed(METHODS["forward"], module=SmallNet(optimizer, lr=0.05, **chosen))
        for chosen in ({}, options)
    ]
    # The implementations round differently.
    assert found[0] == pytest.approx(found[1], rel=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"detect_anomaly": True},
        {"overfit_batches": 2},
        {"profiler": "simple"},
        {"limit_train_batches": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_trainer_settings_change_nothing_in_the_mathematics(method, settings):
    def loss_at(lr: float) -> float:
        module = SmallNet(lr=lr, momentum=0.5)
        fit(module, steps=STEPS, **settings)
        return validation_loss(module)

    found = observed(METHODS[method], **settings)
    assert found == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


@pytest.mark.filterwarnings("ignore:At step")
@pytest.mark.parametrize("method", METHODS)
def test_early_stopping_waits_anew_where_a_run_goes_back(method):
    """The rate is destructive at first: every validation before the run goes back is worse."""

    def steps_made(callback):
        stopping = EarlyStopping("val_loss", patience=4)
        settings = {"check_val_every_n_epoch": None, "val_check_interval": 1}
        module = SmallNet(optim.SGD, lr=30.0)
        return fit(module, callback, stopping, steps=8, **settings).global_step

    made = METHODS[method](hyper_batch_size=3)
    assert steps_made(made) == 8
    restored = [update.step for update in made.schedule if update.safeguard == "restored"]
    assert restored == [3, 6]
    # Without going back it is over after the first validation and four that are no better.
    assert steps_made(METHODS[method](hyper_batch_size=3, safeguard=False)) == 5
