"""What loggers are handed at every outer update, read back from what they wrote."""

import csv
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, optim

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    Interval,
    OuterUpdate,
    Positive,
    ReplaySchedule,
)
from lightning_rtho.callbacks._diagnostics import cosine
from tests.callbacks.problems import SmallNet, TwiceABatch, as_hyperparameters, fit

METHODS = {"forward": RTHO, "reverse": TRHO}
DIAGNOSTICS = ["hypergradient_cosine", "tangent_histogram", "tangent_norm"]
VALUES = {"lr": 0.1, "l2": 0.02}


class Recording(Logger):
    """Has what Lightning asks of every logger and no more, as those of MLflow and W&B may."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recording"

    @property
    def version(self) -> str:
        return "0"

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.calls.append((step, metrics))

    @property
    def by_name(self) -> dict[str, dict[int | None, float]]:
        found: dict[str, dict[int | None, float]] = {}
        for step, metrics in self.calls:
            for name, value in metrics.items():
                found.setdefault(name, {})[step] = value
        return found


class Shaped(SmallNet):
    """Tunes a learning rate, a penalty and a weight for each of four examples."""

    def __init__(self) -> None:
        super().__init__(lr=Hyperparameter(0.1, Positive()), l2=Hyperparameter(0.02, Positive()))
        self.weights = Hyperparameter(torch.full((4, 1), 0.5), Interval(0, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        penalty = self.l2 * sum(p.square().sum() for p in self.net.parameters())
        return (self.weights * (self.net(x) - y) ** 2).mean() + penalty


def expected_metrics(update: OuterUpdate) -> dict[str, float]:
    """What every update shall be logged as; a hyperparameter with a shape by its mean."""
    return {
        "outer_objective": update.outer_objective,
        **{f"hyperparameter/{n}": v.mean().item() for n, v in update.values.items()},
        **{f"hypergradient/{n}": v.mean().item() for n, v in update.hypergradients.items()},
    }


def flat(update: OuterUpdate) -> Tensor:
    return torch.cat([value.flatten() for value in update.hypergradients.values()])


def cosines(updates: Any) -> dict[int, float]:
    pairs = pairwise(updates)
    return {b.step: torch.cosine_similarity(flat(a), flat(b), dim=0).item() for a, b in pairs}


def read_csv(logger: CSVLogger) -> dict[str, dict[int, float]]:
    logger.save()
    found: dict[str, dict[int, float]] = {}
    with Path(logger.log_dir, "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value:
                    found.setdefault(name, {})[int(row["step"])] = float(value)
    return found


# Updates


@pytest.mark.parametrize("method", METHODS)
def test_every_update_is_in_the_csv_file_as_it_is_in_the_schedule(method, tmp_path):
    logger = CSVLogger(tmp_path)
    callback = METHODS[method](hyper_batch_size=2, diagnostics=["hypergradient_cosine"])
    fit(Shaped(), callback, steps=8, logger=logger)
    found = read_csv(logger)
    assert len(callback.schedule) == 4
    for update in callback.schedule:
        for name, value in expected_metrics(update).items():
            assert found[name][update.step] == value
    assert found["hypergradient_cosine"] == pytest.approx(cosines(callback.schedule), rel=1e-12)


def test_loggers_count_batches_where_steps_are_made_by_hand():
    logger = Recording()
    callback = RTHO(hyper_batch_size=4)
    module = TwiceABatch(lr=Hyperparameter(0.1, Positive()))
    fit(module, callback, steps=16, logger=logger, log_every_n_steps=1)
    assert [update.step for update in callback.schedule] == [4, 8, 12, 16]
    assert [*logger.by_name["outer_objective"]] == [2, 4, 6, 8]
    assert [*logger.by_name["loss"]] == [*range(8)]
    replayed = Recording()
    module = TwiceABatch(lr=Hyperparameter(0.1, Positive()))
    fit(module, ReplaySchedule(callback.schedule), steps=16, logger=replayed)
    assert [*replayed.by_name["hyperparameter/settings.lr"]] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("method", METHODS)
def test_a_logger_that_only_takes_metrics_is_handed_every_update(method):
    logger = Recording()
    callback = METHODS[method](hyper_batch_size=2)
    fit(Shaped(), callback, steps=6, logger=logger, log_every_n_steps=1000)
    assert [step for step, _ in logger.calls] == [2, 4, 6]
    for (_, metrics), update in zip(logger.calls, callback.schedule, strict=True):
        assert {
            n: v for n, v in metrics.items() if n != "safeguard/sensitivity"
        } == expected_metrics(update)
        assert all(type(value) is float for value in metrics.values())


# Diagnostics


def test_diagnostics_are_in_the_event_file(tmp_path):
    loggers = [TensorBoardLogger(tmp_path), Recording()]
    callback = RTHO(hyper_batch_size=2, diagnostics=DIAGNOSTICS)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*tangent_histogram")
        fit(Shaped(), callback, steps=6, logger=loggers)
    events = EventAccumulator(loggers[0].log_dir, size_guidance={"histograms": 0})
    events.Reload()
    logged = loggers[1].by_name
    assert logged["hypergradient_cosine"] == pytest.approx(cosines(callback.schedule), rel=1e-12)
    for name in ("hypergradient_cosine", *(f"tangent_norm/{n}" for n in callback.hyperparameters)):
        written = {scalar.step: scalar.value for scalar in events.Scalars(name)}
        assert written == pytest.approx(logged[name], rel=1e-6)  # TensorBoard keeps float32
    layers = ["net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"]
    assert len(events.Tags()["histograms"]) == 3 * len(layers)
    for name, hyper in callback.hyperparameters.items():
        histograms = [events.Histograms(f"tangent_histogram/{name}/{layer}") for layer in layers]
        for at_one_step in zip(*histograms, strict=True):
            step = at_one_step[0].step
            values = [event.histogram_value for event in at_one_step]
            assert [value.num for value in values] == [n * hyper.numel() for n in (9, 3, 3, 1)]
            square = sum(value.sum_squares for value in values)
            assert square == pytest.approx(logged[f"tangent_norm/{name}"][step] ** 2, rel=1e-12)


def test_tangent_norm_is_that_of_differences_of_the_trained_weights():
    logger = Recording()
    module = SmallNet(optim.Adam, eps=1e-3, **as_hyperparameters(VALUES))
    callback = RTHO(hyper_batch_size=5, outer_optimizer=None, diagnostics=["tangent_norm"])
    fit(module, callback, logger=logger)

    def weights_at(name: str, value: float) -> Tensor:
        module = SmallNet(optim.Adam, eps=1e-3, **{**VALUES, name: value})
        fit(module)
        return torch.cat([param.detach().flatten() for param in module.parameters()])

    for full_name in callback.hyperparameters:
        name = full_name.split(".")[-1]
        h = 1e-5 * VALUES[name]
        difference = weights_at(name, VALUES[name] + h) - weights_at(name, VALUES[name] - h)
        expected = difference.norm().item() / (2 * h)
        # Truncation is of order h^2, rounding 1e-16 / h.
        assert logger.by_name[f"tangent_norm/{full_name}"][5] == pytest.approx(expected, rel=1e-6)


def test_cosine_tells_agreeing_opposed_and_unrelated_directions():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])
    assert cosine([a, b], [2 * a, 2 * b]) == pytest.approx(1)
    assert cosine([a, b], [-a, -b]) == pytest.approx(-1)
    assert cosine([torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]) == 0


def test_cosine_with_a_hypergradient_of_zero_is_not_logged():
    class Flat(SmallNet):
        def outer_step(self, batch: Any, batch_idx: int) -> Tensor:
            return 0.0 * self.validation_step(batch, batch_idx)

    logger = Recording()
    fit(Flat(lr=0.1), RTHO(["lr"], hyper_batch_size=2, diagnostics=DIAGNOSTICS[:1]), logger=logger)
    assert "outer_objective" in logger.by_name
    assert "hypergradient_cosine" not in logger.by_name


def test_diagnostics_change_no_bit(tmp_path):
    found = []
    for diagnostics in ([], DIAGNOSTICS):
        module = Shaped()
        callback = RTHO(hyper_batch_size=2, diagnostics=diagnostics)
        fit(module, callback, steps=7, logger=TensorBoardLogger(tmp_path))
        found.append([*module.parameters(), *callback.hyperparameters.values()])
    assert all(map(torch.equal, *found))


def test_nothing_is_measured_unasked():
    logger = Recording()
    fit(Shaped(), RTHO(hyper_batch_size=2), steps=4, logger=logger)
    assert not any("tangent" in name or "cosine" in name for name in logger.by_name)


def test_logger_without_histograms_is_told_once():
    logger = Recording()
    callback = RTHO(["lr"], hyper_batch_size=2, diagnostics=DIAGNOSTICS)
    with pytest.warns(UserWarning, match="no logger of the trainer takes histograms") as warned:
        fit(SmallNet(lr=0.1), callback, steps=6, logger=logger)
    assert len([w for w in warned if "histograms" in str(w.message)]) == 1
    assert set(logger.by_name) >= {"tangent_norm/lr", "hypergradient_cosine"}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: RTHO(diagnostics=["tangents"]),
            ValueError,
            "`diagnostics` of RTHO must be among hypergradient_cosine, tangent_histogram, "
            "tangent_norm, got 'tangents'",
        ),
        (
            lambda: TRHO(diagnostics=["hypergradient_cosine", "tangent_norm"]),
            ValueError,
            "of TRHO must be among hypergradient_cosine, got 'tangent_norm'. `RTHO` alone",
        ),
        (
            lambda: RTHO(diagnostics="tangent_norm"),
            TypeError,
            r"must be a list of names, got 'tangent_norm'. Pass \['tangent_norm'\]",
        ),
    ],
    ids=["unknown", "reverse mode", "one name"],
)
def test_what_a_method_cannot_tell_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Clinical(SmallNet):
    """Its sensitivity is that of a test for a disease."""

    def validation_step(self, batch, batch_idx):
        self.log("sensitivity", 0.9)
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_a_metric_of_the_user_is_not_overwritten(make):
    callback = make(["lr"], hyper_batch_size=2, outer_optimizer=None)
    trainer = fit(Clinical(lr=0.1), callback, steps=6, check_val_every_n_epoch=1)
    assert trainer.callback_metrics["sensitivity"].item() == pytest.approx(0.9)
    assert ("safeguard/sensitivity" in trainer.callback_metrics) == (make is RTHO)


@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
def test_hyperparameters_stand_as_numbers_in_the_file_of_a_modules_arguments(make_logger, tmp_path):
    class Saving(SmallNet):
        def __init__(self, l2: Any, rates: Any) -> None:
            super().__init__(l2=l2, lr=0.1)
            self.save_hyperparameters()

    rates = Hyperparameter([0.25, 0.5], Positive())
    logger = make_logger(tmp_path)
    callback = RTHO(["l2"], hyper_batch_size=2)
    fit(Saving(Hyperparameter(0.02, Positive()), rates), callback, steps=2, logger=logger)
    written = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert written == {"l2": 0.02, "rates": [0.25, 0.5]}
