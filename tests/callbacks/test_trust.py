"""An observing callback leaves training bitwise as it was."""

import copy
import random
import warnings
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn, optim

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    Interval,
    KeepGraph,
    Positive,
    Recompute,
    ReplaySchedule,
    Schedule,
)
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


class SharedMemory(SmallNet):
    """A weight is the sum of two, so that autograd gives both one gradient, in one memory."""

    def __init__(self) -> None:
        super().__init__(lr=0.05, momentum=0.9, nesterov=True, foreach=True)
        self.change = nn.Parameter(torch.ones(1, FEATURES))
        self.net = nn.Linear(FEATURES, 1)

    def training_step(self, batch, batch_idx):
        weight = self.net.weight + self.change
        return nn.functional.mse_loss(batch[0] @ weight.T + self.net.bias, batch[1])

    def configure_optimizers(self):
        return self.optimizer_class(self.parameters(), **self.settings)


class ServesStatistics(SmallNet):
    """A layer acts on the running statistics alone, so that its weights have no gradient."""

    def __init__(self) -> None:
        super().__init__(optim.AdamW, lr=0.01, weight_decay=0.1)
        self.head = nn.Linear(FEATURES, 4)
        self.norm = nn.BatchNorm1d(4, affine=False)

    def training_step(self, batch, batch_idx):
        self.norm(self.head(batch[0]))
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return self.optimizer_class(self.parameters(), **self.settings)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("make", [SharedMemory, ServesStatistics])
def test_observing_changes_no_weight_whatever_autograd_makes_of_its_gradient(make, observer):
    callback = OBSERVERS[observer]()
    callback._selection = ["lr"]
    plain, observed = make(), make()
    fit(plain, steps=9)
    fit(observed, callback, steps=9)
    trained = zip(plain.parameters(), observed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in trained)
    assert len(callback.schedule) == 3


class KnowsWhere(SmallNet):
    """Writes beside its logs, and keeps a frozen teacher that was scripted."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.teacher = torch.jit.script(nn.Linear(FEATURES, 1).requires_grad_(False))
        self.places: set[Any] = set()

    def _look(self) -> None:
        logger = self.logger
        self.places.add((self.trainer.log_dir, logger.log_dir, logger.name, logger.version))

    def training_step(self, batch, batch_idx):
        self._look()
        return super().training_step((batch[0], batch[1] + self.teacher(batch[0])), batch_idx)

    def validation_step(self, batch, batch_idx):
        self._look()
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("make_logger", [CSVLogger, TensorBoardLogger])
def test_steps_made_for_us_know_where_the_run_writes(make_logger, observer, tmp_path):
    callback = OBSERVERS[observer]()
    callback._selection = ["lr"]
    module = KnowsWhere(lr=0.1)
    logger = make_logger(tmp_path, name="run")
    fit(module, callback, steps=9, logger=logger)
    assert module.places == {(logger.log_dir, logger.log_dir, "run", 0)}
    assert len(callback.schedule) == 3


class TakesBatchesApart(SmallNet):
    """Changes the dict, or the object, that holds its batch."""

    def on_after_batch_transfer(self, batch, dataloader_idx):
        held = {"x": batch[0], "y": batch[1]}
        return SimpleNamespace(**held) if self.trainer.training and self.as_object else held

    def training_step(self, batch, batch_idx):
        if isinstance(batch, SimpleNamespace):
            batch.x = 2 * batch.x
            return super().training_step((batch.x, batch.y), batch_idx)
        return super().training_step((batch["x"], batch.pop("y")), batch_idx)

    def validation_step(self, batch, batch_idx):
        return super().validation_step((batch.pop("x"), batch.pop("y")), batch_idx)


@pytest.mark.parametrize("as_object", [False, True])
def test_steps_may_change_what_holds_their_batch(as_object):
    found = []
    for make in (RTHO, TRHO):
        module = TakesBatchesApart(lr=0.1)
        module.as_object = as_object
        callback = make(["lr"], hyper_batch_size=4, outer_optimizer=None)
        fit(module, callback, steps=4)
        found.append(callback.hypergradients["lr"])
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)  # the two methods round differently


def test_a_part_of_a_batch_may_be_taken_apart():
    module = TakesBatchesApart(lr=0.1)
    module.as_object = False
    callback = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None, curvature_fraction=0.5)
    fit(module, callback, steps=4)
    assert len(callback.schedule) == 1


class SkipsBeforeValidation(SmallNet):
    """Its last training step before a validation has no loss."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx == 2 else loss

    def validation_step(self, batch, batch_idx):
        if not self.trainer.training:
            self.kernels = torch.embedding
        return super().validation_step(batch, batch_idx)


def test_kernels_of_followed_steps_are_not_those_of_validation():
    module, kernel = SkipsBeforeValidation(lr=0.1), torch.embedding
    callback = RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None)
    fit(module, callback, steps=6, check_val_every_n_epoch=1, val_check_interval=3)
    assert module.kernels is kernel


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_a_rate_finder_before_the_fit_leaves_the_run_as_it_is_without(make):
    runs = []
    for finds in (False, True):
        callback = make(["lr"], hyper_batch_size=2)
        module = SmallNet(lr=0.1)
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=16,
            callbacks=[callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = {
            "train_dataloaders": loader(20, seed=1, batch_size=4),
            "val_dataloaders": loader(6, seed=2, batch_size=6),
        }
        if finds:
            Tuner(trainer).lr_find(module, num_training=5, update_attr=False, **data)
        L.seed_everything(7, verbose=False)
        trainer.fit(module, **data)
        runs.append(callback.schedule)
    assert runs[1].start == runs[0].start
    assert runs[0].start
    assert [update.values for update in runs[1]] == [update.values for update in runs[0]]


def test_a_fit_without_a_step_leaves_no_trace():
    module, callback = SmallNet(lr=0.1), RTHO(["lr"], hyper_batch_size=2)
    trainer = fit(module, callback, steps=-1, max_epochs=0)
    assert type(trainer.optimizers[0]) is optim.SGD
    trainer = fit(module, ReplaySchedule(Schedule(start={"lr": torch.tensor(0.1)})), max_epochs=0)
    assert type(trainer.optimizers[0]) is optim.SGD


def test_an_evaluated_run_that_has_ended_is_not_that_of_the_next_fit(tmp_path):
    first = RTHO(["lr"], hyper_batch_size=2)
    fit(SmallNet(lr=0.1), first, steps=4).save_checkpoint(tmp_path / "end.ckpt")
    callback = RTHO(["lr"], hyper_batch_size=2)
    fit(SmallNet(lr=0.1), callback, steps=4, ckpt_path=tmp_path / "end.ckpt")
    assert callback.schedule.steps == first.schedule.steps == [2, 4]
    fit(SmallNet(lr=0.1), callback, steps=6)
    assert callback.schedule.steps == [2, 4, 6]


class MeanTeacher(SmallNet):
    """A second network follows the first, and has a part in its loss."""

    def __init__(self, moves_in: str, moves_by: str = "lerp_", **settings: Any) -> None:
        super().__init__(**settings)
        self.moves_in, self.moves_by = moves_in, moves_by
        self.frozen = nn.Linear(FEATURES, 1).requires_grad_(False)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        nn.init.ones_(self.teacher[0].weight)

    def _teach(self) -> None:
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                if self.moves_by == "lerp_":
                    old.lerp_(new, 0.3)
                elif self.moves_by == "data":
                    old.data.lerp_(new.data, 0.3)
                else:
                    old.data = old.data.lerp(new.data, 0.3)

    def training_step(self, batch, batch_idx):
        taught = self.teacher(batch[0]) + self.frozen(batch[0])
        loss = super().training_step(batch, batch_idx)
        loss = loss + nn.functional.mse_loss(self.net(batch[0]), taught)
        if self.moves_in == "step":
            self._teach()
        return loss

    def on_train_batch_end(self, *args: Any) -> None:
        if self.moves_in == "end" or (self.moves_in == "late" and self.global_step > 4):
            self._teach()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    ("moves_in", "moves_by"),
    [
        ("step", "lerp_"),
        ("end", "lerp_"),
        ("late", "lerp_"),
        ("step", "data"),
        ("end", "data"),
        ("step", "assigned"),
        ("end", "assigned"),
    ],
)
def test_a_mean_teacher_stands_where_it_stood_while_steps_are_made_again(
    moves_in, moves_by, accumulate
):
    found, weights = [], []
    for tape in (None, Recompute(), KeepGraph()):
        callback = TRHO(["lr"], hyper_batch_size=3, outer_optimizer=None, tape=tape or Recompute())
        module = MeanTeacher(moves_in, moves_by, lr=0.05)
        callbacks = [] if tape is None else [callback]
        fit(module, *callbacks, steps=12, accumulate_grad_batches=accumulate)
        weights.append([*module.parameters()])
        found.append([update.hypergradients["lr"] for update in callback.schedule])
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    # A window in which the teacher sets out late begins there.
    skipped = 1 if moves_in == "late" else 0
    compared = [(a, b) for i, (a, b) in enumerate(zip(*found[1:], strict=True)) if i != skipped]
    compared = compared if skipped else [*zip(*found[1:], strict=True)]
    for recomputed, kept in compared:
        torch.testing.assert_close(recomputed, kept, rtol=1e-10, atol=0)  # rounding
    assert len(compared) == 4 - skipped


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "observe", [RTHO, TRHO, lambda *a, **kw: RTHO(*a, **kw, curvature_fraction=0.5)]
)
def test_a_moving_weight_that_gradients_flow_through_is_read_where_it_stood(observe, accumulate):
    class AsNumber(SmallNet):
        number = 1.0

        def scale(self):
            return self.number

        def training_step(self, batch, batch_idx):
            return nn.functional.mse_loss(self.net(batch[0]) * self.scale(), batch[1])

        def on_train_batch_end(self, *args: Any) -> None:
            self.number *= 0.9

    class AsWeight(AsNumber):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.weight = nn.Parameter(torch.ones(1, 1), requires_grad=False)

        def scale(self):
            return self.weight

        def on_train_batch_end(self, *args: Any) -> None:
            self.weight.data.mul_(0.9)

    found = []
    for kind in (AsNumber, AsWeight):
        callback = observe(["lr"], hyper_batch_size=2, outer_optimizer=None)
        fit(kind(lr=0.1), callback, steps=8, accumulate_grad_batches=accumulate)
        found.append([update.hypergradients["lr"] for update in callback.schedule])
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)  # rounding


@pytest.mark.parametrize("observer", OBSERVERS)
def test_a_teacher_in_eval_mode_runs_on_the_fast_path_that_it_has(observer):
    class Taught(SmallNet):
        def __init__(self) -> None:
            super().__init__(lr=Hyperparameter(0.1, Positive()))
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.teacher = nn.TransformerEncoder(layer, 2).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.teacher.eval()
            words = batch[0][:, :1, None].expand(-1, 3, 4)
            padding = torch.zeros(len(words), 3, dtype=torch.bool)
            padding[1:, -1] = True
            taught = self.teacher(words, src_key_padding_mask=padding)
            return nn.functional.mse_loss(self.net(batch[0]), taught.mean((1, 2))[:, None])

    plain, observed = Taught(), Taught()
    fit(plain, steps=8)
    callback = OBSERVERS[observer]()
    fit(observed, callback, steps=8)
    assert all(map(torch.equal, plain.net.parameters(), observed.net.parameters()))
    assert len(callback.schedule) == 2


class Overwriting(SmallNet):
    """Writes to its batch."""

    def training_step(self, batch, batch_idx):
        batch[0].mul_(0.5).add_(0.1)
        return super().training_step(batch, batch_idx)


def test_a_step_that_writes_to_its_batch_is_made_again_as_it_was():
    settings = {"hyper_batch_size": 3, "outer_optimizer": None}
    plain, found = Overwriting(lr=0.1), []
    fit(plain, steps=10)
    for callback in (
        TRHO(["lr"], **settings, start_step=1, tape=KeepGraph()),
        TRHO(["lr"], **settings),  # leaves the first step out
        RTHO(["lr"], **settings, curvature_fraction=0.5),
    ):
        observed = Overwriting(lr=0.1)
        if isinstance(callback, TRHO) and callback.start_step == 1:
            fit(observed, callback, steps=10)
        else:
            with pytest.warns(UserWarning, match="wrote to its batch at step 0: hypergradients"):
                fit(observed, callback, steps=10)
        assert all(map(torch.equal, plain.parameters(), observed.parameters()))
        assert [update.step for update in callback.schedule] == [4, 7, 10]
        found.append([update.hypergradients["lr"] for update in callback.schedule])
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=0)  # rounding


def test_examples_drawn_of_a_batch_that_is_written_to_are_copies():
    class Once(Overwriting):
        def training_step(self, batch, batch_idx):
            step = super() if self.global_step == 3 else super(Overwriting, self)
            return step.training_step(batch, batch_idx)

    callback = RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None, curvature_fraction=0.5)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*wrote to its batch")
        fit(Once(lr=0.1), callback, steps=8)
    assert [update.step for update in callback.schedule] == [2, 4, 6, 8]


FUNCTION_TRANSFORMS = {
    "forward": (RTHO, None),
    "recompute": (TRHO, r"uses `torch.func` beside a network"),
    "keep graph": (lambda *a, **kw: TRHO(*a, **kw, tape=KeepGraph()), "saved tensor hooks"),
}


@pytest.mark.parametrize("method", FUNCTION_TRANSFORMS)
def test_function_transforms_beside_a_moving_network_are_followed_or_explained(method):
    class Smooth(MeanTeacher):
        def training_step(self, batch, batch_idx):
            slopes = torch.func.grad(lambda x: self.net(x).sum())(batch[0])
            return super().training_step(batch, batch_idx) + slopes.square().mean()

    make, message = FUNCTION_TRANSFORMS[method]
    callback = make(["lr"], hyper_batch_size=2, outer_optimizer=None)
    if message is None:
        fit(Smooth("step", lr=0.05), callback, steps=8)
        assert len(callback.schedule) == 4
    else:
        with pytest.raises((RuntimeError, MisconfigurationException), match=message) as caught:
            fit(Smooth("step", lr=0.05), callback, steps=8)
        said = [str(caught.value), *getattr(caught.value, "__notes__", ())]
        assert any("Use `RTHO`" in text for text in said)


@pytest.mark.parametrize("observe", [TRHO, lambda *a, **kw: RTHO(*a, **kw, curvature_fraction=0.5)])
def test_a_teacher_that_takes_gradients_but_gets_none_moves_once_a_step(observe):
    class Careless(MeanTeacher):
        def __init__(self, **settings: Any) -> None:
            super().__init__("step", **settings)
            self.teacher.requires_grad_()

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                taught = self.teacher(batch[0])
            self._teach()
            return nn.functional.mse_loss(self.net(batch[0]), taught)

    callback = observe(["lr"], hyper_batch_size=2, outer_optimizer=None)
    plain, observed = Careless(lr=0.05), Careless(lr=0.05)
    fit(plain, steps=6)
    fit(observed, callback, steps=6)
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))
    assert len(callback.schedule) == 3


def silu_and_groups() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Mish(), nn.Linear(4, 1)
    )


class Recurrent(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.LSTM(FEATURES, 4, 2), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self[1](self[0](x)[0])


@pytest.mark.parametrize("observe", [RTHO, TRHO, lambda *a, **kw: TRHO(*a, **kw, tape=KeepGraph())])
@pytest.mark.parametrize("body", [silu_and_groups, Recurrent])
def test_observing_layers_that_torch_differentiates_otherwise_for_graphs_changes_nothing(
    body, observe
):
    torch.set_default_dtype(torch.float32)
    plain, observed = (SmallNet(lr=0.1, body=body) for _ in range(2))
    fit(plain, steps=8)
    callback = observe(["lr"], hyper_batch_size=2, outer_optimizer=None)
    fit(observed, callback, steps=8)
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))
    assert len(callback.schedule) == 4
