"""Differentiable torchmetrics metrics as outer objectives."""

from typing import Any

import lightning as L
import pytest
import torch
import torchmetrics
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import classification, regression
from torchmetrics.metric import Metric

from lightning_rtho import RTHO, TRHO, KeepGraph
from lightning_rtho.callbacks._metric import MetricObjective
from tests.callbacks.problems import (
    VAL_SIZE,
    SmallNet,
    as_hyperparameters,
    finite_difference,
    fit,
    loader,
)

STEPS = 6
VALUES = {"lr": 0.1, "momentum": 0.5, "l2": 0.02}
METHODS = {
    "forward": RTHO,
    "recompute": TRHO,
    "keep graph": lambda **a: TRHO(**a, tape=KeepGraph()),
}


class Predicting(SmallNet):
    """Predicts in `forward`; its validation loss is never asked for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pytest.fail("the metric takes its place")


class WithOuterStep(SmallNet):
    """Names predictions and targets itself."""

    def outer_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), batch[1]


class NegatedError(regression.MeanAbsoluteError):
    """To be maximized, and negative."""

    higher_is_better = True

    def compute(self) -> Tensor:
        return -super().compute()


def observed(make: Any, module: L.LightningModule, **settings: Any) -> L.Callback:
    callback = make(hyper_batch_size=STEPS, outer_optimizer=None, **settings)
    fit(module, callback, steps=STEPS)
    return callback


# Numbers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("net", [Predicting, WithOuterStep])
def test_mean_squared_error_equals_the_loss_written_out(method, net):
    class Written(SmallNet):
        def outer_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1])

    metric = regression.MeanSquaredError()
    by_metric = observed(METHODS[method], net(**as_hyperparameters(VALUES)), objective=metric)
    by_hand = observed(METHODS[method], Written(**as_hyperparameters(VALUES)))
    assert by_metric.schedule[-1].outer_objective == pytest.approx(
        by_hand.schedule[-1].outer_objective, rel=1e-12
    )
    for name, value in by_hand.hypergradients.items():
        torch.testing.assert_close(by_metric.hypergradients[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "metric", [regression.LogCoshError(), regression.R2Score()], ids=["minimized", "maximized"]
)
def test_hypergradients_are_those_of_the_metric_itself(method, metric):
    """Over two batches, whose sums the metric joins; R2 of both is not the mean of two R2."""
    data = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE // 2)

    def metric_at(name: str, value: float) -> float:
        module = Predicting(**{**VALUES, name: value})
        fit(module, steps=STEPS)
        module.eval()
        with torch.no_grad():
            preds = torch.cat([module(x) for x, _ in data])
        own = metric.clone().set_dtype(torch.float64)  # which it had not when it was made
        return own(preds.flatten(), torch.cat([y for _, y in data]).flatten()).item()

    class Flat(Predicting):
        def outer_step(self, batch, batch_idx):
            return self(batch[0]).flatten(), batch[1].flatten()

    settings = {"dataloader": data, "outer_batches": 2, "objective": metric}
    callback = observed(METHODS[method], Flat(**as_hyperparameters(VALUES)), **settings)
    (update,) = callback.schedule
    assert update.outer_objective == pytest.approx(metric_at("lr", VALUES["lr"]), rel=1e-12)
    for full_name, found in callback.hypergradients.items():
        name = full_name.split(".")[-1]
        expected = finite_difference(VALUES[name], lambda v, name=name: metric_at(name, v))
        assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "MinkowskiDistance": {"p": 3},
    "MulticlassHingeLoss": {"num_classes": 3},
}
OF_DISTRIBUTIONS = {"KLDivergence", "JensenShannonDivergence"}


def _differentiable() -> list[type[Metric]]:
    """What torchmetrics calls differentiable, but for what computes in float32."""
    classes = [getattr(m, name) for m in (regression, classification) for name in m.__all__]
    found = [cls for cls in classes if getattr(cls, "is_differentiable", None) is True]
    return [cls for cls in found if cls is not regression.CosineSimilarity]


@pytest.mark.parametrize("cls", _differentiable(), ids=lambda cls: cls.__name__)
def test_gradient_of_a_metric_over_two_batches_is_exact(cls):
    name = cls.__name__
    direction = {"higher_is_better": bool(cls.higher_is_better)}  # of two it is None
    metric = MetricObjective(type(name, (cls,), direction)(**OPTIONS.get(name, {})))
    shape = (2, 4, 3) if name in OF_DISTRIBUTIONS or name == "MulticlassHingeLoss" else (2, 8)
    preds = torch.rand(shape).softmax(-1).requires_grad_()
    target = torch.rand(shape).softmax(-1)
    if "Hinge" in name:
        target = torch.randint(2, shape[:2])  # classes
    assert torch.autograd.gradcheck(lambda p: metric(zip(p, target, strict=True)), preds)


def test_what_the_metric_has_accumulated_stays():
    metric = regression.MeanSquaredError()
    metric.update(torch.ones(3), torch.zeros(3))
    before = {name: value.clone() for name, value in metric.metric_state.items()}
    module = Predicting(lr=0.1)
    module.metric = metric
    callback = RTHO(["lr"], hyper_batch_size=2, objective=metric)
    fit(module, callback, steps=4)
    assert metric.update_count == 1
    for name, value in metric.metric_state.items():
        assert torch.equal(value, before[name])
    assert [u.outer_objective for u in callback.schedule] != [1.0, 1.0]


# Direction


@pytest.mark.parametrize("method", METHODS)
def test_metric_to_be_maximized_rises_and_is_shown_as_it_is(method):
    values = {}
    for metric in (regression.MeanAbsoluteError(), NegatedError()):
        # Three updates: so few that no rate climbs, as it would with the first metric alone.
        callback = METHODS[method](hyperparameters=["lr"], hyper_batch_size=6, objective=metric)
        fit(Predicting(lr=1e-3), callback, steps=20)
        values[type(metric)] = callback
    less, more = values.values()
    for one, other in zip(less.schedule, more.schedule, strict=True):
        assert one.outer_objective == -other.outer_objective
        assert torch.equal(one.hypergradients["lr"], -other.hypergradients["lr"])
        assert torch.equal(one.values["lr"], other.values["lr"])
    objectives = [update.outer_objective for update in more.schedule]
    assert objectives[0] < objectives[-1] < 0


def test_lost_run_goes_back_by_the_size_of_a_metric_that_has_one_sign():
    for metric, goes_back in ((regression.MeanAbsoluteError(), True), (NegatedError(), False)):
        callback = TRHO(["lr"], hyper_batch_size=2, objective=metric)
        fit(Predicting(lr=10.0), callback, steps=6)
        assert any(u.safeguard == "restored" for u in callback.schedule) == goes_back


# Refusals


class NoDirection(regression.MeanSquaredError):
    higher_is_better = None


class Rounded(regression.MeanSquaredError):
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.detach(), target)


class PartlyDetached(regression.MeanSquaredError):
    """Weighs errors by their own size, which it takes for constant."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        weight = (preds - target).abs().detach()
        super().update(weight * preds, weight * target)


class LateDetached(regression.MeanSquaredError):
    """Joins what it knows of two batches, of which the first is detached."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        self.sum_squared_error = self.sum_squared_error.detach()
        super().update(preds, target)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            torchmetrics.Accuracy(task="binary"),
            r"`objective` must be a differentiable metric, got `BinaryAccuracy`, whose "
            r"`is_differentiable` is False.*family: BinaryHingeLoss, MulticlassHingeLoss\. Or",
        ),
        (regression.SpearmanCorrCoef(), r"got `SpearmanCorrCoef`.*ConcordanceCorrCoef.*R2Score"),
        (regression.MeanSquaredError() + 1, r"got `CompositionalMetric`.* is None"),
        (NoDirection(), r"whether more is better, got `NoDirection`.*subclass that sets it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_metric_without_derivative_or_direction_is_refused_at_construction(metric, message):
    with pytest.raises(ValueError, match=message):
        RTHO(["lr"], objective=metric)


def test_something_else_is_refused_at_construction():
    with pytest.raises(TypeError, match="`objective` must be a torchmetrics metric, got 'mse'"):
        TRHO(["lr"], objective="mse")


class Untouched(Predicting):
    """Fails the test if training begins."""

    def on_train_batch_start(self, *args: Any) -> None:
        pytest.fail("training began")


class ReturnsLoss(Untouched):
    def outer_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.net(batch[0]), batch[1])


class NoForward(SmallNet):
    on_train_batch_start = Untouched.on_train_batch_start


class Detached(Untouched):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Wide(Untouched):
    def __init__(self, **settings: Any) -> None:
        super().__init__(body=lambda: nn.Linear(3, 2), **settings)

    def outer_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]), batch[1].expand(-1, 2)


@pytest.mark.parametrize("method", [RTHO, TRHO])
@pytest.mark.parametrize(
    ("net", "metric", "message"),
    [
        (NoForward, regression.MeanSquaredError(), "`NoForward` defines no `forward`"),
        (ReturnsLoss, regression.MeanSquaredError(), "`outer_step` must return two .* shape"),
        (Detached, regression.MeanSquaredError(), "got `MeanSquaredError`, which has no"),
        (Untouched, Rounded(), "got `Rounded`, which has no graph"),
        (Untouched, PartlyDetached(), "got `PartlyDetached`, which detaches a part"),
        (Untouched, LateDetached(), "got `LateDetached`, which detaches a part"),
        (Wide, regression.CosineSimilarity(reduction="none"), "a metric with one value, got `Cos"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_gives_no_gradient_is_refused_before_a_weight_moves(method, net, metric, message):
    module = net(lr=0.1)
    before = [param.detach().clone() for param in module.parameters()]
    with pytest.raises(MisconfigurationException, match=message):
        fit(module, method(["lr"], outer_batches=2, objective=metric), steps=2)
    assert all(map(torch.equal, before, module.parameters()))


def test_batch_that_is_no_pair_is_refused():
    data = [torch.randn(2, 3)] * 2
    callback = RTHO(["lr"], objective=regression.MeanSquaredError(), dataloader=[data[0]])
    with pytest.raises(MisconfigurationException, match="batch must hold two things, got a tensor"):
        fit(Untouched(lr=0.1), callback, steps=2)
