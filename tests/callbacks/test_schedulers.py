"""A tuned learning rate under a scheduler is the base that the schedule shapes."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch import optim
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import SWALR

from lightning_rtho import (
    RTHO,
    TRHO,
    DifferentiableOptimizer,
    Hyperparameter,
    KeepGraph,
    NonNegative,
    Positive,
    Recompute,
)
from lightning_rtho.schedulers import check_schedulers
from tests.callbacks.problems import SmallNet, finite_difference, fit, validation_loss

# Every scheduler, with each rate it is given in proportion to the base.
SCHEDULERS: dict[str, Callable[[optim.Optimizer, float], Any]] = {
    "lambda": lambda o, lr: lrs.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o, lr: lrs.MultiplicativeLR(o, lambda t: 0.8),
    "step": lambda o, lr: lrs.StepLR(o, 2, 0.5),
    "multistep": lambda o, lr: lrs.MultiStepLR(o, [1, 3], 0.5),
    "constant": lambda o, lr: lrs.ConstantLR(o, 0.3, 2),
    "linear": lambda o, lr: lrs.LinearLR(o, 0.2, 1.0, 4),
    "exponential": lambda o, lr: lrs.ExponentialLR(o, 0.7),
    "polynomial": lambda o, lr: lrs.PolynomialLR(o, 8, 2.0),
    "cosine": lambda o, lr: lrs.CosineAnnealingLR(o, 6, eta_min=0.1 * lr),
    "restarts": lambda o, lr: lrs.CosineAnnealingWarmRestarts(o, 3, eta_min=0.1 * lr),
    "cyclic": lambda o, lr: lrs.CyclicLR(o, lr, 4 * lr, 2, cycle_momentum=False),
    "onecycle": lambda o, lr: lrs.OneCycleLR(o, lr, 12, div_factor=4.0, cycle_momentum=False),
    "sequential": lambda o, lr: lrs.SequentialLR(
        o, [lrs.LinearLR(o, 0.2, 1.0, 2), lrs.CosineAnnealingLR(o, 6, eta_min=0.1 * lr)], [2]
    ),
    "chained": lambda o, lr: lrs.ChainedScheduler([
        lrs.LinearLR(o, 0.2, 1.0, 3),
        lrs.ExponentialLR(o, 0.8),
    ]),
    "swa": lambda o, lr: SWALR(o, 0.3 * lr, anneal_epochs=3),
}


class Scheduled(SmallNet):
    """A scheduler over SGD with momentum; `lr` is a number or a hyperparameter."""

    def __init__(self, make: Callable[..., Any], interval: str = "step", **settings: Any) -> None:
        super().__init__(optim.SGD, **settings)
        self.make, self.interval = make, interval

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = self.make(optimizer, float(self.settings["lr"]))
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "named"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_hypergradients_are_exact_under_every_scheduler(name, declared):
    base = 0.1

    def loss_at(lr: float, l2: float) -> float:
        module = Scheduled(SCHEDULERS[name], lr=lr, momentum=0.5, l2=l2)
        fit(module, steps=5)
        return validation_loss(module)

    values = {"lr": base, "l2": 0.01}
    expected = {
        "lr": finite_difference(base, lambda lr: loss_at(lr, 0.01)),
        "l2": finite_difference(0.01, lambda l2: loss_at(base, l2)),
    }
    for make in (RTHO, TRHO):
        lr = Hyperparameter(base, Positive()) if declared else base
        module = Scheduled(
            SCHEDULERS[name], lr=lr, momentum=0.5, l2=Hyperparameter(0.01, Positive())
        )
        chosen = ["settings.lr", "l2"] if declared else ["lr", "l2"]
        callback = make(chosen, hyper_batch_size=5, outer_optimizer=None)
        fit(module, callback, steps=5)
        for key, reference in expected.items():
            (full,) = (k for k in callback.hypergradients if k.endswith(key))
            # By the logarithm: the base of `OneCycleLR` is a fraction of the rate it was given.
            found = callback.hypergradients[full] * callback.hyperparameters[full]
            # The differences err by 1e-10 of the loss; see `finite_difference`.
            assert found.item() == pytest.approx(reference * values[key], rel=1e-6)


@pytest.mark.parametrize("interval", ["step", "epoch"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_moved_base_takes_the_schedule_with_it(name, interval):
    rates: list[tuple[float, float]] = []

    class Watching(Scheduled):
        def on_train_batch_start(self, batch, batch_idx):
            group = self.trainer.optimizers[0].param_groups[0]
            rates.append((callback.hyperparameters["lr"].item(), group["lr"]))

    callback = RTHO(["lr"], hyper_batch_size=3)
    fit(Watching(SCHEDULERS[name], interval, lr=0.01), callback, steps=12)
    assert len({base for base, _ in rates}) == 4
    plain: list[float] = []

    class Plain(Scheduled):
        def on_train_batch_start(self, batch, batch_idx):
            plain.append(self.trainer.optimizers[0].param_groups[0]["lr"])

    fit(Plain(SCHEDULERS[name], interval, lr=0.01), steps=12)
    # Rounding of a few products; the schedule is the plain one, with another base.
    assert [rate / base for base, rate in rates] == pytest.approx(
        [rate / rates[0][0] for rate in plain], rel=1e-12
    )


def test_plateaus_scale_the_rate_that_is_tuned():
    class Plateau(SmallNet):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = lrs.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)
            config = {"scheduler": scheduler, "monitor": "train_loss", "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": config}

    def loss_at(lr: float) -> float:
        module = Plateau(lr=lr)
        fit(module, steps=5)
        return validation_loss(module)

    expected = finite_difference(0.1, loss_at)
    callback = RTHO(["lr"], hyper_batch_size=5, outer_optimizer=None)
    trainer = fit(Plateau(lr=0.1), callback, steps=5)
    assert trainer.optimizers[0].param_groups[0]["lr"] < 0.1
    assert callback.hypergradients["lr"].item() == pytest.approx(expected, rel=1e-6)


def test_monitor_shows_the_scheduled_rate(tmp_path):
    callback = RTHO(["lr"], hyper_batch_size=1)
    logger = CSVLogger(tmp_path)
    fit(
        Scheduled(SCHEDULERS["exponential"], lr=0.01),
        callback,
        LearningRateMonitor("step"),
        steps=5,
        logger=logger,
        log_every_n_steps=1,
    )
    logger.save()
    with Path(logger.log_dir, "metrics.csv").open() as file:
        shown = [float(row["lr-SGD"]) for row in csv.DictReader(file) if row["lr-SGD"]]
    bases = [0.01, *(update.values["lr"].item() for update in callback.schedule[:-1])]
    expected = [base * 0.7**t for t, base in enumerate(bases)]
    assert shown == pytest.approx(expected, rel=1e-6)  # the file keeps fewer digits


@pytest.mark.parametrize("name", SCHEDULERS)
def test_observing_changes_nothing_under_a_scheduler(name):
    torch.set_default_dtype(torch.float32)
    weights = []
    for callbacks in ([], [RTHO(["settings.lr"], hyper_batch_size=2, outer_optimizer=None)]):
        lr = Hyperparameter(0.1, Positive())
        module = Scheduled(SCHEDULERS[name], lr=lr, momentum=0.5)
        fit(module, *callbacks, steps=8)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    assert not math.isnan(weights[0].sum().item())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_warmup_is_warned_of_where_the_rate_would_move_in_its_midst(name):
    def warnings_of(**settings: Any) -> int:
        with pytest.warns() as warned:
            fit(Scheduled(SCHEDULERS[name], lr=0.1), RTHO(["lr"], **settings), steps=1)
        return sum("`start_step` to the end of the warmup" in str(w.message) for w in warned)

    # One that begins at its lower rate, "cyclic", is none: that is the base.
    is_warmup = name in {"constant", "linear", "onecycle", "sequential", "chained"}
    assert warnings_of() == is_warmup
    assert warnings_of(start_step=5) == 0
    assert warnings_of(outer_optimizer=None) == 0


class TensorRate(Scheduled):
    """The rate is a tensor, which a scheduler writes to in place; the decay is tuned."""

    def __init__(self, decay: Any) -> None:
        super().__init__(SCHEDULERS["lambda"], lr=0.1, weight_decay=decay)

    def configure_optimizers(self):
        self.settings["lr"] = torch.tensor(0.1)
        return super().configure_optimizers()


@pytest.mark.parametrize("tape", [None, Recompute(), KeepGraph()])
def test_window_is_read_with_the_rates_that_its_steps_had(tape):
    settings = {"hyper_batch_size": 4, "outer_optimizer": None}
    callback = RTHO(**settings) if tape is None else TRHO(tape=tape, **settings)
    fit(TensorRate(Hyperparameter(0.1, NonNegative())), callback, steps=4)

    def loss_at(decay: float) -> float:
        module = TensorRate(decay)
        fit(module, steps=4)
        return validation_loss(module)

    (found,) = callback.hypergradients.values()
    # The differences err by 1e-10 of the loss; see `finite_difference`.
    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


@pytest.mark.parametrize("name", ["step", "multistep", "exponential"])
def test_rate_moves_on_after_a_group_was_added_that_the_scheduler_reads_by_itself(name):
    lr = Hyperparameter(0.1, Positive())
    first, second = (torch.zeros(2, requires_grad=True) for _ in range(2))
    inner = optim.SGD([first], lr=lr)
    scheduler = SCHEDULERS[name](inner, 0.1)
    optimizer = DifferentiableOptimizer(inner, [scheduler])
    optimizer.add_param_group({"params": [second], "lr": 0.01})
    lr.assign(torch.tensor(0.2))
    optimizer.write_hyperparameters()
    assert [group["lr"] for group in inner.param_groups] == pytest.approx([0.2, 0.01], rel=1e-7)
    assert scheduler.base_lrs == pytest.approx([0.2], rel=1e-7)  # 0.2 in float32


class WarmedUp(lrs.LambdaLR):
    """Of one's own, as it is written for warmups: torch's, with its function."""

    def __init__(self, optimizer: optim.Optimizer, steps: int) -> None:
        self.steps = steps
        super().__init__(optimizer, self.factor)

    def factor(self, step: int) -> float:
        return min(1.0, (1 + step) / self.steps)


def test_schedulers_of_ones_own_that_are_torchs_otherwise_are_followed():
    def loss_at(lr: float) -> float:
        module = Scheduled(lambda o, lr: WarmedUp(o, 3), lr=lr)
        fit(module, steps=5)
        return validation_loss(module)

    callback = RTHO(["lr"], hyper_batch_size=5, outer_optimizer=None)
    fit(Scheduled(lambda o, lr: WarmedUp(o, 3), lr=0.1), callback, steps=5)
    expected = finite_difference(0.1, loss_at)
    assert callback.hypergradients["lr"].item() == pytest.approx(expected, rel=1e-6)


def test_plateaus_of_lightnings_command_line_are_followed():
    check_schedulers([ReduceLROnPlateau(optim.SGD([torch.zeros(1)], lr=0.1), "loss")], True)


@pytest.mark.parametrize("method", ["get_lr", "step", "_get_closed_form_lr"])
def test_schedulers_that_compute_rates_themselves_are_refused(method):
    own = type("Own", (lrs.StepLR,), {method: lambda self, *args: [0.1]})
    scheduler = own(optim.SGD([torch.zeros(1)], lr=0.1), 2)
    with pytest.raises(TypeError, match="under the scheduler `Own`"):
        check_schedulers([scheduler], True)


class Grouped(Scheduled):
    """The layers have one rate, shaped by a function for each."""

    def configure_optimizers(self):
        lr = self.settings["lr"]
        groups = [{"params": layer.parameters(), "lr": lr} for layer in (self.net[0], self.net[2])]
        optimizer = optim.SGD(groups)
        factors = [lambda t: 0.1 * 0.9**t, lambda t: 1.0]
        scheduler = optim.lr_scheduler.LambdaLR(optimizer, factors)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def test_one_rate_under_a_function_for_each_group_trains_as_the_number_does():
    plain = Grouped(SCHEDULERS["lambda"], lr=0.1)
    fit(plain, steps=4)
    module = Grouped(SCHEDULERS["lambda"], lr=Hyperparameter(0.1, Positive()))
    callback = RTHO(hyper_batch_size=4, outer_optimizer=None)
    fit(module, callback, steps=4)
    assert all(map(torch.equal, module.parameters(), plain.parameters()))

    def loss_at(lr: float) -> float:
        module = Grouped(SCHEDULERS["lambda"], lr=lr)
        fit(module, steps=4)
        return validation_loss(module)

    (found,) = callback.hypergradients.values()
    # The differences err by 1e-10 of the loss; see `finite_difference`.
    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


class WarmedUpByHand(SmallNet):
    def on_train_batch_start(self, batch, batch_idx):
        (group,) = self.trainer.optimizers[0].param_groups
        group["lr"] = 0.1 * min(1.0, (self.global_step + 1) / 4)


@pytest.mark.parametrize("method", [RTHO, TRHO])
def test_a_rate_that_is_declared_but_not_tuned_is_the_users(method):
    plain = WarmedUpByHand(lr=0.1, l2=0.02)
    fit(plain, steps=8)
    lr, l2 = Hyperparameter(0.1, Positive()), Hyperparameter(0.02, Positive())
    module = WarmedUpByHand(lr=lr, l2=l2)
    module.rate = lr
    outer = lambda raw: torch.optim.SGD(raw, lr=0.0)  # updates that move nothing
    fit(module, method(["l2"], hyper_batch_size=2, outer_optimizer=outer), steps=8)
    for one, other in zip(plain.parameters(), module.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # l2 by way of its logarithm


def test_a_cycle_whose_upper_rate_torch_has_overwritten_is_refused():
    class Cyclic(SmallNet):
        def configure_optimizers(self):
            optimizer = optim.SGD(self.parameters(), lr=self.lr)
            cycle = lrs.CyclicLR(optimizer, 0.01, self.upper(), 2, cycle_momentum=False)
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

        def upper(self):
            return self.lr

    class Right(Cyclic):
        def upper(self):
            return float(self.lr)

    for module_class in (Cyclic, Right):
        module = module_class()
        module.lr = Hyperparameter(0.1, Positive())
        callback = RTHO(["lr"], hyper_batch_size=2)
        if module_class is Cyclic:
            with pytest.raises(ValueError, match="`max_lr` of CyclicLR"):
                fit(module, callback, steps=4)
        else:
            fit(module, callback, steps=4)
            assert len(callback.schedule) == 2
