"""Hooks on backward passes see those of the training, bit by bit, and none of ours."""

import copy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    register_module_full_backward_hook,
    register_module_full_backward_pre_hook,
)

from lightning_rtho import RTHO, TRHO, Hyperparameter, KeepGraph, Positive
from lightning_rtho.callbacks._hand_over import GradientHandOver
from tests.callbacks.problems import (
    SmallNet,
    TwiceABatch,
    as_hyperparameters,
    finite_difference,
    fit,
    validation_loss,
)

METHODS = {
    "forward": RTHO,
    "on a sample": partial(RTHO, curvature_fraction=0.5),
    "recompute": TRHO,
    "keep graph": partial(TRHO, tape=KeepGraph()),
}


def observing(method: str) -> RTHO | TRHO:
    return METHODS[method](["lr"], hyper_batch_size=2, outer_optimizer=None)


class Onlooker(SmallNet):
    """Takes down every gradient that can be had of a backward pass, as numbers."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[np.ndarray] = []
        self.net[0].weight.register_hook(self.look)  # as `wandb.watch` does
        self.net[2].register_full_backward_hook(lambda layer, inner, outer: self.look(*inner))
        self.net[2].register_full_backward_pre_hook(lambda layer, outer: self.look(*outer))
        self.net[1].register_backward_hook(lambda layer, inner, outer: self.look(*outer))

    def look(self, gradient: Tensor) -> None:
        self.seen.append(gradient.numpy().copy())

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.x = x.clone().requires_grad_()  # as for adversarial examples
        self.hidden = self.net[:2](self.x)
        self.hidden.register_hook(self.look)
        self.hidden.retain_grad()
        return F.mse_loss(self.net[2](self.hidden), y)

    def on_train_batch_end(self, *_):
        self.look(self.hidden.grad)
        self.look(self.x.grad)


class LateOnlooker(SmallNet):
    """Asks for gradients in the midst of each step, and lets go of them."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.seen: list[np.ndarray] = []

    def look(self, gradient: Tensor) -> None:
        self.seen.append(gradient.numpy().copy())

    def training_step(self, batch, batch_idx):
        x, y = batch
        self.handles = [
            self.net[2].register_full_backward_hook(lambda layer, inner, outer: self.look(*inner)),
            self.net[2].register_full_backward_pre_hook(lambda layer, outer: self.look(*outer)),
            self.net[1].register_backward_hook(lambda layer, inner, outer: self.look(*outer)),
        ]
        self.hidden = self.net[:2](x)
        return F.mse_loss(self.net[2](self.hidden), y)

    def on_after_backward(self):
        for handle in self.handles:
            handle.remove()


class LastOnlooker(LateOnlooker):
    """Asks when all callbacks have had their turn."""

    def training_step(self, batch, batch_idx):
        self.hidden = self.net[:2](batch[0])
        return F.mse_loss(self.net[2](self.hidden), batch[1])

    def on_before_backward(self, loss):
        self.handles = [self.hidden.register_hook(self.look)]
        self.hidden.retain_grad()

    def on_after_backward(self):
        super().on_after_backward()
        self.look(self.hidden.grad)


class OnlookerByHand(Onlooker):
    """The same in two backward passes that share a graph, and with an optimizer toggled."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.toggle_optimizer(optimizer)
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(0.5 * loss, retain_graph=True)
        self.manual_backward(0.5 * loss)
        optimizer.step()
        self.untoggle_optimizer(optimizer)


def seen_by(module_class: type[SmallNet], *callbacks: Any, **trainer: Any) -> tuple[Any, ...]:
    module = module_class(lr=0.1, momentum=0.9)
    fit(module, *callbacks, steps=6, **trainer)
    return module.seen, [param.detach().numpy() for param in module.parameters()]


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("onlooker", [Onlooker, LateOnlooker, LastOnlooker])
@pytest.mark.parametrize("method", METHODS)
def test_onlookers_see_what_they_see_without_us(method, onlooker, accumulated):
    callback = observing(method)
    expected = seen_by(onlooker, accumulate_grad_batches=accumulated)
    found = seen_by(onlooker, callback, accumulate_grad_batches=accumulated)
    np.testing.assert_equal(found, expected)
    assert len(callback.schedule) == 3
    assert len(found[0]) > 6 * accumulated


def test_onlookers_see_the_same_in_manual_optimization():
    callback = observing("forward")
    found = seen_by(OnlookerByHand, callback)
    np.testing.assert_equal(found, seen_by(OnlookerByHand))
    assert len(callback.schedule) == 3
    assert len(found[0]) == 6 * (2 * 5 + 2)


@pytest.mark.parametrize("method", METHODS)
def test_onlookers_do_not_change_hypergradients(method):
    class Alone(SmallNet):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(self.net(batch[0]), batch[1])

    watched, alone = observing(method), observing(method)
    fit(Onlooker(lr=0.1), watched, steps=4)
    fit(Alone(lr=0.1), alone, steps=4)
    torch.testing.assert_close(watched.hypergradients, alone.hypergradients)


def test_hooks_that_return_what_they_were_given_change_nothing():
    module = SmallNet(lr=0.1)
    module.net[2].register_full_backward_hook(lambda layer, inner, outer: inner)
    module.net[2].register_full_backward_hook(lambda layer, inner, outer: (*inner,))
    module.net[2].register_full_backward_pre_hook(lambda layer, outer: outer)
    module.net[2].weight.register_hook(lambda gradient: gradient)
    callback = observing("forward")
    fit(module, callback, steps=2)
    assert len(callback.schedule) == 1


def test_layers_are_copied_with_the_hooks_that_they_have():
    class Copying(SmallNet):
        def training_step(self, batch, batch_idx):
            self.copies.append(copy.deepcopy(self.net[2])._backward_hooks)
            return super().training_step(batch, batch_idx)

    module = Copying(lr=0.1)
    module.copies = []
    module.net[2].register_full_backward_hook(look := lambda layer, inner, outer: None)
    fit(module, observing("forward"), steps=2)
    assert [[*hooks.values()] for hooks in module.copies] == [[look]] * 2


def test_hand_written_passes_are_made_once_where_nobody_waits(monkeypatch):
    """In the place of a second backward pass gradients are handed over."""

    handed: list[bool] = []
    give = GradientHandOver.give

    def spy(self, pairs, *, may_share, others):
        handed.append(others() is None)
        give(self, pairs, may_share=may_share, others=others)

    monkeypatch.setattr(GradientHandOver, "give", spy)
    fit(TwiceABatch(lr=0.1), observing("forward"), steps=6)
    assert handed == [True] * 6


def test_hooks_that_steps_register_do_not_add_up():
    class Registering(SmallNet):
        def training_step(self, batch, batch_idx):
            self.handle = self.net[2].register_full_backward_hook(lambda *_: None)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self):
            self.handle.remove()

    module = Registering(lr=0.1)
    fit(module, observing("recompute"), steps=4)
    assert not module.net[2]._backward_hooks


def test_hooks_are_their_owners_again_after_the_fit():
    module = Onlooker(lr=0.1)
    layer, weight = module.net[2], module.net[0].weight
    before = [dict(h) for h in (layer._backward_hooks, weight._backward_hooks)]
    fit(module, observing("forward"), steps=2)
    late = weight.register_hook(module.look)
    late.remove()
    assert [dict(h) for h in (layer._backward_hooks, weight._backward_hooks)] == before


def test_a_hook_can_be_removed_while_it_is_followed():
    class Leaving(Onlooker):
        def on_train_batch_start(self, batch, batch_idx):
            if self.trainer.global_step == 1:
                self.handle = self.net[0].weight.register_hook(lambda gradient: None)
            if self.trainer.global_step == 3:
                self.handle.remove()

    module = Leaving(lr=0.1)
    fit(module, observing("forward"), steps=5)
    assert len(module.net[0].weight._backward_hooks) == 1


def halve_all(layer, inner, outer):
    return tuple(0.5 * gradient for gradient in inner)


@pytest.mark.parametrize(
    "of", ["tensor", "layer", "old layer", "layer's outputs", "layer in the step", "weight"]
)
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_changes_a_gradient_is_refused(method, of):
    class Hooked(SmallNet):
        def training_step(self, batch, batch_idx):
            if of == "layer in the step":
                self.net[2].register_full_backward_hook(halve_all)
            predicted = self.net(batch[0])
            if of == "tensor":
                predicted.register_hook(lambda grad: 0.5 * grad)
            return F.mse_loss(predicted, batch[1])

    module = Hooked(lr=0.1)
    before = [param.detach().clone() for param in module.parameters()]
    if of == "layer":
        module.net[2].register_full_backward_hook(lambda layer, inner, outer: (0.5 * inner[0],))
    elif of == "old layer":
        module.net[2].register_backward_hook(halve_all)
    elif of == "layer's outputs":
        module.net[2].register_full_backward_pre_hook(lambda layer, outer: (0.5 * outer[0],))
    elif of == "weight":  # refused in the first step, though it does nothing yet
        module.net[2].weight.register_hook(lambda grad: grad.clamp(-1e6, 1e6))
    with pytest.raises(MisconfigurationException, match="A hook changes a gradient"):
        fit(module, observing(method), steps=4)
    assert all(map(torch.equal, before, module.parameters()))


@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (register_module_full_backward_hook, halve_all),
        (register_module_full_backward_pre_hook, lambda layer, outer: (0.5 * outer[0],)),
    ],
)
def test_a_hook_of_all_layers_that_changes_a_gradient_is_refused(register, hook):
    handle = register(lambda layer, *given: hook(layer, *given) if has_one(layer) else None)
    try:
        with pytest.raises(MisconfigurationException, match="A hook changes a gradient"):
            fit(SmallNet(lr=0.1), observing("forward"), steps=4)
    finally:
        handle.remove()


def has_one(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Tanh)


@pytest.mark.parametrize("method", METHODS)
def test_a_hook_that_changes_the_gradient_of_an_earlier_micro_batch_is_refused(method):
    class Hooked(SmallNet):
        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0])
            if batch_idx == 2:  # the first of the second step
                predicted.register_hook(lambda grad: 0.5 * grad)
            return F.mse_loss(predicted, batch[1])

    with pytest.raises(MisconfigurationException, match="A hook changes a gradient"):
        fit(Hooked(lr=0.1), observing(method), steps=4, accumulate_grad_batches=2)


def test_a_hook_may_change_gradients_before_the_run_is_followed():
    class Hooked(SmallNet):
        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0])
            if self.global_step < 2:
                predicted.register_hook(lambda grad: 0.5 * grad)
            return F.mse_loss(predicted, batch[1])

    callback = RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None, start_step=2)
    fit(Hooked(lr=0.1), callback, steps=4)
    assert len(callback.schedule) == 1


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_written_to_in_place_by_a_hook_are_found_out(method):
    module = SmallNet(lr=0.1)

    def halve(grad: Tensor) -> None:
        grad.mul_(0.5)

    module.net[2].weight.register_hook(halve)
    with pytest.raises(MisconfigurationException, match="not the loss's"):
        fit(module, observing(method), steps=4)


class Explained(SmallNet):
    """Punishes what a hook has seen of a gradient that the step takes itself."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        hidden = self.net[:2](x.clone().requires_grad_())
        seen = []
        hidden.register_hook(seen.append)
        predicted = self.net[2](hidden)
        torch.autograd.grad(predicted.square().sum(), self.net[0].weight, create_graph=True)
        return F.mse_loss(predicted, y) + self.l2 * seen[0].square().mean()


@pytest.mark.parametrize("method", [m for m in METHODS if m != "on a sample"])
def test_a_hook_in_a_gradient_that_the_loss_takes_is_followed(method):
    settings = {"lr": 0.1, "l2": 0.3}
    callback = METHODS[method](hyper_batch_size=4, outer_optimizer=None)
    fit(Explained(**as_hyperparameters(settings)).double(), callback, steps=4, precision="64-true")

    for name, value in settings.items():

        def loss_at(x: float, name: str = name) -> float:
            module = Explained(**{**settings, name: x})
            fit(module, steps=4, precision="64-true")
            return validation_loss(module)

        expected = finite_difference(value, loss_at)
        # Differences are good to 1e-8 or so.
        found = callback.hypergradients[name if name == "l2" else f"settings.{name}"]
        assert found.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("begins_at", [0, 3])
def test_adversarial_examples_are_trained_on_as_without_us(begins_at):
    """Free adversarial training: a perturbation climbs by the gradient of the same pass."""

    class Free(SmallNet):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.delta = torch.zeros(4, 3)

        def training_step(self, batch, batch_idx):
            x, y = batch
            self.leaf = torch.tensor(
                self.delta.tolist(), requires_grad=self.global_step >= begins_at
            )
            return F.mse_loss(self.net(x + self.leaf), y)

        def on_after_backward(self):
            if self.global_step < begins_at:
                return
            self.delta = (self.delta + 0.01 * self.leaf.grad.sign()).clamp(-0.1, 0.1)

    plain, observed = Free(lr=0.1), Free(lr=Hyperparameter(0.1, Positive()))
    fit(plain, steps=6)
    fit(observed, RTHO(hyper_batch_size=2, outer_optimizer=None), steps=6)
    assert all(map(torch.equal, plain.parameters(), observed.parameters()))
    assert torch.equal(plain.delta, observed.delta)
