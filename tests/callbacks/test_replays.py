"""What a training step depends on, beside its batch, when `TRHO` makes it again."""

import copy
from functools import wraps

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn import functional as F

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    KeepGraph,
    OuterUpdate,
    Positive,
    ReplaySchedule,
    Schedule,
)
from lightning_rtho.callbacks._random import read_random_state, write_random_state
from tests.callbacks.problems import SmallNet, finite_difference, fit, loader, validation_loss

STEPS = 8  # of which an epoch has 5


class Annealed(SmallNet):
    """A coefficient that grows from epoch to epoch, of the module and of a layer's own."""

    def on_train_epoch_start(self):
        self.weight = 0.1 * (1 + self.current_epoch)
        self.net[1].slope = 1.0 + self.current_epoch

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.mse_loss(self.net(x), y) * self.net[1].slope
        return loss + self.weight * self.net[0].weight.square().sum()


class Drawing(SmallNet):
    """Its hook draws random numbers, as its training step does."""

    def on_train_batch_start(self, batch, batch_idx):
        self.drawn = torch.rand(())

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x + 0.1 * torch.randn_like(x)), y)


class Counting(SmallNet):
    """Its hook writes to a buffer, which its training step only reads."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("beta", torch.zeros(()))
        self.register_buffer("constant", torch.ones(()))

    def on_train_batch_start(self, batch, batch_idx):
        self.beta += 0.1

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x), y) * (self.constant + self.beta)


class Sparse(Counting):
    """Holds a buffer that torch cannot compare."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("adjacency", torch.eye(3).to_sparse())

    def training_step(self, batch, batch_idx):
        mixed = torch.sparse.mm(self.adjacency.to(batch[0].dtype), batch[0].T).T
        return super().training_step([mixed, batch[1]], batch_idx)


class Unnoticed(Counting):
    """The same, written in a way that torch does not count."""

    def on_train_batch_start(self, batch, batch_idx):
        self.beta.data.add_(0.1)


class Remembering(SmallNet):
    """A buffer that is not there at the beginning of each epoch."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.register_buffer("last", None)

    def on_train_epoch_start(self):
        self.last = None

    def training_step(self, batch, batch_idx):
        x, y = batch
        shift = 0 if self.last is None else self.last.mean()
        self.last = y + 0.1 * batch_idx
        return F.mse_loss(self.net(x), y + 0.3 * shift)


class Mixing(L.Callback):
    """Writes another input into the batch, as mixup does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch["x"] = 0.7 * batch["x"] + 0.3 * batch["x"].flip(0)


class Named(SmallNet):
    """Its batches are dicts."""

    def on_before_batch_transfer(self, batch, dataloader_idx):
        return dict(zip("xy", batch, strict=True)) if self.trainer.training else batch

    def training_step(self, batch, batch_idx):
        return F.mse_loss(self.net(batch["x"]), batch["y"])


class Growing(SmallNet):
    """Makes late what it needs: a tensor in a hook, another in its first step; drops a layer."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.scale = self.mask = None
        self.aux = torch.nn.Linear(1, 1)

    def on_train_start(self):
        self.scale = torch.tensor(2.0)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            del self.aux

    def training_step(self, batch, batch_idx):
        x, y = batch
        if self.mask is None:
            self.mask = torch.rand(x.shape[1])
        return self.scale * F.mse_loss(self.net(x * self.mask), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), **self.settings)


def logged(step):
    @wraps(step)
    def decorated(*args, **kwargs):
        return step(*args, **kwargs)

    return decorated


class Decorated(SmallNet):
    @logged
    def training_step(self, batch):
        return super().training_step(batch, 0)


CASES = {
    "what is made late": (Growing, ()),
    "decorated step": (Decorated, ()),
    "attributes": (Annealed, ()),
    "random numbers": (Drawing, ()),
    "buffers": (Counting, ()),
    "buffers written through data": (Unnoticed, ()),
    "sparse buffers": (Sparse, ()),
    "buffers that come and go": (Remembering, ()),
    "batch": (Named, (Mixing,)),
}


@pytest.mark.parametrize("case", CASES)
def test_what_hooks_change_is_what_it_was(case):
    make, others = CASES[case]
    callback = TRHO(["lr"], hyper_batch_size=STEPS, outer_optimizer=None)
    fit(make(lr=0.1, momentum=0.5), callback, *[other() for other in others], steps=STEPS)

    def loss_at(lr: float) -> float:
        module = make(lr=lr, momentum=0.5)
        fit(module, *[other() for other in others], steps=STEPS)
        return validation_loss(module)

    # Differences err by 1e-10 of the loss; see `finite_difference`.
    expected = finite_difference(0.1, loss_at)
    assert callback.hypergradients["lr"].item() == pytest.approx(expected, rel=1e-6)


class Taught(SmallNet):
    """Makes in its first step a network that has a part in its loss."""

    def __init__(self, **settings):
        super().__init__(**settings)
        self.teacher = None

    def training_step(self, batch, batch_idx):
        x, _ = batch
        if self.teacher is None:
            self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        loss = super().training_step(batch, batch_idx) + F.mse_loss(self.net(x), self.teacher(x))
        with torch.no_grad():
            for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                old.lerp_(new, 0.3)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), **self.settings)


def test_a_network_that_a_step_makes_is_made_once():
    plain, observed = Taught(lr=0.1), Taught(lr=0.1)
    fit(plain, steps=4)
    fit(observed, TRHO(["lr"], hyper_batch_size=2, outer_optimizer=None), steps=4)
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))


class Scripted(SmallNet):
    """A layer that torch has compiled counts its calls in a buffer."""

    class Counter(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 + 0.1 * self.calls)

    def __init__(self, **settings):
        super().__init__(**settings)
        self.counter = torch.jit.script(self.Counter())

    def training_step(self, batch, batch_idx):
        return super().training_step([self.counter(batch[0]), batch[1]], batch_idx)


def test_buffers_of_scripted_layers_are_put_back():
    plain, observed = Scripted(lr=0.1), Scripted(lr=0.1)
    fit(plain, steps=4)
    callback = TRHO(["lr"], hyper_batch_size=2, outer_optimizer=None)
    fit(observed, callback, steps=4)
    assert len(callback.schedule) == 2
    assert plain.counter.calls.item() == observed.counter.calls.item() == 4
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))


def test_nothing_lasts_longer_than_an_epoch_that_a_hook_ends():
    class EndsEarly(SmallNet):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 3 else None

        def on_train_epoch_end(self):
            assert "training_step" not in vars(self)
            assert not self.l2.requires_grad

    module = EndsEarly(lr=0.1, l2=Hyperparameter(0.02, Positive()))
    callback = TRHO(hyper_batch_size=2)
    trainer = fit(module, callback, steps=6, max_epochs=3)
    assert trainer.global_step == 6
    assert trainer.current_epoch == 2
    assert len(callback.schedule) == 3
    assert "training_step" not in vars(module)


def test_batches_that_a_step_takes_itself_are_refused_by_name():
    class Taking(SmallNet):
        def training_step(self, dataloader_iter):
            batch, batch_idx, _ = next(dataloader_iter)
            return super().training_step(batch, batch_idx)

    with pytest.raises(MisconfigurationException, match="takes its batches from `dataloader_iter`"):
        fit(Taking(lr=0.1), TRHO(["lr"], hyper_batch_size=2), steps=4)


@pytest.mark.parametrize("make", [RTHO, TRHO, lambda **kw: TRHO(tape=KeepGraph(), **kw)])
def test_a_first_step_without_a_loss_is_stepped_over(make):
    class First(SmallNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if self.trainer.fit_loop.total_batch_idx == 0 else loss

    module = First(lr=0.1, l2=Hyperparameter(0.02, Positive()))
    callback = make(hyper_batch_size=2)
    fit(module, callback, steps=7)
    assert len(callback.schedule) == 3


@pytest.mark.parametrize("make", [RTHO, TRHO])
def test_a_hook_of_a_weight_that_comes_late_is_refused(make):
    class Hooked(SmallNet):
        def on_train_start(self):
            self.net[0].weight.register_hook(lambda grad: grad.clamp(-0.05, 0.05))

    with pytest.raises(MisconfigurationException, match="A hook changes a gradient"):
        fit(Hooked(lr=0.1), make(["lr"], hyper_batch_size=2), steps=4)


class Sized(SmallNet):
    """Has a batch size that Lightning may look for."""

    def __init__(self) -> None:
        super().__init__(lr=Hyperparameter(0.1, Positive()))
        self.batch_size = 4

    def train_dataloader(self):
        return loader(20, seed=0, batch_size=self.batch_size)

    def val_dataloader(self):
        return loader(20, seed=1, batch_size=20)


def fit_with_finder(module, callback, tmp_path):
    finder = BatchSizeFinder(max_trials=1, steps_per_trial=1)
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=STEPS, callbacks=[finder, callback], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module)
    return trainer.optimizers[0].param_groups[0]["lr"]


@pytest.mark.parametrize("method", [RTHO, TRHO])
def test_batch_size_finder_leaves_hyperparameters_where_they_act(method, tmp_path):
    module, callback = Sized(), method(hyper_batch_size=2)
    rate = fit_with_finder(module, callback, tmp_path)
    (value,) = callback.hyperparameters.values()
    assert value.item() != 0.1
    assert rate == value.item()


def test_batch_size_finder_leaves_a_schedule_where_it_acts(tmp_path):
    learned = Schedule(start={"settings.lr": torch.tensor(0.5, dtype=torch.float64)})
    assert fit_with_finder(Sized(), ReplaySchedule(learned), tmp_path) == 0.5


def test_a_checkpoint_that_was_read_outside_of_a_fit_is_none_of_the_next():
    late = {"settings.lr": torch.tensor(0.05, dtype=torch.float64)}
    start = {"settings.lr": torch.tensor(0.5, dtype=torch.float64)}
    learned = Schedule([OuterUpdate(4, late, late, 1.0)], start=start)

    def rate_after_3(callback: ReplaySchedule) -> float:
        module = SmallNet(lr=Hyperparameter(0.1, Positive()))
        return fit(module, callback, steps=3).optimizers[0].param_groups[0]["lr"]

    used = ReplaySchedule(learned)
    fit(SmallNet(lr=Hyperparameter(0.1, Positive())), used, steps=6)
    used.on_load_checkpoint(None, None, {"global_step": 6})  # as by `validate(ckpt_path=...)`
    assert rate_after_3(used) == rate_after_3(ReplaySchedule(learned)) == 0.5


def test_a_validation_step_that_misses_its_hooks_is_told_of_them():
    class Listing(SmallNet):
        def on_validation_epoch_start(self):
            self.losses = []

        def validation_step(self, batch, batch_idx):
            self.losses.append(super().validation_step(batch, batch_idx))
            return self.losses[-1]

    with pytest.raises(AttributeError, match="losses") as caught:
        fit(Listing(lr=0.1), RTHO(["lr"]), steps=4)
    assert "without the hooks of Lightning's validation" in caught.value.__notes__[0]


def test_a_mistake_in_a_validation_step_comes_as_it_is():
    class Mistaken(SmallNet):
        def validation_step(self, batch, batch_idx):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        fit(Mistaken(lr=0.1), RTHO(["lr"]), steps=4)
    assert "before training" in caught.value.__notes__[0]


@pytest.mark.parametrize("bits", [np.random.MT19937, np.random.PCG64, np.random.Philox])
def test_random_state_of_every_generator_of_numpy_is_kept(bits, tmp_path):
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(bits(1))
    try:
        torch.save(read_random_state(), tmp_path / "state.pt")
        drawn = np.random.normal(size=3)  # an odd number: the fourth is kept for the next
        write_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert np.array_equal(np.random.normal(size=3), drawn)
    finally:
        np.random.set_bit_generator(before)
