"""Bad input gets an error that names the argument, shows the value and says what to do."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    Interval,
    KeepGraph,
    NonNegative,
    Positive,
    ReplaySchedule,
    Schedule,
)
from tests.callbacks.problems import FEATURES, SmallNet, as_hyperparameters, fit, loader


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hyperparameter(-1.0, Positive()), r"`value` must lie in Positive\(\), got -1.0"),
        (lambda: Hyperparameter(2, Interval(0, 1)), r"`value` must lie in Interval\(.*got 2.0"),
        (lambda: Interval(1, 0), r"`low` must be below `high`.*low=1, high=0"),
        (lambda: RTHO(hyper_batch_size=0), r"`hyper_batch_size` must be .* got 0"),
        (lambda: TRHO(hyper_batch_size=2.5), r"`hyper_batch_size` must be .* got 2.5"),
        (lambda: RTHO(outer_batches=0), r"`outer_batches` must be .* got 0"),
        (lambda: RTHO(start_step=-1), r"`start_step` must be .* got -1"),
        (lambda: RTHO(start_step=5, stop_step=5), r"`stop_step` must be .* got 5"),
        (lambda: RTHO(discount=1.5), r"`discount` must lie in \[0, 1\], got 1.5"),
    ],
)
def test_value_errors_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RTHO("lr"), r"`hyperparameters` must be a list .* got 'lr'"),
        (lambda: RTHO({"lr"}), r"`hyperparameters` must be a list .* got \{'lr'\}"),  # no order
        (lambda: RTHO(outer_optimizer="adam"), r"`outer_optimizer` must be .* got 'adam'"),
        (lambda: TRHO(tape="recompute"), r"`tape` must be .* got 'recompute'"),
        (lambda: Hyperparameter(1.0, Positive), r"`domain` must be a Domain"),
    ],
)
def test_type_errors_at_construction(make, message):
    with pytest.raises(TypeError, match=message):
        make()


class Untouched(SmallNet):
    """Fails the test if a weight has moved."""

    def on_train_batch_end(self, *args: Any) -> None:
        pytest.fail("training went on")


class NoLoss(Untouched):
    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)


class DetachedLoss(Untouched):
    def validation_step(self, batch, batch_idx):
        return super().validation_step(batch, batch_idx).detach()


class NoLossKey(Untouched):
    def validation_step(self, batch, batch_idx):
        return {"val_loss": super().validation_step(batch, batch_idx)}


class OwnBackward(Untouched):
    def backward(self, loss):
        loss.backward()


class OwnSchedule(optim.lr_scheduler.StepLR):
    def get_lr(self):
        return [0.1 for _ in self.base_lrs]


class Scheduled(Untouched):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [OwnSchedule(optimizer, 1)]


class Cycled(Untouched):
    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        return [optimizer], [optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 10)]


class SharedMinimum(Untouched):
    def configure_optimizers(self):
        optimizer = optim.SGD([{"params": [p]} for p in self.parameters()], lr=0.1)
        return [optimizer], [optim.lr_scheduler.CosineAnnealingLR(optimizer, 10, eta_min=0.01)]


class UsedNowhere(SmallNet):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.forgotten = Hyperparameter(1.0, Positive())


class ActingLate(UsedNowhere):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.forgotten if self.global_step == 2 else loss


class Undeclared(SmallNet):
    def configure_optimizers(self):
        return optim.SGD(
            self.parameters(), lr=self.settings["lr"], momentum=Hyperparameter(0.5, Interval(0, 1))
        )


class Sampling(Untouched):
    def __init__(self, mean: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.mean, self.noise = mean, Hyperparameter(0.1, Positive())

    def training_step(self, batch, batch_idx):
        noise = torch.normal(self.mean, self.noise * torch.ones_like(batch[0]))
        return super().training_step([batch[0] + noise, batch[1]], batch_idx)


class SamplingLate(Sampling):
    def training_step(self, batch, batch_idx):
        if self.global_step == 0:
            return torch.nn.functional.mse_loss(self.net(batch[0] + self.noise), batch[1])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        """Let training go on."""


class Lazy(Untouched):
    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])


class TrainedHyperparameter(Untouched):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rho = Hyperparameter(1.0, Positive())

    def configure_optimizers(self):
        return optim.SGD([*self.parameters(), self.rho], lr=0.1)


CASES: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "nothing to tune": (
        lambda: Untouched(lr=0.1), RTHO, {}, MisconfigurationException, "declares no hyperp"
    ),
    "unknown key": (
        lambda: Untouched(lr=0.1),
        lambda: RTHO(["learning_rate"]),
        {},
        ValueError,
        "`hyperparameters` names 'learning_rate'.*Known: lr, momentum",
    ),
    "key of another optimizer": (
        lambda: Untouched(lr=0.1), lambda: RTHO(["beta1"]), {}, ValueError, "names 'beta1'"
    ),
    "value outside its domain": (
        lambda: Untouched(lr=0.0), lambda: RTHO(["lr"]), {}, ValueError, "'lr'.*Positive.*got 0.0"
    ),
    "no rule": (
        lambda: Untouched(optim.Rprop, lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        TypeError,
        "No differentiable rule for `Rprop`. Known: ASGD.*register_rule",
    ),
    "samples": (
        lambda: Sampling(torch.zeros(3), lr=0.1),
        RTHO,
        {},
        MisconfigurationException,
        r"`torch.normal\(mean, std\)`, whose derivative.*`mean \+ std \* torch.randn_like\(mean\)",
    ),
    "samples about a number, in reverse": (
        lambda: Sampling(0.0, lr=0.1), TRHO, {}, MisconfigurationException, "`torch.normal"
    ),
    "lazy weights": (
        lambda: Lazy(lr=0.1, body=lambda: torch.nn.LazyLinear(1)),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        "`net.weight` has no shape yet.*`num_sanity_val_steps`",
    ),
    "lazy statistics": (
        lambda: Lazy(
            lr=0.1,
            body=lambda: torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.LazyBatchNorm1d()),
        ),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        "has no shape yet",
    ),
    "trained as a weight": (
        lambda: TrainedHyperparameter(), RTHO, {}, ValueError, "`params` must hold weights"
    ),
    "no validation data": (
        lambda: Untouched(lr=0.1),
        lambda: RTHO(["lr"]),
        {"val": []},
        MisconfigurationException,
        "validation data",
    ),
    "no validation batches": (
        lambda: Untouched(lr=0.1),
        lambda: RTHO(["lr"]),
        {"limit_val_batches": 0},
        MisconfigurationException,
        "needs validation data",
    ),
    "several validation loaders": (
        lambda: Untouched(lr=0.1),
        lambda: RTHO(["lr"]),
        {"val": [loader(4, 1, 2), loader(4, 1, 2)]},
        MisconfigurationException,
        "`dataloader` must say.*2 validation loaders",
    ),
    "validation step without a loss": (
        lambda: NoLoss(lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        "`validation_step` must return the validation loss.*got None",
    ),
    "validation step with another key": (
        lambda: NoLossKey(lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        r"the key 'loss', got a dict with the keys \['val_loss'\]",
    ),
    "detached validation loss": (
        lambda: DetachedLoss(lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        "does not depend on the weights",
    ),
    "own backward": (
        lambda: OwnBackward(lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        MisconfigurationException,
        "`OwnBackward.backward` is overridden",
    ),
    "learning rate under a scheduler": (
        lambda: Scheduled(lr=0.1),
        lambda: RTHO(["lr"]),
        {},
        TypeError,
        "`lr` cannot be tuned under the scheduler `OwnSchedule`",
    ),
    "momentum under a scheduler that cycles it": (
        lambda: Cycled(lr=0.1, momentum=0.5),
        lambda: RTHO(["momentum"]),
        {},
        ValueError,
        "`momentum` cannot be tuned while a scheduler cycles it",
    ),
    "least rate shared by groups": (
        lambda: SharedMinimum(),
        lambda: RTHO(["lr"]),
        {},
        ValueError,
        "`eta_min` of CosineAnnealingLR must be 0",
    ),
    "momentum from 0 under dampening": (
        lambda: Untouched(lr=0.1, dampening=0.1),
        lambda: RTHO(["momentum"]),
        {},
        ValueError,
        "`momentum` cannot be tuned from 0 with dampening",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_before_a_weight_has_moved(case):
    make_module, make_callback, settings, error, message = CASES[case]
    module = make_module()
    before = [copy.deepcopy(p) for p in module.parameters()]
    with pytest.raises(error, match=f"(?s){message}"):
        fit(module, make_callback(), **settings)
    assert all(_equal(p, old) for p, old in zip(module.parameters(), before, strict=True))


@pytest.mark.parametrize("method", [RTHO, TRHO])
def test_what_is_used_nowhere_is_refused_before_an_update(method):
    callback = method(hyper_batch_size=2)
    with pytest.raises(MisconfigurationException, match=r"`forgotten`.*nowhere.*`start_step`"):
        fit(UsedNowhere(lr=0.1), callback, steps=4)
    assert not callback.schedule
    late = method(hyper_batch_size=3, outer_optimizer=None)
    fit(ActingLate(lr=0.1), late, steps=3)
    assert late.hypergradients["forgotten"] != 0


def test_what_the_optimizer_alone_holds_is_warned_of():
    callback = RTHO(hyper_batch_size=2)
    said = r"`momentum` is Hyperparameter.*does not declare.*self.momentum ="
    with pytest.warns(UserWarning, match=said):
        fit(Undeclared(lr=Hyperparameter(0.1, Positive())), callback, steps=2)
    assert list(callback.hyperparameters) == ["settings.lr"]


@pytest.mark.parametrize("slope", [lambda h: h, lambda h: 1 - h], ids=["itself", "computed"])
def test_where_torch_takes_numbers_alone_it_is_said_what_to_do(slope):
    class Leaky(SmallNet):
        def training_step(self, batch, batch_idx):
            leaking = F.leaky_relu(batch[0], slope(self.l2))
            return super().training_step((leaking, batch[1]), batch_idx)

    with pytest.raises(TypeError, match="negative_slope") as caught:
        fit(Leaky(lr=0.1, l2=Hyperparameter(0.1, Positive())), RTHO())
    assert any("plain numbers alone" in note for note in caught.value.__notes__)


def test_an_attribute_that_is_given_another_value_is_warned_of():
    class Annealed(SmallNet):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 3:
                self.l2 = 0.5 * float(self.l2)

    callback = RTHO(hyper_batch_size=2)
    with pytest.warns(UserWarning, match="`l2` is tuned, but its attribute") as warned:
        fit(Annealed(**as_hyperparameters({"lr": 0.1, "l2": 0.1})), callback, steps=8)
    assert sum("its attribute" in str(warning.message) for warning in warned) == 1
    assert len(callback.schedule) == 4


def test_a_declared_hyperparameter_that_was_overwritten_before_the_fit_is_warned_of():
    class Finder(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            pl_module.l2 = 0.1

    module = SmallNet(**as_hyperparameters({"lr": 0.1, "l2": 0.1}))
    callback = RTHO(hyper_batch_size=2)
    with pytest.warns(UserWarning, match=r"`l2` was declared .* `RTHO\(\['l2'\]\)`"):
        fit(module, Finder(), callback, steps=2)
    assert [*callback.hyperparameters] == ["settings.lr"]


def test_samples_that_come_late_are_refused_before_an_update():
    callback = RTHO(hyper_batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"`torch.normal"):
        fit(SamplingLate(0.0, lr=0.1), callback, steps=4)
    assert not callback.schedule


def _equal(weight: torch.Tensor, old: torch.Tensor) -> bool:
    return is_lazy(weight) if is_lazy(old) else torch.equal(weight, old)


class ScaledGradient(SmallNet):
    def on_after_backward(self):
        for param in self.parameters():
            param.grad.mul_(0.5)


class ScaledBeforeStep(SmallNet):
    def on_before_optimizer_step(self, optimizer):
        for param in self.parameters():
            param.grad.mul_(0.5)


class ScaledLater(SmallNet):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 2:  # when gradients are no longer copied
            next(iter(self.parameters())).grad.mul_(0.5)


class ReplacedLater(SmallNet):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step == 2:
            param = next(iter(self.parameters()))
            param.grad = param.grad.mul(0.5)


class ScaledUncounted(SmallNet):
    def on_before_optimizer_step(self, optimizer):
        if self.global_step > 2:
            next(iter(self.parameters())).grad.data.mul_(0.5)


class OwnClipping(SmallNet):
    def configure_gradient_clipping(self, optimizer, **kwargs):
        for param in self.parameters():
            param.grad.clamp_(-0.01, 0.01)


class Unrepeatable(SmallNet):
    def training_step(self, batch, batch_idx):
        self.file = getattr(self, "file", None) or iter(range(100))
        return super().training_step(batch, batch_idx) * (1 + next(self.file))


@pytest.mark.parametrize(
    "make",
    [RTHO, TRHO, partial(TRHO, tape=KeepGraph())],
    ids=["forward", "recompute", "keep graph"],
)
@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (ScaledGradient, {}),
        (ScaledLater, {"steps": 4}),
        (ReplacedLater, {"steps": 4}),
        (ScaledUncounted, {"steps": 12}),
        (ScaledBeforeStep, {}),
        (ScaledBeforeStep, {"gradient_clip_val": 0.1}),
        (OwnClipping, {}),
        (OwnClipping, {"gradient_clip_val": 0.1}),
    ],
)
def test_gradients_edited_after_backward_are_refused(make, module, settings):
    with pytest.raises(MisconfigurationException, match="changes gradients"):
        fit(module(lr=0.1), make(["lr"], hyper_batch_size=2), **settings)


def test_training_step_that_cannot_be_repeated_is_refused():
    with pytest.raises(MisconfigurationException, match="does not compute the same loss twice"):
        fit(Unrepeatable(lr=0.1), TRHO(["lr"], hyper_batch_size=2))


def test_weight_decay_may_start_at_zero():
    callback = RTHO({"weight_decay": NonNegative()}, hyper_batch_size=1)
    fit(SmallNet(lr=0.1, weight_decay=0.0), callback)
    assert callback.hyperparameters["weight_decay"] >= 0


class ScaledByCompany(L.Callback):
    """Stands before ours, and comes in late."""

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step > 3:
            for param in pl_module.parameters():
                param.grad.mul_(0.5)


@pytest.mark.parametrize("make", [RTHO, TRHO, partial(TRHO, tape=KeepGraph())])
def test_gradients_edited_late_by_a_callback_before_ours_are_refused(make):
    ours = make(["lr"], hyper_batch_size=2)
    with pytest.raises(MisconfigurationException, match="changes gradients"):
        fit(SmallNet(lr=0.1), ScaledByCompany(), ours, steps=8)


class SteppedTwice(SmallNet):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for _ in range(2):
            optimizer.step(closure=optimizer_closure)


class OwnStatistics(nn.Module):
    """Normalizes by a function of torch, and averages into buffers of its own."""

    def __init__(self, normalize: Callable[..., Tensor]) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", torch.zeros(FEATURES))
        self.register_buffer("var", torch.ones(FEATURES))

    def forward(self, x):
        return self.normalize(x, self.mean, self.var, self.training)


def by_batch(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    return F.batch_norm(x, mean, var, training=training)


def by_instance(x: Tensor, mean: Tensor, var: Tensor, training: bool) -> Tensor:
    repeated = torch.stack([x, 2 * x], -1)
    return F.instance_norm(repeated, mean, var, use_input_stats=training).mean(-1) + x


def averaging(normalize: Callable[..., Tensor]) -> nn.Module:
    layers = nn.Linear(FEATURES, FEATURES), OwnStatistics(normalize), nn.Linear(FEATURES, 1)
    return nn.Sequential(*layers)


class Embedded(nn.Linear):
    """Reads its columns from a table, one for each sign."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(2 * FEATURES, 1)
        self.table, self.settings = nn.Parameter(torch.randn(2, FEATURES)), settings

    def forward(self, x):
        column = F.embedding((x[:, 0] > 0).long(), self.table, **self.settings)
        return super().forward(torch.cat([x, column], 1))


@pytest.mark.parametrize("make", [RTHO, TRHO, partial(TRHO, tape=KeepGraph())])
@pytest.mark.parametrize(
    ("module", "body", "message"),
    [
        (SteppedTwice, None, "stepped more than once a batch"),
        (SmallNet, partial(averaging, by_batch), "`net.1` averages its running statistics"),
        (SmallNet, partial(averaging, by_instance), "`net.1` averages its running statistics"),
        (SmallNet, partial(Embedded, scale_grad_by_freq=True), "scale_grad_by_freq=True"),
        (SmallNet, partial(Embedded, max_norm=0.1), "writes to weights"),
    ],
)
def test_what_functions_do_that_layers_may_not_do_either_is_refused(make, module, body, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(lr=0.1, body=body), make(["lr"], hyper_batch_size=2), steps=4)


class Functional(SmallNet):
    """Leaves its statistics alone, but for those of its inputs; reads from a table of constants."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(body=lambda: nn.Sequential(nn.Linear(FEATURES, 3), nn.BatchNorm1d(3)))
        self.settings, self.inputs = settings, OwnStatistics(by_batch)
        self.register_buffer("table", torch.ones(2, FEATURES))

    def training_step(self, batch, batch_idx):
        x, y = batch
        x = self.inputs(x) + torch.instance_norm(
            input=torch.stack([x, 2 * x], -1), weight=None, bias=None, running_mean=None,
            running_var=None, use_input_stats=True, momentum=0.1, eps=1e-5, cudnn_enabled=False,
        ).mean(-1)  # fmt: skip
        x = x + F.embedding((x[:, 0] > 0).long(), self.table, None, 1.0, scale_grad_by_freq=True)
        buffers = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        return F.mse_loss(functional_call(self.net, buffers, x).mean(1, keepdim=True), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        swapped = self.net[0].weight.detach().clone()
        with torch.no_grad():
            self.net[0].weight.mul_(2)
            self.log("other", F.mse_loss(self.net(x).mean(1, keepdim=True), y))
            self.net[0].weight.copy_(swapped)
        return F.mse_loss(self.net(x).mean(1, keepdim=True), y)


@pytest.mark.parametrize("make", [RTHO, TRHO, partial(TRHO, tape=KeepGraph())])
def test_what_only_looks_like_it_is_not_refused(make):
    fit(Functional(lr=0.1), callback := make(["lr"], hyper_batch_size=2), steps=4)
    assert len(callback.schedule) == 2


def test_a_training_step_that_shortens_its_table_is_refused():
    class ShortenedInTraining(SmallNet):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            return F.mse_loss(F.linear(x, self.net.weight[:, :FEATURES]), y)

    module = ShortenedInTraining(lr=0.1, body=partial(Embedded, max_norm=0.1))
    with pytest.raises(MisconfigurationException, match="shortens its weights"):
        fit(module, RTHO(["lr"], hyper_batch_size=2), steps=4)


class WritesWhenValidated(Untouched):
    def validation_step(self, batch, batch_idx):
        self.net[0].weight.data *= 0.5
        return super().validation_step(batch, batch_idx)


def test_an_outer_objective_that_writes_to_weights_is_refused_though_nothing_is_followed():
    with pytest.raises(MisconfigurationException, match="writes to weights"):
        fit(WritesWhenValidated(lr=0.1), RTHO(["lr"], start_step=100))


def test_a_backward_pass_from_a_vector_is_refused():
    class FromVector(SmallNet):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = (self.net(x) - y).square()
            self.manual_backward(loss, gradient=torch.ones_like(loss))

    with pytest.raises(MisconfigurationException, match="A loss must be a scalar"):
        fit(FromVector(lr=0.1), RTHO(["lr"]))


def test_sharpness_aware_minimization_by_two_closures_is_refused():
    class Sharp(SmallNet):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            optimizer_closure()
            with torch.no_grad():
                for param in self.net.parameters():
                    param += 0.01 * param.grad
            optimizer.step(closure=optimizer_closure)

    with pytest.raises(MisconfigurationException, match="sharpness-aware"):
        fit(Sharp(lr=0.1), RTHO(["lr"]))


class ValidatesAnAverage(Untouched):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.average = AveragedModel(self.net)

    def validation_step(self, batch, batch_idx):
        return (self.average(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize(
    ("make", "module", "settings", "message"),
    [
        (lambda: RTHO([]), Untouched, {}, "`hyperparameters` must name at least one"),
        (lambda: RTHO({}), Untouched, {}, "`hyperparameters` must name at least one"),
        (lambda: RTHO(["lr"]), Untouched, {"limit_val_batches": 0}, "limit_val_batches=0"),
        (lambda: RTHO(["lr"]), ValidatesAnAverage, {}, "no weight that the optimizer trains"),
    ],
)
def test_what_leaves_nothing_to_do_is_refused(make, module, settings, message):
    with pytest.raises(MisconfigurationException, match=message):
        fit(module(lr=0.1), make(), **settings)


@pytest.mark.parametrize(
    "callback", [RTHO(["lr"]), ReplaySchedule(Schedule(start={"lr": torch.tensor(0.1)}))]
)
def test_modules_of_the_other_package_are_refused_by_its_name(callback):
    other = pytest.importorskip("pytorch_lightning")  # which `lightning` brings along

    class Module(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(3, 1)

        def training_step(self, batch, batch_idx):
            return (self.net(batch[0]) - batch[1]).square().mean()

        validation_step = training_step

        def configure_optimizers(self):
            return optim.SGD(self.parameters(), lr=0.1)

    trainer = other.Trainer(
        **{"accelerator": "cpu", "max_steps": 4, "callbacks": [callback], "logger": False},
        **{"enable_checkpointing": False, "enable_progress_bar": False},
    )
    data = loader(8, seed=1, batch_size=4)
    with pytest.raises(MisconfigurationException, match=r"import lightning\.pytorch"):
        trainer.fit(Module(), data, data)
