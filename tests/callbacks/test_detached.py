"""Losses that depend on the weights beside their graph: stopped gradients and detached values."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from lightning_rtho import RTHO, TRHO, KeepGraph, Recompute, scale_gradient, stop_gradient
from lightning_rtho.callbacks._detached import DetachedWeights
from lightning_rtho.callbacks._run import _is_looked_at
from tests.callbacks.problems import (
    FEATURES,
    SmallNet,
    as_hyperparameters,
    finite_difference,
    fit,
    validation_loss,
)

METHODS = {
    "forward": lambda steps: RTHO(hyper_batch_size=steps, outer_optimizer=None),
    "recompute": lambda steps: TRHO(hyper_batch_size=steps, outer_optimizer=None, tape=Recompute()),
    "keep graph": lambda steps: TRHO(
        hyper_batch_size=steps, outer_optimizer=None, tape=KeepGraph()
    ),
}


class Bootstrapped(SmallNet):
    """Learns in part from its own predictions, taken as targets; each loss weighs its own error."""

    stop = staticmethod(stop_gradient)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        predicted = self.net(x)
        target = self.stop(self.net(x + 0.5) + self.l2 * self.net[-1].bias)
        weight = 1 / (1 + self.stop(predicted) ** 2)
        return super().training_step(batch, batch_idx) + (weight * (predicted - target) ** 2).mean()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))


class Reversed(SmallNet):
    """Features shall not tell whose the example is: the gradient of that part is turned round."""

    scale = staticmethod(scale_gradient)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        features = self.net[:-1](x)
        guessed = self.net[-1](self.scale(features, -self.l2))
        return super().training_step(batch, batch_idx) + F.mse_loss(guessed, x[:, :1])


@pytest.mark.parametrize("body", [None, normed], ids=["plain", "batch norm"])
@pytest.mark.parametrize("module_class", [Bootstrapped, Reversed])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_gradient_was_stopped_at_or_scaled_by_is_followed(method, module_class, body):
    settings = {"lr": 0.1, "momentum": 0.6, "l2": 0.3}
    callback = METHODS[method](6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(were detached|autograd function)")
        fit(module_class(body=body, **as_hyperparameters(settings)), callback, steps=6)

    def loss_at(name: str, value: float) -> float:
        module = module_class(body=body, **{**settings, name: value})
        fit(module, steps=6)
        return validation_loss(module)

    for name, found in callback.hypergradients.items():
        key = name.split(".")[-1]
        expected = finite_difference(settings[key], lambda value, key=key: loss_at(key, value))
        # Central differences err by less than 1e-8 here.
        assert found.item() == pytest.approx(expected, rel=1e-6), name


def test_stop_gradient_trains_as_detach_does():
    class Detached(Bootstrapped):
        stop = staticmethod(torch.Tensor.detach)

    stopped, detached = Bootstrapped(lr=0.1), Detached(lr=0.1)
    for module in (stopped, detached):
        fit(module, steps=6)
    for one, other in zip(stopped.parameters(), detached.parameters(), strict=True):
        assert torch.equal(one, other)


class GradientReversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return ctx.factor * grad, None


def test_scale_gradient_trains_as_a_function_of_ones_own_does():
    class Plain(Reversed):
        scale = staticmethod(GradientReversal.apply)

    ours, plain = Reversed(lr=0.1, l2=0.3), Plain(lr=0.1, l2=0.3)
    for module in (ours, plain):
        fit(module, steps=6)
    for one, other in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_hyperparameter_that_only_scales_a_gradient_is_used():
    class Adversarial(SmallNet):
        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0])
            return F.mse_loss(scale_gradient(predicted, self.l2), batch[1])

    found = RTHO(hyper_batch_size=4, outer_optimizer=None)
    fit(Adversarial(**as_hyperparameters({"l2": 0.3}), lr=0.1), found, steps=4)
    by_rate = RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None)
    fit(Adversarial(l2=0.3, lr=0.1), by_rate, steps=4)
    # Only the product of the two acts: 0.3 dE/d(0.3) = 0.1 dE/d(0.1), but for rounding.
    assert found.hypergradients["l2"].item() * 0.3 == pytest.approx(
        by_rate.hypergradients["lr"].item() * 0.1, rel=1e-12
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_function_of_ones_own_is_warned_of(method):
    class Plain(Reversed):
        scale = staticmethod(GradientReversal.apply)

    with pytest.warns(UserWarning, match="function `GradientReversal`") as warned:
        fit(Plain(**as_hyperparameters({"lr": 0.1, "l2": 0.3})), METHODS[method](2), steps=4)
    assert sum("autograd function" in str(w.message) for w in warned) == 1


class Switching(SmallNet):
    """Reverses gradients by a function of its own, from its second step on."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return super().training_step([self.turned(x) if self.global_step else x, y], batch_idx)

    def turned(self, x):
        return GradientReversal.apply(self.net(x), 1.0) * x


class ValidatingBy(Switching):
    def training_step(self, batch, batch_idx):
        return SmallNet.training_step(self, batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        return super().validation_step([self.turned(x), y], batch_idx)


class Quantized(SmallNet):
    def training_step(self, batch, batch_idx):
        x, y = batch
        rounded = torch.fake_quantize_per_tensor_affine(self.net(x).float(), 0.01, 0, -128, 127)
        return F.mse_loss(rounded.to(y), y)


@pytest.mark.parametrize(
    ("module_class", "message"),
    [
        (Switching, "`training_step` runs the autograd function `GradientReversal`"),
        (ValidatingBy, "The outer objective runs the autograd function `GradientReversal`"),
        (Quantized, "`training_step` runs the autograd function `FakeQuantize"),
    ],
)
def test_a_backward_pass_that_need_be_no_derivative_is_warned_of_wherever_it_is(
    module_class, message
):
    with pytest.warns(UserWarning, match="autograd function") as warned:
        fit(module_class(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)
    assert [message in str(w.message) for w in warned].count(True) == 1


def test_what_training_leaves_in_a_buffer_for_validation_is_warned_of():
    class Centred(SmallNet):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.register_buffer("centre", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                self.centre.lerp_(self.net(batch[0]).mean(0), 0.1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(self.net(x) - self.centre, y)

    with pytest.warns(UserWarning, match="a step of training that wrote to a buffer") as warned:
        fit(Centred(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)
    assert sum("were detached" in str(w.message) for w in warned) == 1


def test_what_the_first_weights_leave_in_a_buffer_is_a_constant():
    class Relative(SmallNet):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.register_buffer("first", torch.ones(()))

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == 0:
                self.first.copy_(loss.detach())
            return loss

        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch, batch_idx) / self.first

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Relative(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


def test_looks_have_no_period():
    looked_at = [n for n in range(1, 1001) if _is_looked_at(n)]
    for period in range(1, 21):
        assert any(n % period == 0 for n in looked_at), period
    assert 20 < len(looked_at) < 40


def test_batch_statistics_of_detached_values_are_warned_of():
    class PseudoLabelled(SmallNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            with torch.no_grad():
                labels = self.net(x + 0.1) > 0
            return F.mse_loss(self.net(x), y + 0.1 * labels)

    with pytest.warns(UserWarning, match="were detached"):
        fit(PseudoLabelled(lr=0.1, body=normed), RTHO(["lr"]), steps=4)


def no_grad(x):
    with torch.no_grad():
        return 1.0 * x


@pytest.mark.parametrize("detach", [torch.Tensor.detach, no_grad], ids=["detach", "no_grad"])
def test_detached_values_in_the_loss_are_warned_of_once(detach):
    class Detached(SmallNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            predicted = self.net(x)
            return F.mse_loss(predicted, y) * (1 + detach(predicted).square().mean())

    with pytest.warns(UserWarning, match="were detached") as warned:
        fit(Detached(lr=0.1), RTHO(["lr"]), steps=4)
    assert sum("were detached" in str(w.message) for w in warned) == 1


def test_values_detached_to_be_looked_at_are_not_warned_of():
    class Watched(SmallNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = super().training_step(batch, batch_idx)
            with torch.no_grad():
                error = (self.net(x) - y).abs().mean()
            self.log("error", error)
            self.log("norm", loss.detach() + self.net[0].weight.norm().item())
            return {"loss": loss, "error": error}

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Watched(torch.optim.Adam, lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


@pytest.mark.parametrize("sign", [torch.sign, Tensor.sign_])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_by_signs_of_gradients_is_exact_and_not_warned_of(method, sign):
    class Attacked(SmallNet):
        """Trains on inputs that a gradient's signs have made worse."""

        def training_step(self, batch, batch_idx):
            x, y = batch
            x = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(F.mse_loss(self.net(x), y), x)
            return super().training_step([x.detach() + 0.1 * sign(gradient), y], batch_idx)

    def loss_at(lr: float) -> float:
        fit(module := Attacked(lr=lr), steps=4)
        return validation_loss(module)

    callback = METHODS[method](4)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Attacked(**as_hyperparameters({"lr": 0.1})), callback, steps=4)
    (found,) = callback.hypergradients.values()
    assert found.item() == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_values_that_are_only_compared_with_a_loss_are_not_warned_of(step):
    class Compared(SmallNet):
        last = torch.zeros(())

    def compare(self, batch, batch_idx):
        loss = getattr(SmallNet, step)(self, batch, batch_idx)
        self.log("gain", self.last - loss)
        self.log("share", loss / (self.net(batch[0]).detach().square().mean() + 1))
        self.last = loss.detach()
        return loss

    setattr(Compared, step, compare)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Compared(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=8)


@pytest.mark.parametrize("write", ["item", "data"])
def test_what_is_written_to_a_memory_of_outputs_is_warned_of(write):
    class Remembering(SmallNet):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.register_buffer("memory", torch.zeros(4, 1))

        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0])
            loss = F.mse_loss(predicted, batch[1]) + (predicted * self.memory.clone()).mean()
            if write == "item":
                self.memory[:] = predicted.detach()
            else:
                self.memory.data = predicted.detach()
            return loss

    with pytest.warns(UserWarning, match="from one step to the next"):
        fit(Remembering(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


WRITES = {
    "a part": lambda h, d: h[:2].mul_(d[:2]),
    "a view": lambda h, d: h.view(-1).mul_(d.view(-1)),
    "transposed": lambda h, d: h.T.mul_(d.T),
    "copied": lambda h, d: h[1].copy_(d[1]),
}


@pytest.mark.parametrize("write", WRITES)
def test_detached_values_that_are_written_through_views_are_warned_of(write):
    class Written(SmallNet):
        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0]).clone()
            WRITES[write](predicted, self.net(batch[0]).detach().exp())
            return F.mse_loss(predicted, batch[1])

    with pytest.warns(UserWarning, match="were detached"):
        fit(Written(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=2)


def test_detached_values_in_a_function_transform_are_noticed():
    w = torch.ones(2, requires_grad=True)
    with DetachedWeights([w]) as watch:
        loss = torch.func.grad(lambda x: (x * x.detach().norm()).sum())(w).sum()
        assert watch.entries_of(loss)


def test_a_tensor_that_begins_a_graph_of_its_own_is_not_warned_of():
    class Perturbed(SmallNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * torch.ones_like(loss).requires_grad_()

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Perturbed(lr=0.1), RTHO(["lr"]), steps=2)


def test_weights_that_stay_frozen_are_not_warned_of():
    module = SmallNet(lr=0.1)
    module.net[2].requires_grad_(False)  # and are the optimizer's nevertheless
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(module, RTHO(["lr"], hyper_batch_size=2), steps=4)


@pytest.mark.parametrize("hidden", [True, False])
def test_weights_that_validation_hides_from_the_graph_are_warned_of(hidden):
    class Hiding(SmallNet):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            with torch.set_grad_enabled(not hidden):
                features = self.net[:2](x)
            loss = F.mse_loss(self.net[2](features), y)
            self.log("val_loss", loss.detach())
            return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Hiding(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=6)
    found = [w for w in caught if "The outer objective uses values" in str(w.message)]
    assert len(found) == hidden


TEMPLATES = {
    "zeros_like": lambda z: torch.zeros_like(z) + z,
    "randn_like": lambda z: z + z.exp() * torch.randn_like(z),  # as in a variational autoencoder
    "new_ones": lambda z: z * z.new_ones(1),
    "type_as": lambda z: z - torch.ones(1).type_as(z),
    "to": lambda z: z - torch.ones(1).to(z),
    "distribution": lambda z: torch.distributions.Normal(z, z.exp()).rsample(),
}


@pytest.mark.parametrize("make", TEMPLATES)
def test_what_has_the_shape_of_a_value_alone_is_not_warned_of(make):
    class Shaped(SmallNet):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(TEMPLATES[make](self.net(batch[0])), batch[1])

        validation_step = training_step

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Shaped(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


def test_constants_that_are_broadcast_with_a_value_are_not_warned_of():
    class Likelihood(SmallNet):
        def training_step(self, batch, batch_idx):
            return -Normal(self.net(batch[0]), 0.5).log_prob(batch[1]).mean()

        validation_step = training_step

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Likelihood(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


HIDING = {
    "a broadcast": lambda z: z.exp() * torch.broadcast_tensors(z, z.detach().mean())[1],
    "a hard choice": lambda z: F.gumbel_softmax(z.expand(-1, 2), hard=True)[:, :1] * z,
    "a map over the batch": lambda z: torch.vmap(lambda row: row * row.detach().exp())(z),
}


@pytest.mark.parametrize("name", HIDING)
def test_what_is_detached_within_a_function_of_torch_is_warned_of(name):
    class Hiding(SmallNet):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(HIDING[name](self.net(batch[0])), batch[1])

    with pytest.warns(UserWarning, match="were detached"):
        fit(Hiding(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


SHOWING = {
    "a broadcast": lambda z: torch.broadcast_tensors(z, z.detach().mean())[0],
    "a soft choice": lambda z: F.gumbel_softmax(z.expand(-1, 2))[:, :1] * z,
}


@pytest.mark.parametrize("name", SHOWING)
def test_what_stands_beside_a_detached_value_is_not_warned_of(name):
    class Showing(SmallNet):
        def training_step(self, batch, batch_idx):
            return F.mse_loss(SHOWING[name](self.net(batch[0])), batch[1])

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were detached")
        fit(Showing(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=4)


@pytest.mark.parametrize("begins_at", [0, 1, 5])
def test_what_is_carried_from_step_to_step_is_warned_of(begins_at):
    """The centre that the outputs had so far, as of self-distillation."""

    class Centred(SmallNet):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.register_buffer("centre", torch.zeros(1))

        def training_step(self, batch, batch_idx):
            predicted = self.net(batch[0])
            loss = F.mse_loss(predicted - self.centre, batch[1])
            if self.global_step >= begins_at:
                with torch.no_grad():
                    self.centre.mul_(0.9).add_(predicted.mean(0), alpha=0.1)
            return loss

    with pytest.warns(UserWarning, match="from one step to the next"):
        fit(Centred(lr=0.1), RTHO(["lr"], hyper_batch_size=2), steps=20)


@pytest.mark.parametrize("shared", [True, False])
def test_an_outer_objective_with_the_penalty_in_it_is_warned_of(shared):
    class Shared(SmallNet):
        def validation_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)

    module = (Shared if shared else SmallNet)(**as_hyperparameters({"lr": 0.1, "l2": 0.01}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, RTHO(hyper_batch_size=2), steps=6)
    found = [str(w.message) for w in caught if "itself, not only" in str(w.message)]
    assert len(found) == shared
    assert all("depends on `l2` itself" in message for message in found)
