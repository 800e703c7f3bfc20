"""hypergradcheck passes modules that are right and names what is wrong with others."""

import random
import re
import time
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn, optim
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchmetrics.regression import R2Score

from lightning_rtho import (
    RTHO,
    HypergradcheckError,
    HypergradcheckResult,
    Hyperparameter,
    Interval,
    NonNegative,
    Positive,
    Real,
    hypergradcheck,
    stop_gradient,
)
from lightning_rtho.callbacks._gradcheck._differences import Differences
from tests.callbacks.problems import FEATURES, SmallNet, fit, loader
from tests.callbacks.test_manual import Adversarial
from tests.callbacks.test_replay_schedule import Grouped, Weighted, noisy
from tests.callbacks.test_schedulers import SCHEDULERS, Scheduled


def positive(value: float) -> Hyperparameter:
    return Hyperparameter(value, Positive())


def check(module: Any, **settings: Any) -> HypergradcheckResult:
    train = loader(20, seed=1, batch_size=4, shuffle=True)
    return hypergradcheck(module, train, loader(6, seed=2, batch_size=2), **settings)


class Cube(torch.autograd.Function):
    """A function whose backward pass is right and differentiable."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


class Cubed(nn.Module):
    function = Cube

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(self.layer(x))


# Modules that are right


class Predicting(SmallNet):
    def outer_step(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor]:
        return self.net(batch[0]).flatten(), batch[1].flatten()


RIGHT: dict[str, tuple[Any, dict[str, Any]]] = {
    "declared": (
        lambda: SmallNet(
            lr=positive(0.1), momentum=Hyperparameter(0.9, Interval(0, 1)), l2=positive(0.01)
        ),
        {},
    ),
    "adam, dropout, statistics": (
        lambda: SmallNet(optim.Adam, body=noisy, lr=positive(0.01), l2=positive(0.01)),
        {},
    ),
    "named, from 0": (
        lambda: SmallNet(lr=0.1, momentum=0.0),
        {"hyperparameters": {"momentum": Real(), "weight_decay": NonNegative()}},
    ),
    "groups": (lambda: Grouped(lr=0.1), {"hyperparameters": ["lr"]}),
    "example weights": (Weighted, {}),
    "accumulation, clipping": (
        lambda: SmallNet(lr=positive(0.1)),
        {"trainer_kwargs": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}},
    ),
    "custom function": (lambda: SmallNet(body=Cubed, lr=positive(0.1)), {}),
    "metric": (
        lambda: Predicting(lr=positive(0.1), l2=positive(0.01)),
        {"objective": R2Score()},  # to be maximized
    ),
    "scheduler": (lambda: Scheduled(SCHEDULERS["cosine"], lr=positive(0.1)), {}),
    "two optimizers": (
        lambda: Adversarial(
            "stopped", lr=positive(0.05), critic_lr=positive(0.02), weight=positive(0.3)
        ),
        {"steps": 6},
    ),
}


@pytest.mark.parametrize("case", RIGHT)
def test_modules_that_are_right_pass(case, capsys):
    make, settings = RIGHT[case]
    result = check(make(), **settings)
    assert result.passed
    assert not result.causes
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(result.rows)
    for line, row in zip(printed[1:], result.rows, strict=True):
        assert line.startswith(row.name)
        assert line.endswith("ok")
        assert f"{row.forward:.5e}" in line
        assert row.forward != 0
        assert (row.reverse is None) == (case == "two optimizers")


def test_module_trains_in_float32_afterwards_as_before():
    torch.set_default_dtype(torch.float32)
    module = Weighted()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert check(module).passed
    after = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert after == (torch.rand(1), np.random.rand(), random.random())
    assert torch.is_inference_mode_enabled() is False
    assert module.weights.dtype == torch.float32
    assert torch.equal(module.weights.plain, torch.full((4, 1), 0.5))
    assert not module.weights.requires_grad
    for name, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_a_module_can_be_checked_after_it_was_trained():
    module = SmallNet(lr=positive(0.1))
    trainer = fit(module)
    before = [param.clone() for param in module.parameters()]
    assert check(module).passed
    assert module.trainer is trainer
    for param, value in zip(module.parameters(), before, strict=True):
        assert torch.equal(param, value)


def test_settings_of_a_real_run_can_be_handed_over(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = {
        "max_epochs": 100,
        "precision": "bf16-mixed",
        "devices": 1,
        "default_root_dir": tmp_path,
        "logger": CSVLogger(tmp_path),
        "callbacks": [RTHO(), ModelCheckpoint(tmp_path), EarlyStopping("val_loss")],
    }
    assert check(SmallNet(lr=positive(0.1)), trainer_kwargs=settings).passed
    assert not list(tmp_path.iterdir())


# Modules that are wrong


class Detached(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        y = y + 0.5 * self.net(x).detach()
        return F.mse_loss(self.net(x), y) + self.l2 * self.net[0].weight.square().sum()


class DetachedHyperparameter(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return super().training_step(batch, batch_idx) + self.l2.detach() * penalty


class NumberTaken(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        return super().training_step(batch, batch_idx) + self.l2.item() * penalty


class Logged(DetachedHyperparameter):
    """What is logged is taken out of the graph, too, and no cause of anything."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.log("l2", self.l2)
        return super().training_step(batch, batch_idx)


class NoGradInValidation(SmallNet):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        with torch.no_grad():
            scale = self.net(x).square().mean()
        return F.mse_loss(self.net(x), y) + scale * self.net(x).mean()


class FrozenSlope(torch.autograd.Function):
    """tanh, whose backward pass does not depend on where it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - x.tanh() ** 2
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


class OnceDifferentiable(SmallNet):
    def __init__(self, **settings: Any) -> None:
        super().__init__(body=CubedOnce, **settings)


class CubedOnce(Cubed):
    class function(Cube):
        backward = staticmethod(once_differentiable(Cube.backward))


class CustomFunction(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.mse_loss(FrozenSlope.apply(self.net(x)), y)
        return loss + self.l2 * self.net[0].weight.square().sum()


class Clamped(SmallNet):
    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for param in self.parameters():
                param.clamp_(-0.3, 0.3)


class EditedGradient(SmallNet):
    def on_after_backward(self) -> None:
        for param in self.parameters():
            param.grad.mul_(0.5)


class EditedBeforeTheStep(SmallNet):
    def on_before_optimizer_step(self, optimizer: optim.Optimizer) -> None:
        for param in self.parameters():
            param.grad.add_(0.1 * param.detach())


class HookedGradient(SmallNet):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.net[0].weight.register_hook(torch.sign)


class EditedAsItComes(SmallNet):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.net[0].weight.register_post_accumulate_grad_hook(self.halve)

    @staticmethod
    def halve(param: Tensor) -> None:
        param.grad.mul_(0.5)


class OwnGenerator(SmallNet):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.generator = torch.Generator().manual_seed(0)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = torch.randn(x.shape, generator=self.generator)
        return super().training_step([x + noise, y], batch_idx)


class Hooked(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        hidden = self.net[:-1](x)
        hidden.register_hook(lambda grad: -0.5 * grad)
        return super().training_step(batch, batch_idx) + F.mse_loss(self.net[-1](hidden), x[:, :1])


class Clock(SmallNet):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        noise = time.perf_counter_ns() % 1000 / 1000
        return super().training_step([x + noise, y], batch_idx)


class AtAKink(SmallNet):
    """The penalty's coefficient stands where its derivative jumps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in self.net.parameters())
        coefficient = F.relu(self.l2 * torch.ones(()) - 0.01)
        return super().training_step(batch, batch_idx) + coefficient * penalty


class Steps(SmallNet):
    """A loss that is piecewise constant in part: differences depend on their step size."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.mse_loss(self.net(x), y) + 1e-9 * (1e9 * self.net(x)).round().mean()


WRONG: dict[type[SmallNet], str] = {
    Detached: r"`detach`.*`training_step`, test_gradcheck.py:\d+: `.*mse_loss",
    DetachedHyperparameter: r"`detach`.*`training_step`, test_gradcheck.py:\d+: `.*l2.detach",
    Logged: r"`training_step`, test_gradcheck.py:\d+: `[^;]*l2.detach[^;]*$",
    NumberTaken: r"`item`.*`training_step`, test_gradcheck.py:\d+: `.*l2.item",
    NoGradInValidation: r"`torch.no_grad`.*`validation_step`, test_gradcheck.py:\d+: `.*scale",
    CustomFunction: "custom autograd function: FrozenSlope",
    Hooked: "refuses the module.*A hook changes a gradient.*`lightning_rtho.scale_gradient",
    OnceDifferentiable: "refuses the module.*differentiable",
    Clamped: "otherwise than by the optimizer",
    EditedGradient: "refuses the module.*gradient",
    EditedBeforeTheStep: "refuses the module.*gradient",
    EditedAsItComes: "refuses the module.*gradient",
    HookedGradient: "refuses the module.*A hook changes a gradient",
    OwnGenerator: "not replayed",
    Clock: "no seed fixes",
    AtAKink: "not smooth.*Relu",
    Steps: "not smooth.*Round",
}


@pytest.mark.parametrize("kind", WRONG)
def test_modules_that_are_wrong_are_told_why(kind, capsys):
    with pytest.raises(HypergradcheckError, match=WRONG[kind]) as caught:
        check(kind(lr=positive(0.1), l2=positive(0.01)))
    result = caught.value.result
    assert not result.passed
    assert len(result.causes) == 1
    assert result.causes[0] in capsys.readouterr().out
    if "refuses" not in WRONG[kind]:
        assert any(not row.agrees for row in result.rows)


def test_finer_differences_are_taken_next_to_a_kink():
    def bent(t: float) -> float:
        return t + 3 * max(t - 5e-7, 0)

    assert Differences.of(bent, 0.0).value > 2
    assert Differences.of(bent, 0.0, expected=[1.0], tolerance=1e-6).value == pytest.approx(1, 1e-6)
    assert Differences.of(bent, 0.0, expected=[3.0], tolerance=1e-6).value == pytest.approx(1, 1e-6)


def test_what_may_be_there_to_look_at_comes_last():
    class Looking(AtAKink):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.last = loss.item()
            return loss

    with pytest.raises(HypergradcheckError) as caught:
        check(Looking(lr=positive(0.1), l2=positive(0.01)))
    sure, unsure = caught.value.result.causes
    assert "not smooth" in sure
    assert re.search(r"if it is put back.*self.last = loss.item\(\)", unsure)


def test_repairing_the_detach_makes_it_pass():
    class Repaired(SmallNet):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            y = y + 0.5 * stop_gradient(self.net(x))
            return F.mse_loss(self.net(x), y) + self.l2 * self.net[0].weight.square().sum()

    assert check(Repaired(lr=positive(0.1), l2=positive(0.01))).passed


def test_a_network_of_relus_passes_where_no_kink_is_near():
    def body() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, 1))

    assert check(SmallNet(body=body, lr=positive(0.1))).passed


def test_nothing_is_raised_where_that_is_asked(capsys):
    result = check(Clamped(lr=positive(0.1)), raise_exception=False)
    assert not result.passed
    assert "DIFFERS" in capsys.readouterr().out


# Arguments


def test_steps_are_positive():
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        check(SmallNet(lr=positive(0.1)), steps=0)


@pytest.mark.parametrize(
    ("train", "message"),
    [([], "at least one batch"), ([loader(4, 1, 2), loader(4, 1, 2)], "one loader each")],
)
def test_loaders_are_checked(train, message):
    with pytest.raises(ValueError, match=message):
        hypergradcheck(SmallNet(lr=positive(0.1)), train, loader(4, 1, 2))


def test_a_module_without_hyperparameters_is_refused():
    with pytest.raises(HypergradcheckError, match="declares no hyperparameters"):
        check(SmallNet(lr=0.1))
