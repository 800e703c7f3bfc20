"""A run resumed from a checkpoint goes on bitwise as if it had not been interrupted."""

import enum
import itertools
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    KeepGraph,
    NonNegative,
    Offload,
    Positive,
    load_hyperparameters,
)
from lightning_rtho.hypergradient import ReverseHypergradient
from tests.callbacks.problems import FEATURES, TRAIN_SIZE, SmallNet, fit, loader

STEPS = 13


class ResumableLoader:
    """Batches in order; knows where it stands, as torchdata's stateful loader does."""

    def __init__(self) -> None:
        self.batches = list(loader(TRAIN_SIZE, seed=1, batch_size=4))
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]
        self.position = 0

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def body() -> nn.Module:
    return nn.Sequential(
        nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.3), nn.Linear(4, 1)
    )


def make_module() -> SmallNet:
    return SmallNet(
        optim.Adam,
        body=body,
        lr=Hyperparameter(0.01, Positive()),
        l2=Hyperparameter(1e-3, Positive()),
    )


def run(
    callback: L.Callback | None,
    path: Path,
    *others: L.Callback,
    module: SmallNet | None = None,
    **settings: Any,
) -> tuple[SmallNet, L.Trainer]:
    module = make_module() if module is None else module
    checkpoint = ModelCheckpoint(
        path,
        save_top_k=-1,
        every_n_train_steps=1,
        filename="{step}",
        save_last=settings.pop("save_last", None),
    )
    ckpt_path = settings.pop("ckpt_path", None)
    L.seed_everything(settings.pop("seed", 7), verbose=False)
    trainer = L.Trainer(
        accelerator=settings.pop("accelerator", "cpu"),
        devices=1,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[c for c in (callback, *others, checkpoint) if c is not None],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        check_val_every_n_epoch=1000,
        **settings,
    )
    trainer.fit(
        module,
        ResumableLoader(),
        loader(6, seed=2, batch_size=2, shuffle=True),
        ckpt_path=ckpt_path,
    )
    return module, trainer


def final(module: SmallNet, trainer: L.Trainer, callback: Any) -> dict[str, Any]:
    tensors = {f"module.{name}": value for name, value in module.state_dict().items()}
    state = trainer.optimizers[0].state_dict()
    tensors |= {f"{i}.{k}": v for i, s in state["state"].items() for k, v in s.items()}
    tensors |= {f"value.{name}": value for name, value in callback.hyperparameters.items()}
    for update in callback.schedule:
        tensors[f"{update.step}.objective"] = torch.tensor(update.outer_objective)
        for name, value in update.hypergradients.items():
            tensors[f"{update.step}.{name}"] = value
    tensors["rng"] = torch.get_rng_state()
    return tensors


METHODS = {
    "rtho": lambda: RTHO(hyper_batch_size=3),
    "discounted": lambda: RTHO(hyper_batch_size=3, discount=0.5),
    "rounded": lambda: RTHO(hyper_batch_size=3, tangent_dtype=torch.bfloat16),
    "recompute": lambda: TRHO(hyper_batch_size=3),
    "offload": lambda: TRHO(hyper_batch_size=3, tape=Offload("cpu")),
    "keep graph": lambda: TRHO(hyper_batch_size=3, tape=KeepGraph()),
}


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """Uninterrupted runs with a checkpoint after each step, each made once."""
    made: dict[tuple[str, int], tuple[dict[str, Any], Path]] = {}

    def get(method: str, accumulate: int) -> tuple[dict[str, Any], Path]:
        if (method, accumulate) not in made:
            path = tmp_path_factory.mktemp("whole")
            callback = METHODS[method]()
            result = final(*run(callback, path, accumulate_grad_batches=accumulate), callback)
            assert len(callback.schedule) == 4
            made[method, accumulate] = result, path
        return made[method, accumulate]

    return get


@pytest.mark.parametrize(
    ("method", "accumulate", "interrupted_at"),
    [
        *(("rtho", accumulate, step) for accumulate in (1, 2) for step in (3, 5, 7)),
        *(("recompute", accumulate, step) for accumulate in (1, 2) for step in (5, 6, 7)),
        *((method, 1, 7) for method in ("discounted", "rounded", "offload")),
        ("keep graph", 1, 6),  # a graph lives in memory alone: resumed where a window ends
    ],
)
def test_rest_of_the_run_is_bitwise_the_uninterrupted_one(
    method, accumulate, interrupted_at, whole_runs, tmp_path
):
    expected, path = whole_runs(method, accumulate)
    file = path / f"step={interrupted_at}.ckpt"
    torch.load(file, weights_only=True)
    resumed = METHODS[method]()
    settings = {"accumulate_grad_batches": accumulate, "ckpt_path": file, "seed": 99}
    found = final(*run(resumed, tmp_path, **settings), resumed)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize("step", [2, 7])
@pytest.mark.parametrize("moves", [True, False])
def test_velocity_that_torch_does_not_keep_is_in_a_checkpoint(moves, step, tmp_path):
    settings = {} if moves else {"outer_optimizer": None}
    found = []
    for ckpt_path in (None, tmp_path / f"step={step}.ckpt"):
        module = SmallNet(lr=0.1, momentum=Hyperparameter(0.0, NonNegative()))
        callback = RTHO(hyper_batch_size=3, **settings)
        trained = run(callback, tmp_path, module=module, ckpt_path=ckpt_path)
        found.append(final(*trained, callback))
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


class Mode(enum.StrEnum):
    FAST = "fast"


class Annealed(SmallNet):
    """Its hook moves a buffer and a number of numpy's; it holds a string of a class of its own."""

    def __init__(self) -> None:
        super().__init__(optim.Adam, lr=Hyperparameter(0.01, Positive()))
        self.register_buffer("beta", torch.zeros(()))
        self.mode, self.scale = Mode.FAST, np.sqrt(2.0)

    def on_train_epoch_start(self):
        self.beta += 0.1
        self.scale = np.sqrt(2.0 + self.current_epoch)

    def training_step(self, batch, batch_idx):
        return (self.scale + self.beta) * super().training_step(batch, batch_idx)


def test_a_window_is_resumed_with_what_its_steps_depended_on(tmp_path):
    found = []
    for ckpt_path in (None, tmp_path / "step=4.ckpt"):  # of an epoch that ends within the window
        callback = TRHO(hyper_batch_size=6)
        trained = run(callback, tmp_path, module=Annealed(), ckpt_path=ckpt_path)
        found.append(final(*trained, callback))
        torch.load(tmp_path / "step=4.ckpt", weights_only=True)  # as Lightning reads it
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


class Interrupted(Exception):
    """What ends a run."""


class EndsEarly(SmallNet):
    """Is interrupted in a training step, or stops after it."""

    def __init__(self, interrupted_at: int | None = None, stops_at: int | None = None) -> None:
        super().__init__(optim.Adam, body=body, lr=Hyperparameter(0.01, Positive()))
        self.interrupted_at, self.stops_at = interrupted_at, stops_at

    def training_step(self, batch, batch_idx):
        if self.global_step == self.interrupted_at:
            raise Interrupted
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.trainer.should_stop = self.global_step == self.stops_at


class OneBatch:
    """The same batch again and again, wherever it stood; draws no random numbers."""

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[list[Tensor]]:
        (batch,) = loader(4, seed=1, batch_size=4)
        return itertools.repeat(batch, 100)


@pytest.mark.parametrize("ending", ["exception", "end"])
@pytest.mark.parametrize("method", ["rtho", "recompute"])
def test_checkpoint_of_where_a_run_ended_goes_on_bitwise(method, ending, tmp_path):
    settings = {"train": OneBatch(), "enable_checkpointing": True}
    callback = METHODS[method]()
    whole = EndsEarly()
    whole_trainer = fit(whole, callback, steps=STEPS, **settings)
    expected = final(whole, whole_trainer, callback)
    if ending == "exception":
        keeper = OnExceptionCheckpoint(tmp_path, "ended")
        with pytest.raises(Interrupted):
            fit(EndsEarly(interrupted_at=7), METHODS[method](), keeper, steps=STEPS, **settings)
    else:
        trainer = fit(EndsEarly(stops_at=7), METHODS[method](), steps=STEPS, **settings)
        trainer.save_checkpoint(tmp_path / "ended.ckpt")
    callback, module = METHODS[method](), EndsEarly()
    found = final(
        module,
        fit(module, callback, steps=STEPS, ckpt_path=tmp_path / "ended.ckpt", **settings),
        callback,
    )
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def interrupt(*args: Any) -> None:
    raise Interrupted


def step_and_interrupt(optimizer: Any, closure: Any = None) -> None:
    closure()
    raise Interrupted


@pytest.mark.parametrize(
    ("place", "name", "break_off"),
    [(ReverseHypergradient, "advance", interrupt), (optim.Adam, "step", step_and_interrupt)],
    ids=["before", "within"],
)
def test_run_that_ended_in_the_midst_of_an_update_keeps_its_values_and_does_not_climb(
    place, name, break_off, tmp_path, monkeypatch
):

    settings = {"train": OneBatch(), "enable_checkpointing": True}

    class Breaks(L.Callback):
        def on_before_optimizer_step(self, trainer, *args):
            if trainer.global_step == 60:
                monkeypatch.setattr(place, name, break_off)

    keeper = OnExceptionCheckpoint(tmp_path, "ended")
    first = TRHO(hyper_batch_size=2)
    with pytest.raises(Interrupted):
        fit(EndsEarly(), first, Breaks(), keeper, steps=100, **settings)
    monkeypatch.undo()
    state = torch.load(tmp_path / "ended.ckpt", weights_only=True)["callbacks"]
    assert ["run" in s for k, s in state.items() if k.startswith("TRHO")] == [False]
    resumed = TRHO(hyper_batch_size=2)
    fit(EndsEarly(), resumed, steps=70, ckpt_path=tmp_path / "ended.ckpt", **settings)
    rates = [update.values["settings.lr"].item() for update in resumed.schedule]
    assert resumed.schedule.steps[:30] == list(range(2, 62, 2))
    assert len(resumed.schedule) > 33
    # A climb would multiply the rate by 2.7 or more each time.
    assert all(after < 1.5 * before for before, after in itertools.pairwise(rates[29:]))


class Growing(SmallNet):
    """Trains its last layer, and from the fourth and fifth step on its second and its first."""

    def __init__(self, *, grown: bool = False) -> None:
        layers = lambda: nn.Sequential(*(nn.Linear(FEATURES, FEATURES) for _ in range(3)))
        super().__init__(optim.SGD, body=layers, lr=Hyperparameter(0.1, Positive()))
        self.grown = grown

    def configure_optimizers(self):
        optimizer = optim.SGD(self.net[2].parameters(), lr=self.settings["lr"], momentum=0.5)
        if self.grown:
            self.grow(optimizer, 3)
            self.grow(optimizer, 4)
        return optimizer

    def on_train_batch_start(self, batch, batch_idx):
        if not self.grown:
            self.grow(self.trainer.optimizers[0], self.global_step)

    def grow(self, optimizer: optim.Optimizer, step: int) -> None:
        if step in (3, 4):
            optimizer.add_param_group({"params": self.net[4 - step].parameters(), "lr": 0.02})


class Thawing(BackboneFinetuning):
    """Thaws what it has thawed before; Lightning's own leaves it frozen when it resumes."""

    def __init__(self) -> None:
        super().__init__(1, lambda epoch: 1.0, backbone_initial_lr=0.03)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_fit_start(trainer, module)
        for group in trainer.optimizers[0].param_groups:
            for param in group["params"]:
                param.requires_grad_()


class TwoParts(SmallNet):
    def __init__(self) -> None:
        super().__init__(optim.SGD, lr=Hyperparameter(0.1, Positive()))
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return optim.SGD(self.net[2].parameters(), lr=self.settings["lr"], momentum=0.5)


ADDED = {
    "backbone": lambda resumes: (TwoParts(), [Thawing()]),
    "bystanders": lambda resumes: (Growing(grown=resumes), []),
}


@pytest.mark.parametrize("method", ["rtho", "recompute"])
@pytest.mark.parametrize("added", ADDED)
def test_run_whose_optimizer_was_given_groups_resumes_bitwise(added, method, tmp_path):
    found = []
    for ckpt_path in (None, tmp_path / "step=7.ckpt"):
        callback = METHODS[method]()
        module, others = ADDED[added](ckpt_path is not None)
        found.append(
            final(*run(callback, tmp_path, *others, module=module, ckpt_path=ckpt_path), callback)
        )
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


def test_checkpoint_of_other_parameters_is_refused(tmp_path):
    run(RTHO(hyper_batch_size=3), tmp_path, Thawing(), module=TwoParts())
    settings = {"module": TwoParts(), "ckpt_path": tmp_path / "step=3.ckpt"}
    with pytest.raises(MisconfigurationException, match=r"this one trains .*net\.0\.weight"):
        run(RTHO(hyper_batch_size=3), tmp_path / "rest", **settings)


KILLED_RUN = """
import os, pathlib, signal, sys
import torch
from fsspec.implementations.local import LocalFileOpener
from tests.callbacks.test_checkpoint import METHODS, run

folder, method, last_write = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
writes = 0

def write(self, content):
    global writes
    writes += 1
    if writes < last_write:
        return self.f.write(content)
    self.f.write(memoryview(content)[: len(content) // 2])
    self.f.flush()
    print(self.f.name, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

LocalFileOpener.write = write
torch.set_default_dtype(torch.float64)
run(METHODS[method](), folder, save_last=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system kills in no such way")
@pytest.mark.parametrize(("method", "killed_file"), [("rtho", "step=7"), ("recompute", "last")])
def test_run_killed_while_it_writes_a_checkpoint_goes_on_from_the_one_before(
    method, killed_file, whole_runs, tmp_path
):
    writes = 2 * 6 + (1 if killed_file == "step=7" else 2)  # two files a step, `last` second
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(tmp_path), method, str(writes)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    half_written = Path(killed.stdout.split()[-1])
    assert half_written.stat().st_size > 0
    assert not zipfile.is_zipfile(half_written)
    half_written.unlink()
    resumed = METHODS[method]()
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 6
    settings = {"ckpt_path": tmp_path / "last.ckpt", "seed": 99}
    found = final(*run(resumed, tmp_path / "rest", **settings), resumed)
    expected, _ = whole_runs(method, 1)
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_window_of_batches_that_no_file_can_hold_begins_anew(tmp_path):
    class Batch(NamedTuple):
        x: Tensor
        y: Tensor

    callback = TRHO(["lr"], hyper_batch_size=4)
    data = [Batch(*batch) for batch in loader(TRAIN_SIZE, seed=1, batch_size=4)]
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    settings = {"train": DataLoader(data, batch_size=None), "enable_checkpointing": True}
    fit(SmallNet(lr=0.1), callback, checkpoint, steps=2, **settings)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
    (window,) = [s["run"]["method"]["window"] for k, s in state.items() if "TRHO" in k]
    assert window is None


def test_without_the_callback_the_tuned_rate_is_kept(tmp_path):
    callback = RTHO(hyper_batch_size=3)
    run(callback, tmp_path)
    tuned = callback.schedule[1].values["settings.lr"].item()
    _, trainer = run(None, tmp_path / "rest", ckpt_path=tmp_path / "step=7.ckpt")
    assert trainer.optimizers[0].param_groups[0]["lr"] == tuned != 0.01


class Remembering(SmallNet):
    def on_load_checkpoint(self, checkpoint):
        load_hyperparameters(self, checkpoint)


@pytest.mark.parametrize("with_callback", [True, False])
def test_tuned_values_of_the_loss_are_kept_where_the_module_asks_for_them(with_callback, tmp_path):
    make = lambda: Remembering(
        lr=Hyperparameter(0.01, Positive()), l2=Hyperparameter(1e-3, Positive())
    )
    tuned = RTHO(hyper_batch_size=3)
    run(tuned, tmp_path, module=make())
    last = tuned.schedule[1].values
    module = make()
    resumed = RTHO(hyper_batch_size=20, start_step=20) if with_callback else None
    run(resumed, tmp_path / "rest", module=module, ckpt_path=tmp_path / "step=7.ckpt")
    assert module.l2.item() == last["l2"].item() != 1e-3
    assert module.settings["lr"].item() == last["settings.lr"].item()


def test_checkpoint_without_hyperparameters_changes_none(tmp_path):
    module = Remembering(lr=0.01, l2=Hyperparameter(1e-3, Positive()))
    run(None, tmp_path, module=Remembering(lr=0.01))
    run(None, tmp_path / "rest", module=module, ckpt_path=tmp_path / "step=7.ckpt")
    assert module.l2.item() == 1e-3


def test_checkpoint_of_a_run_without_the_callback_resumes_with_it(tmp_path):
    run(None, tmp_path)
    callback = RTHO(hyper_batch_size=3)
    run(callback, tmp_path / "rest", ckpt_path=tmp_path / "step=7.ckpt")
    assert [update.step for update in callback.schedule] == [10, 13]


class Scheduled(SmallNet):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


@pytest.mark.parametrize("module_class", [SmallNet, Scheduled])
def test_settings_of_a_checkpoint_without_the_callback_are_taken_over(module_class, tmp_path):
    run(None, tmp_path, module=module_class(optim.SGD, lr=0.1, momentum=0.5))
    found = []
    for callback in (None, RTHO(["lr"], hyper_batch_size=3, outer_optimizer=None)):
        module = module_class(optim.SGD, lr=0.03, momentum=0.5)
        path = tmp_path / f"{callback is None}"
        found.append(run(callback, path, module=module, ckpt_path=tmp_path / "step=7.ckpt")[0])
    plain, observed = found
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))
    assert callback.schedule.start["lr"].item() == pytest.approx(0.1, rel=1e-12)


def test_a_run_that_is_resumed_draws_the_same_numbers_when_it_is_observed(tmp_path):
    observer = partial(RTHO, hyper_batch_size=3, outer_optimizer=None)
    run(observer(), tmp_path)
    ckpt_path = tmp_path / "step=7.ckpt"
    plain = run(None, tmp_path / "plain", ckpt_path=ckpt_path, seed=5)[0]
    observed = run(observer(), tmp_path / "observed", ckpt_path=ckpt_path, seed=5)[0]
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))


def test_checkpoint_of_other_hyperparameters_is_refused(tmp_path):
    run(RTHO(["settings.lr"], hyper_batch_size=3), tmp_path)
    with pytest.raises(MisconfigurationException, match="written with the hyperparameters"):
        run(RTHO(hyper_batch_size=3), tmp_path / "rest", ckpt_path=tmp_path / "step=7.ckpt")


def test_values_are_in_a_checkpoint_written_after_the_fit(tmp_path):
    callback = RTHO(["lr"], hyper_batch_size=2)
    trainer = fit(SmallNet(lr=0.1), callback, steps=4)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    (state,) = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"].values()
    assert state["hyperparameters"] == callback.hyperparameters


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_hyperparameters_may_be_named_in_another_order(make, tmp_path):
    names, found = ["lr", "weight_decay"], []
    for order, folder in ((names, "rest"), (names[::-1], "turned")):
        module = SmallNet(optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.01)
        run(make(names, hyper_batch_size=3), tmp_path, module=module)
        callback = make(order, hyper_batch_size=3)
        module = SmallNet(optim.SGD, lr=0.1, momentum=0.5, weight_decay=0.01)
        run(callback, tmp_path / folder, module=module, ckpt_path=tmp_path / "step=7.ckpt")
        found.append([callback.hyperparameters[name] for name in names])
    assert found[0] == found[1]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_steps_of_a_window_keep_the_clipping_that_they_had(algorithm, tmp_path):
    class ClippedFromStep7(SmallNet):
        limits: tuple[float, ...]

        def configure_gradient_clipping(self, optimizer, **kwargs):
            self.clip_gradients(optimizer, self.limits[self.global_step >= 7], algorithm)

    def make(*limits: float) -> ClippedFromStep7:
        module = ClippedFromStep7(lr=Hyperparameter(0.1, Positive()))
        module.limits = limits
        return module

    whole, resumed = TRHO(hyper_batch_size=4), TRHO(hyper_batch_size=4)
    run(whole, tmp_path, module=make(0.1, 0.05))
    run(resumed, tmp_path / "rest", module=make(7, 0.05), ckpt_path=tmp_path / "step=7.ckpt")
    assert resumed.schedule.steps == [4, 8, 12]
    assert [u.hypergradients for u in resumed.schedule] == [
        u.hypergradients for u in whole.schedule
    ]
