"""Batches of every kind: the same data in other containers give the same hypergradients."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, default_collate

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from tests.callbacks.problems import (
    TRAIN_SIZE,
    VAL_SIZE,
    SmallNet,
    finite_difference,
    fit,
    loader,
    quiet_trainer,
    validation_loss,
)

METHODS = {"forward": RTHO, "reverse": TRHO}
BATCH = 4


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class FrozenPair:
    x: Tensor
    y: Tensor

    def to(self, device: torch.device, **settings: Any) -> "FrozenPair":
        return FrozenPair(self.x.to(device, **settings), self.y.to(device, **settings))


KINDS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "dict": (lambda x, y: {"x": x, "y": y}, lambda batch: (batch["x"], batch["y"])),
    "nested list": (lambda x, y: [[x], {"y": [y]}], lambda batch: (batch[0][0], batch[1]["y"][0])),
    "named tuple": (Pair, lambda batch: (batch.x, batch.y)),
    "frozen": (FrozenPair, lambda batch: (batch.x, batch.y)),
    "packed sequence": (
        lambda x, y: (pack_sequence([row[:, None] for row in x]), y),
        lambda batch: (pad_packed_sequence(batch[0], batch_first=True)[0].squeeze(2), batch[1]),
    ),
}


@pytest.mark.parametrize("within", ["itself", "a list"])
@pytest.mark.parametrize("name", ["x", "y"])
def test_frozen_batches_that_a_step_writes_to_are_copied(name, within, data):
    class Writing(SmallNet):
        def training_step(self, batch, batch_idx):
            (pair,) = batch if within == "a list" else (batch,)
            getattr(pair, name).mul_(1.5)
            return super().training_step((pair.x, pair.y), batch_idx)

        validation_step = SmallNet.validation_step

    def read(make, start_step):
        callback = make(["lr"], hyper_batch_size=2, start_step=start_step, outer_optimizer=None)

        def collate(rows):
            pair = FrozenPair(*default_collate(rows))
            return [pair] if within == "a list" else pair

        train = DataLoader(data[0], batch_size=BATCH, collate_fn=collate)
        fit(Writing(lr=0.1), callback, steps=8, train=train)
        return callback.schedule[-1].hypergradients["lr"]

    # The first step that writes is left out where it would be made again.
    torch.testing.assert_close(read(TRHO, 2), read(partial(TRHO, tape=KeepGraph()), 3))


class Stream(IterableDataset):
    """The data in their order, without a length."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return iter([self.data[i] for i in range(len(self.data))])


def hypergradient(method: str, train: Any, val: Any, read: Any = tuple) -> Tensor:
    class Reading(SmallNet):
        def training_step(self, batch, batch_idx):
            return super().training_step(read(batch), batch_idx)

        def validation_step(self, batch, batch_idx):
            return super().validation_step(read(batch), batch_idx)

    callback = METHODS[method](["lr", "momentum"], hyper_batch_size=4, outer_optimizer=None)
    fit(Reading(lr=0.1, momentum=0.5), callback, steps=4, train=train, val=val)
    return torch.stack([*callback.hypergradients.values()])


@pytest.fixture
def data() -> tuple[Any, Any]:
    return (
        loader(TRAIN_SIZE, seed=1, batch_size=BATCH).dataset,
        loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE).dataset,
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_in_other_containers(kind, method, data):
    make, read = KINDS[kind]

    def collate(rows):
        return make(*(torch.stack(column) for column in zip(*rows, strict=True)))

    train, val = data
    plain = hypergradient(
        method, DataLoader(train, batch_size=BATCH), DataLoader(val, batch_size=VAL_SIZE)
    )
    found = hypergradient(
        method,
        DataLoader(train, batch_size=BATCH, collate_fn=collate),
        DataLoader(val, batch_size=VAL_SIZE, collate_fn=collate),
        read,
    )
    # Validation batches are shuffled by a generator of their own: sums in another order.
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_no_examples_are_drawn_of_frozen_batches(data):
    def collate(rows):
        return FrozenPair(*(torch.stack(column) for column in zip(*rows, strict=True)))

    class Reading(SmallNet):
        def training_step(self, batch, batch_idx):
            return super().training_step((batch.x, batch.y), batch_idx)

    train = DataLoader(data[0], batch_size=BATCH, collate_fn=collate)
    with pytest.raises(MisconfigurationException, match="with frozen dataclasses"):
        fit(Reading(lr=0.1), RTHO(["lr"], curvature_fraction=0.5), train=train)


@pytest.mark.parametrize("method", METHODS)
def test_iterable_data_sets(method, data):
    train, val = data
    loaders = [DataLoader(train, batch_size=BATCH), DataLoader(val, batch_size=VAL_SIZE)]
    streams = [
        DataLoader(Stream(train), batch_size=BATCH),
        DataLoader(Stream(val), batch_size=VAL_SIZE),
    ]
    plain, found = hypergradient(method, *loaders), hypergradient(method, *streams)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=0)


def test_one_of_several_validation_loaders_is_to_be_chosen(data):
    train, val = data
    train, val = DataLoader(train, batch_size=BATCH), DataLoader(val, batch_size=VAL_SIZE)
    twice = DataLoader(TensorDataset(*(2 * x for x in val.dataset.tensors)), batch_size=VAL_SIZE)

    class Several(SmallNet):
        def validation_step(self, batch, batch_idx, dataloader_idx):
            told.append(dataloader_idx)
            return super().validation_step(batch, batch_idx)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            if self.trainer.validating:
                told.append(dataloader_idx)
            return batch

    told: list[int] = []

    def chosen(**settings: Any) -> Tensor:
        callback = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None, **settings)
        fit(Several(lr=0.1), callback, steps=4, train=train, val=[val, twice])
        return callback.hypergradients["lr"]

    with pytest.raises(MisconfigurationException, match="has 2 validation loaders"):
        chosen()
    alone = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None)
    fit(SmallNet(lr=0.1), alone, steps=4, train=train, val=twice)
    torch.testing.assert_close(chosen(dataloader=twice), alone.hypergradients["lr"])
    told.clear()
    found = chosen(dataloader=val)
    assert set(told) == {0}
    told.clear()
    assert chosen(dataloader=twice) != found
    assert set(told) == {1}


def test_the_trainers_own_loaders_are_not_made_where_nobody_asks_for_them(data):
    train, val = (DataLoader(part, batch_size=BATCH) for part in data)
    made = []

    class Making(SmallNet):
        def val_dataloader(self):
            made.append(self.global_step)
            return val

    callback = RTHO(["lr"], hyper_batch_size=2, dataloader=val)
    L.Trainer(
        **{"accelerator": "cpu", "max_steps": 4, "callbacks": [callback], "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False},
        **{"num_sanity_val_steps": 0, "check_val_every_n_epoch": 1000},
    ).fit(Making(lr=0.1), train)
    assert len(callback.schedule) == 2
    assert made == []


def test_a_step_that_takes_any_arguments_gets_those_that_lightning_gives(data):
    train, val = (DataLoader(part, batch_size=BATCH) for part in data)
    given = set()

    class Any_(SmallNet):
        def validation_step(self, *args, **kwargs):
            given.add((len(args), *kwargs))
            return super().validation_step(*args)

    settings = {"train": train, "val": val, "check_val_every_n_epoch": 1}
    fit(Any_(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=10, **settings)
    assert given == {(2,)}


@pytest.mark.parametrize("is_given", [True, False])
def test_batches_that_several_loaders_make_together(is_given, data):
    train, val = DataLoader(data[0], batch_size=BATCH), DataLoader(data[1], batch_size=3)
    assert len(val) == 2  # so that Lightning validates between one batch and the next
    both = CombinedLoader({"a": val, "b": val}, "min_size")

    class Both(SmallNet):
        def validation_step(self, batch, batch_idx):
            first, second = (super(Both, self).validation_step(batch[k], 0) for k in ("a", "b"))
            return (first + second) / 2

    settings = {"dataloader": both} if is_given else {}
    callback = RTHO(["lr"], hyper_batch_size=3, outer_optimizer=None, **settings)
    often = {"check_val_every_n_epoch": 1, "limit_val_batches": 2}
    fit(Both(lr=0.1), callback, steps=12, train=train, val=both, **often)
    batches = list(val)
    alone = RTHO(["lr"], hyper_batch_size=3, outer_optimizer=None, dataloader=batches)
    fit(SmallNet(lr=0.1), alone, steps=12, train=train, val=val)
    found, expected = ([u.hypergradients["lr"] for u in c.schedule] for c in (callback, alone))
    assert len(found) == 4
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


class OwnLoader(DataLoader):
    """Does more to a batch than it was told to."""

    def __iter__(self):
        yield from super().__iter__()


@pytest.mark.parametrize("kind", ["class of its own", "iterable"])
def test_workers_that_persist_are_the_users_alone(kind, data):
    class Dropping(SmallNet):
        def training_step(self, batch, batch_idx):
            return super().training_step([F.dropout(batch[0]), batch[1]], batch_idx)

    train, val = data
    weights = []
    for callbacks in ([], [RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None)]):
        workers = {"batch_size": BATCH, "num_workers": 1, "persistent_workers": True}
        make, rows = (DataLoader, Stream(val)) if kind == "iterable" else (OwnLoader, val)
        module = Dropping(lr=0.1)
        fit(
            module,
            *callbacks,
            steps=12,
            train=DataLoader(train, batch_size=BATCH, shuffle=True),
            val=make(rows, **workers),
            check_val_every_n_epoch=1,
        )
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_outer_objective_is_taken_on_the_data_that_lightning_loads_anew(every, data):
    told: list[tuple[int, float]] = []

    class Telling(SmallNet):
        def outer_step(self, batch, batch_idx):
            told.append((self.current_epoch, batch[0][0, 0].item()))
            return self.validation_step(batch, batch_idx)

        def train_dataloader(self):
            return DataLoader(data[0], batch_size=10)

        def val_dataloader(self):
            x = torch.full((4, 3), float(self.current_epoch))
            return DataLoader(TensorDataset(x, torch.zeros(4, 1)), batch_size=4)

    quiet_trainer(
        RTHO(["lr"], hyper_batch_size=2, summary=False),
        max_epochs=4,
        check_val_every_n_epoch=1,
        reload_dataloaders_every_n_epochs=every,
    ).fit(Telling(lr=0.1))
    loaded = {epoch: epoch // every * every if every else 0 for epoch in range(4)}
    assert set(told) == set(loaded.items())


def test_data_that_are_loaded_anew_are_taken_in_another_order(data, tmp_path):
    told: list[float] = []

    class Telling(SmallNet):
        def outer_step(self, batch, batch_idx):
            told.extend(batch[0][:, 0].tolist())
            return self.validation_step(batch, batch_idx)

        def train_dataloader(self):
            return DataLoader(data[0], batch_size=10)  # two steps an epoch

        def val_dataloader(self):
            return DataLoader(data[1], batch_size=2)

    def go_on(epochs: int, **fit_settings: Any) -> tuple[list[float], list[Any]]:
        told.clear()
        L.seed_everything(7, verbose=False)
        callback = RTHO(["lr"], hyper_batch_size=2, summary=False, safeguard=False)
        trainer = quiet_trainer(
            callback,
            max_epochs=epochs,
            check_val_every_n_epoch=1,
            reload_dataloaders_every_n_epochs=2,
        )
        trainer.fit(Telling(lr=0.1), **fit_settings)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return [*told], [update.values["lr"] for update in callback.schedule]

    seen, values = go_on(12)
    assert len(set(seen)) == VAL_SIZE  # of two batches a time, with one order, two thirds
    go_on(5)  # the data are of the epoch before
    _, resumed = go_on(12, ckpt_path=tmp_path / "last.ckpt")
    assert resumed == values


class Noisy(SmallNet):
    """Noise, as strong as a hyperparameter says, is added as a batch is transferred."""

    def __init__(self, h: Any, **settings: Any) -> None:
        super().__init__(**settings)
        self.h = h

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        return [x + self.h * torch.cos(5 * x), y] if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) + self.h**2 * self.net(batch[0]).mean()


class NoisyData(L.LightningDataModule):
    """Adds the noise in the module's place."""

    def __init__(self, module: Noisy) -> None:
        super().__init__()
        self.train = loader(TRAIN_SIZE, seed=1, batch_size=4, shuffle=True)
        self.on_after_batch_transfer = partial(Noisy.on_after_batch_transfer, module)

    def train_dataloader(self):
        return self.train

    def val_dataloader(self):
        return loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)


@pytest.mark.parametrize("start", [0, 3])
def test_a_hyperparameter_may_act_where_a_batch_is_transferred(start):
    def loss_at(h: float) -> float:
        class FromStart(Noisy):
            def on_train_batch_start(self, *args: Any) -> None:
                self.h = h if self.global_step >= start else 0.3

            def on_train_batch_end(self, *args: Any) -> None:  # before the next is transferred
                self.on_train_batch_start()

        fit(module := FromStart(h if start == 0 else 0.3, lr=0.1), steps=start + 4)
        return validation_loss(module)

    settings = {"hyper_batch_size": 4, "start_step": start, "outer_optimizer": None}
    expected = finite_difference(0.3, loss_at)
    for callback in (RTHO(["h"], **settings), TRHO(["h"], **settings, tape=KeepGraph())):
        fit(Noisy(Hyperparameter(0.3, Positive()), lr=0.1), callback, steps=start + 4)
        # Differences are good to 1e-8 or so.
        assert callback.hypergradients["h"].item() == pytest.approx(expected, rel=1e-6)
    refused = TRHO(["h"], **settings)
    with pytest.raises(MisconfigurationException, match="before its training step"):
        fit(Noisy(Hyperparameter(0.3, Positive()), lr=0.1), refused, steps=start + 4)


def test_a_hyperparameter_may_act_where_a_data_module_transfers_a_batch():
    found = []
    for is_own in (True, False):
        module = Noisy(Hyperparameter(0.3, Positive()), lr=0.1)
        callback = RTHO(["h"], hyper_batch_size=4, outer_optimizer=None)
        if is_own:
            fit(module, callback, steps=8)
        else:
            L.seed_everything(7, verbose=False)
            datamodule = NoisyData(module)
            module.on_after_batch_transfer = lambda batch, dataloader_idx: batch
            quiet_trainer(callback, max_steps=8).fit(module, datamodule)
        found.append([update.hypergradients["h"] for update in callback.schedule])
    assert len(found[0]) == 2
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_may_move_data_as_lightning_does(method, first):
    class Moving(SmallNet):
        def training_step(self, batch, batch_idx):
            if self.global_step >= first:
                converted = self.trainer.precision_plugin.convert_input(batch[0].clone())
                self.trainer.strategy.batch_to_device(converted)
            return super().training_step(batch, batch_idx)

    found = []
    for module_type in (SmallNet, Moving):
        module = module_type(lr=0.1, l2=Hyperparameter(0.01, Positive()))
        callback = METHODS[method](hyper_batch_size=4, outer_optimizer=None)
        fit(module, callback, steps=8)
        found.append([update.hypergradients["l2"] for update in callback.schedule])
    assert len(found[0]) == 2
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_hooks_that_transfer_batches_stay_the_users():
    seen: list[bool] = []

    class Mixing(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == 1:
                module.on_after_batch_transfer = self.mix

        def on_train_batch_end(
            self, trainer: L.Trainer, module: L.LightningModule, *_: Any
        ) -> None:
            seen.append("on_after_batch_transfer" in vars(copy.deepcopy(module)))

        def mix(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0].flip(0), batch[1]]

    weights = []
    for callbacks in ([], [RTHO(["h"], hyper_batch_size=2, outer_optimizer=None)]):
        module = Noisy(Hyperparameter(0.3, Positive()), lr=0.1)
        fit(module, Mixing(), *callbacks, steps=10)
        assert "on_after_batch_transfer" in vars(module)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)
    assert seen == [False] * 5 + [True] * 5 + [False] * 5 + [True] * 5


@pytest.mark.parametrize("is_callback", [False, True])
@pytest.mark.parametrize("hook", ["on_train_start", "on_train_epoch_start", "on_train_batch_end"])
@pytest.mark.parametrize(
    "callback",
    [
        RTHO(hyper_batch_size=2, stop_step=7, outer_optimizer=None),
        TRHO(hyper_batch_size=2, outer_optimizer=None),
    ],
    ids=["forward, stopped", "reverse"],
)
def test_what_is_made_of_a_hyperparameter_between_steps_is_a_constant(callback, hook, is_callback):
    class Prepared(SmallNet):
        shift = 0.1

        def training_step(self, batch, batch_idx):
            return super().training_step([batch[0] + self.shift, batch[1]], batch_idx)

    def prepare(module: Prepared, *args: Any) -> None:
        module.shift = 1.0 * module.lr * torch.ones(3)

    before = L.Callback()
    if is_callback:
        setattr(before, hook, lambda trainer, module, *args: prepare(module))
    else:
        setattr(Prepared, hook, prepare)
    plain, observed = (Prepared(lr=Hyperparameter(0.1, Positive())) for _ in range(2))
    for module in (plain, observed):
        module.lr = module.settings["lr"]
    fit(plain, before, steps=12)
    fit(observed, before, callback, steps=12)
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one, other)


class Counted(TensorDataset):
    """Counts how often a row is read; in its place it tells of function modes where it is read."""

    reads = 0

    def __getitem__(self, index):
        type(self).reads += 1
        x, y = super().__getitem__(index)
        return x, y, torch._C._len_torch_function_stack()


class Reading(SmallNet):
    def outer_step(self, batch, batch_idx):
        x, y, modes = batch
        assert not modes.any()
        return F.mse_loss(self.net(x), y)


def test_batches_that_are_looked_ahead_at_are_read_once(data):
    Counted.reads = 0
    callback = RTHO(["lr"], hyper_batch_size=2, dataloader=DataLoader(Counted(*data[1].tensors), 2))
    fit(Reading(lr=0.01), callback, steps=4)
    assert len(callback.schedule) == 2
    assert Counted.reads == 2 * 2


def test_workers_do_not_inherit_what_watches_the_first_evaluation(data):
    loader = DataLoader(Counted(*data[1].tensors), 2, num_workers=1)
    callback = RTHO(["lr"], hyper_batch_size=2, dataloader=loader)
    fit(Reading(lr=0.01), callback, steps=4)
    assert len(callback.schedule) == 2


@pytest.mark.parametrize("method", METHODS)
def test_a_validation_step_may_write_to_its_batch(method, data):
    class Scaling(SmallNet):
        def validation_step(self, batch, batch_idx):
            batch[0].mul_(0.5)
            return super().validation_step(batch, batch_idx)

    class Scaled(SmallNet):
        def validation_step(self, batch, batch_idx):
            return super().validation_step((batch[0] * 0.5, batch[1]), batch_idx)

    found = []
    for module_class in (Scaling, Scaled):
        callback = METHODS[method](hyper_batch_size=2)
        fit(module_class(lr=Hyperparameter(0.1, Positive())), callback, steps=8)
        found.append([update.outer_objective for update in callback.schedule])
    assert found[0] == found[1]
    assert len(found[0]) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_validation_data_may_be_made_with_hyperparameters(workers, data):
    """They act there as numbers: what a worker makes has no graph."""

    class Noisy(TensorDataset):
        level: Hyperparameter

        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x * self.level, y * torch.stack([self.level])

    module = SmallNet(l2=Hyperparameter(0.1, Positive()), lr=0.1)
    noisy = Noisy(*data[1].tensors)
    noisy.level = module.l2
    val = DataLoader(noisy, batch_size=2, num_workers=workers)
    fit(module, callback := RTHO(hyper_batch_size=2, dataloader=val), steps=6)
    assert len(callback.schedule) == 3
