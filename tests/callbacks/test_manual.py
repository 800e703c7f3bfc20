"""Manual optimization: a training step is the composition of the updates that it makes itself."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, Hyperparameter, Positive, Real, stop_gradient
from lightning_rtho.callbacks._checks import check_settings
from tests.callbacks.problems import FEATURES, SmallNet, finite_difference, fit, validation_loss

EXACT = 1e-6
"""Between analytic and finite differences, whose own error is below 1e-8 here."""


class ByHand(SmallNet):
    """Two updates a batch, the first of an accumulated and clipped gradient."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in zip(*(tensor.chunk(2) for tensor in batch), strict=True):
            self.manual_backward(super().training_step(part, batch_idx))
        self.clip_gradients(optimizer, gradient_clip_val=0.3, gradient_clip_algorithm="norm")
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        module_zero_grad = self.zero_grad
        module_zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class ByClosure(SmallNet):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = super(ByClosure, self).training_step(batch, batch_idx)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure)


class Adversarial(L.LightningModule):
    """A generator and a critic: smooth, so that finite differences mean something.

    `style` is how it keeps the critic's loss from moving the generator: with toggled optimizers,
    by clearing what the backward passes leave behind, or by stopping the gradient.
    """

    automatic_optimization = False

    def __init__(self, style: str = "toggled", norm: bool = False, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        layers = [nn.Linear(FEATURES, 3), nn.Tanh(), nn.Linear(3, 1)]
        self.net = nn.Sequential(*layers[:1], *([nn.BatchNorm1d(3)] if norm else []), *layers[1:])
        self.critic = nn.Sequential(nn.Linear(FEATURES + 1, 3), nn.Tanh(), nn.Linear(3, 1))
        self.style = style
        self.settings = {
            "lr": 0.05,
            "momentum": 0.6,
            "critic_lr": 0.02,
            "beta1": 0.5,
            "weight": 0.3,
            **settings,
        }
        for name, value in settings.items():
            setattr(self, name, value)

    def criticize(self, x, y):
        return self.critic(torch.cat([x, y], 1))

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer, critic_optimizer = self.optimizers()
        if self.style == "toggled":
            self.toggle_optimizer(critic_optimizer)
        fake = self.net(x)
        if self.style == "stopped":
            fake = stop_gradient(fake)
        loss = self.criticize(x, fake).mean() - self.criticize(x, y).mean()
        loss = loss + 0.1 * sum(p.square().sum() for p in self.critic.parameters())
        critic_optimizer.zero_grad()
        self.manual_backward(loss)
        critic_optimizer.step()
        if self.style == "toggled":
            self.untoggle_optimizer(critic_optimizer)
            self.toggle_optimizer(optimizer)
        fake = self.net(x)
        loss = F.mse_loss(fake, y) - self.settings["weight"] * self.criticize(x, fake).mean()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        if self.style == "toggled":
            self.untoggle_optimizer(optimizer)
        for scheduler in self.lr_schedulers():
            scheduler.step()

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.net(x), y)

    def configure_optimizers(self):
        s = self.settings
        sgd = torch.optim.SGD(self.net.parameters(), lr=s["lr"], momentum=s["momentum"])
        beta1 = s["beta1"]
        beta2 = Hyperparameter(0.9, Real()) if isinstance(beta1, Hyperparameter) else 0.9
        adam = torch.optim.Adam(self.critic.parameters(), lr=s["critic_lr"], betas=(beta1, beta2))
        schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (sgd, adam)]
        return [sgd, adam], schedulers


def observed(make: Any, settings: dict[str, float], steps: int) -> dict[str, float]:
    """Hypergradients by forward mode at the end of a run."""
    hypers = {name: Hyperparameter(value, Real()) for name, value in settings.items()}
    callback = RTHO(hyper_batch_size=steps, outer_optimizer=None)
    fit(make(**hypers), callback, steps=steps)
    assert len(callback.schedule) == 1
    return {
        name.split(".")[-1].split("/")[-1]: value.item()
        for name, value in callback.hypergradients.items()
    }


def differenced(make: Any, settings: dict[str, float], steps: int, name: str) -> float:
    def loss_at(value: float) -> float:
        module = make(**{**settings, name: value})
        fit(module, steps=steps)
        return validation_loss(module)

    return finite_difference(settings[name], loss_at)


@pytest.mark.parametrize("make", [ByHand, ByClosure])
def test_one_optimizer_stepped_by_hand(make):
    settings = {"lr": 0.1, "momentum": 0.6, "l2": 0.02}
    found = observed(make, settings, steps=6)
    for name in settings:
        expected = differenced(make, settings, 6, name)
        assert found[name] == pytest.approx(expected, rel=EXACT), name


@pytest.mark.parametrize(
    ("given", "of_trainer"),
    [
        ({"gradient_clip_algorithm": "value"}, {}),
        ({"gradient_clip_algorithm": GradClipAlgorithmType.VALUE}, {}),
        ({}, {"gradient_clip_algorithm": "value"}),
        ({}, {}),
    ],
)
def test_gradients_clipped_by_hand(given, of_trainer):
    class Clipped(SmallNet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.clip_gradients(optimizer, 0.1, **given)
            optimizer.step()

    def loss_at(lr: float) -> float:
        fit(module := Clipped(lr=lr), steps=4, **of_trainer)
        return validation_loss(module)

    callback = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None)
    fit(Clipped(lr=0.1), callback, steps=4, **of_trainer)
    expected = finite_difference(0.1, loss_at)
    assert callback.hypergradients["lr"].item() == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batch norm"])
@pytest.mark.parametrize("style", ["toggled", "cleared", "stopped"])
def test_two_optimizers_that_work_against_each_other(style, norm):
    def make(**settings: Any) -> Adversarial:
        return Adversarial(style, norm, **settings)

    settings = {"lr": 0.05, "momentum": 0.6, "critic_lr": 0.02, "beta1": 0.5, "weight": 0.3}
    found = observed(make, settings, steps=8)
    for name in settings:
        expected = differenced(make, settings, 8, name)
        assert found[name] == pytest.approx(expected, rel=EXACT), name


@pytest.mark.parametrize("make", [ByHand, ByClosure, Adversarial])
def test_observer_leaves_manual_training_as_it_was(make):
    torch.set_default_dtype(torch.float32)
    plain, observed = make(lr=0.05), make(lr=0.05)
    fit(plain, steps=8)
    names = {"lr": Positive()} if make is not Adversarial else None
    if names is None:
        observed.settings["weight"] = observed.weight = Hyperparameter(0.3, Positive())
    callback = RTHO(names, hyper_batch_size=2, outer_optimizer=None)
    fit(observed, callback, steps=8)
    assert len(callback.schedule) == 4
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert "toggle_optimizer" not in vars(observed)


def test_tuning_the_rates_of_both_optimizers():
    module = Adversarial(
        "cleared", lr=Hyperparameter(0.05, Positive()), critic_lr=Hyperparameter(0.02, Positive())
    )
    callback = RTHO(hyper_batch_size=4)
    trainer = fit(module, callback, steps=40)
    assert len(callback.schedule) == 10
    assert len(callback.hyperparameters) == 2
    for optimizer, (name, start) in zip(
        trainer.optimizers, {"lr": 0.05, "critic_lr": 0.02}.items(), strict=True
    ):
        value = callback.hyperparameters[f"settings.{name}"].item()
        assert value != start
        # 20 steps of each under a schedule whose factor is 0.9
        assert optimizer.param_groups[0]["lr"] == pytest.approx(value * 0.9**20)


# Refusals


@pytest.mark.parametrize("acts_at", [1, 100])
def test_a_hyperparameter_may_act_in_few_batches_but_not_in_none_before_an_update(acts_at):
    class Alternating(SmallNet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            loss = F.mse_loss(self.net(batch[0]), batch[1])
            if self.global_step % (2 * acts_at) >= acts_at:
                loss = loss + self.l2 * self.net[0].weight.square().sum()
            self.manual_backward(loss)
            optimizer.step()

    def loss_at(l2: float) -> float:
        fit(module := Alternating(l2=l2, lr=0.1), steps=6)
        return validation_loss(module)

    callback = RTHO(hyper_batch_size=6, outer_optimizer=None)
    module = Alternating(l2=Hyperparameter(0.3, Positive()), lr=0.1)
    if acts_at > 1:
        with pytest.raises(
            MisconfigurationException, match=r"`l2`.*nowhere.*`0 . h` into the loss before"
        ):
            fit(module, callback, steps=6)
    else:
        fit(module, callback, steps=6)
        expected = finite_difference(0.3, loss_at)
        assert callback.hypergradients["l2"].item() == pytest.approx(expected, rel=EXACT)


def test_weights_that_are_moved_in_place_between_backward_passes_are_refused():
    class Sharpness(SmallNet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            with torch.no_grad():
                steps = [0.05 * param.grad for param in self.net.parameters()]
                for param, step in zip(self.net.parameters(), steps, strict=True):
                    param.add_(step)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            with torch.no_grad():
                for param, step in zip(self.net.parameters(), steps, strict=True):
                    param.sub_(step)
            optimizer.step()

    with pytest.raises(MisconfigurationException, match=r"changed in place.*sharpness-aware"):
        fit(Sharpness(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=6)


def test_reverse_mode_refuses_manual_optimization():
    with pytest.raises(MisconfigurationException, match="`TRHO` cannot follow manual optimization"):
        fit(ByHand(lr=0.1), TRHO(["lr"]))


def test_names_of_settings_are_refused_where_there_are_several_optimizers():
    with pytest.raises(ValueError, match=r"'momentum'.*2 optimizers.*Declare"):
        fit(Adversarial(), RTHO(["momentum"]))


class Stale(ByHand):
    """Computes a loss, moves the weights it depends on, then differentiates it."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        # The last bias is in no saved tensor: torch itself does not see that it has moved.
        last = self.net[-1]
        stale = F.mse_loss(self.net(x).detach() + last.bias, y)
        self.manual_backward(F.mse_loss(self.net(x).detach() + last.bias, y))
        optimizer.step()
        self.manual_backward(stale)
        optimizer.step()


class Frozen(Adversarial):
    """Freezes the weights of one optimizer by hand while the other's loss is differentiated."""

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.net.requires_grad_(False)
        x, _ = batch
        self.manual_backward(self.criticize(x, self.net(x)).mean())
        self.net.requires_grad_(True)


class BehindOurBack(ByHand):
    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        SmallNet.training_step(self, batch, batch_idx).backward()
        optimizer.step()


class Shared(Adversarial):
    def configure_optimizers(self):
        optimizers, _ = super().configure_optimizers()
        optimizers[1].add_param_group({"params": list(self.net.parameters())})
        return optimizers, []


class Chosen(ByHand):
    def training_step(self, batch, batch_idx):
        loss = SmallNet.training_step(self, batch, batch_idx)
        self.manual_backward(loss, inputs=list(self.net[0].parameters()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stale(lr=Hyperparameter(0.1, Real())), "computed before an optimizer moved"),
        (lambda: Frozen(lr=Hyperparameter(0.1, Real())), "frozen for a backward pass"),
        (lambda: BehindOurBack(lr=Hyperparameter(0.1, Real())), "self.manual_backward"),
        (lambda: Shared(lr=Hyperparameter(0.1, Real())), "trained by two optimizers"),
        (lambda: Chosen(lr=Hyperparameter(0.1, Real())), "`manual_backward` got `inputs`"),
    ],
    ids=["stale loss", "frozen by hand", "loss.backward", "shared weight", "inputs"],
)
def test_refused(make, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(make(), RTHO(hyper_batch_size=2), steps=8)


def test_several_processes_are_refused():
    with pytest.raises(MisconfigurationException, match="not followed over several processes"):
        check_settings(SimpleNamespace(world_size=2), ByHand(lr=0.1))
