"""Hyperparameters act on the device of the weights, and nothing there is waited for in a step."""

import pytest
import torch
from torch import nn, optim
from torch.nn import functional as F

from lightning_rtho import (
    RTHO,
    TRHO,
    Hyperparameter,
    KeepGraph,
    Positive,
    Recompute,
    scale_gradient,
)
from lightning_rtho.dynamics import SGDRule, Transition
from lightning_rtho.hypergradient import (
    ForwardHypergradient,
    OptimizerStep,
    OuterGradient,
    ReverseHypergradient,
)
from lightning_rtho.hyperparameters import _hyperparameter
from lightning_rtho.linearization import Linearization, TracedLoss
from tests.callbacks.problems import SmallNet, as_hyperparameters, fit

METHODS = {
    "forward": lambda: RTHO(hyper_batch_size=4, outer_optimizer=None),
    "recompute": lambda: TRHO(hyper_batch_size=4, outer_optimizer=None, tape=Recompute()),
    "keep graph": lambda: TRHO(hyper_batch_size=4, outer_optimizer=None, tape=KeepGraph()),
}
META = torch.device("meta")


class Doubled(torch.autograd.Function):
    """Takes a hyperparameter as it is, past what the class makes of operators."""

    @staticmethod
    def forward(x, number):
        return x * number * 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, number = ctx.saved_tensors
        return grad * number * 2, (grad * x * 2).sum()


@pytest.fixture
def twins(monkeypatch):
    """Let hyperparameters act by twins that are on the host, too, so that there is no device."""
    monkeypatch.setattr(_hyperparameter, "place_of_doubles", lambda device: torch.device("cpu:0"))


def live(value: float, device: torch.device) -> Hyperparameter:
    hyper = Hyperparameter(value, Positive())
    hyper.place(device)
    hyper.make_live(True)
    return hyper


USES = {
    "beside a tensor": lambda h, x: h * x + x / h,
    "two numbers": lambda h, x: (1 - h) * x.sin() + h * h * x,
    "a function of it": lambda h, x: torch.log(h) * x + h.sigmoid() * x**2,
    "a power": lambda h, x: x.exp() ** h,
    "stacked with a constant": lambda h, x: torch.stack([h, Hyperparameter(2.0, Positive())]) @ x,
    "a function of torch": lambda h, x: torch.lerp(x, x**2, h),
    "a vector": lambda h, x: h.expand(2) * x,
    "a function of one's own": lambda h, x: Doubled.apply(x, h) + h * x,
    "only a function of one's own": lambda h, x: Doubled.apply(x, h),
    "a choice": lambda h, x: h * x if h > 0.1 else x,
    "beside a number of the host": lambda h, x: x * torch.maximum(h, torch.tensor(0.1)),
    "the factor of a gradient": lambda h, x: scale_gradient(x**2, h) * x,
}


@pytest.mark.parametrize("name", USES)
def test_derivatives_are_those_without_a_twin(name, twins):
    found = []
    for device in (None, torch.device("cpu")):
        h = Hyperparameter(0.3, Positive())
        if device is not None:
            h.place(device)
            assert len(h.leaves) == 2
        h.make_live(True)
        x = torch.tensor([0.4, -1.2], requires_grad=True)
        line = Linearization(TracedLoss(USES[name](h, x).square().sum()), [x], [h])
        with torch.no_grad():  # as in an optimizer's step
            product = line.product([torch.tensor([0.5, 2.0])], [torch.tensor(3.0)])
        found.append([*line.gradients, *product.params])
        found[-1] += [part for part in product.hypers if part is not None]
    torch.testing.assert_close(*found, rtol=1e-14, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_hypergradients_are_those_without_twins(method, request):
    class Various(SmallNet):
        def training_step(self, batch, batch_idx):
            x, y = batch
            predicted = self.net(x)
            loss = (1 - self.mix) * F.mse_loss(predicted, y) + self.mix * predicted.abs().mean()
            return loss + Doubled.apply(predicted.square().mean(), self.l2)

    found = []
    for is_twinned in (False, True):
        if is_twinned:
            request.getfixturevalue("twins")
        module = Various(optim.Adam, **as_hyperparameters({"lr": 0.05, "l2": 0.1}))
        module.mix = Hyperparameter(0.4, Positive())
        fit(module, callback := METHODS[method](), steps=8)
        assert len(module.mix.leaves) == 1 + is_twinned
        found.append({k: v.item() for k, v in callback.hypergradients.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-12)  # float64's rounding, eight steps


def test_a_twin_follows_what_it_stands_for(twins):
    h = live(0.5, torch.device("cpu"))
    x = torch.tensor([2.0])
    h.make_live(False)
    h.assign(torch.tensor(0.25))
    h.make_live(True)
    assert (h * x).item() == 0.5
    h.make_live(False)
    h.fill_(1.5)  # as someone else may
    h.make_live(True)
    assert (h * x).item() == 3.0


def test_gradients_by_what_is_not_used_are_none_or_refused(twins):
    h, x = live(0.5, torch.device("cpu")), torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(x.sum(), [x, h], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="not to have been used"):
        torch.autograd.grad(x.sum(), h)


def test_the_host_knows_the_value_of_what_is_live_on_a_device():
    h = live(0.5, META)  # where nothing can be read
    assert (h.item(), float(h), h.tolist(), f"{h:.1f}") == (0.5, 0.5, 0.5, "0.5")
    assert h > 0.1
    assert h.detach() == 0.5
    assert (h * torch.ones(1, device=META)).device == META


def test_numbers_of_device_and_host_go_together():
    h = live(0.5, META)
    for number in (torch.maximum(h.log(), h.detach()), h.log() / 3, 3 - h, h * h.exp()):
        assert number.device == META
        assert number.dim() == 0
    assert torch.rand_like(h).device.type == "cpu"  # by whose generator it is drawn without us
    assert torch.bernoulli(h).device.type == "cpu"


def test_a_twin_is_gone_after_the_fit():
    module = SmallNet(**as_hyperparameters({"lr": 0.1, "l2": 0.1}))
    module.l2.place(META)
    fit(module, METHODS["forward"](), steps=4)
    assert module.l2.leaves == [module.l2]


class Steps:
    """Steps of plain SGD on a device from which the host can read nothing; to try is an error."""

    is_sample = False

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.empty(3, device=META))
        shift = torch.empty(3, device=META, requires_grad=True)
        self.hypers = [live(0.1, META), live(0.5, META), shift]

    def __call__(self) -> TracedLoss:
        _, l2, shift = self.hypers
        penalty = l2 * (self.weight**2).sum() + (1 - l2) * self.weight.abs().sum()
        return TracedLoss((self.weight - shift).cos().sum() + penalty)

    def state_dict(self) -> None:
        return None

    def make(self, method: ForwardHypergradient | ReverseHypergradient, count: int) -> None:
        settings = {name: torch.empty((), device=META) for name in SGDRule.domains}
        for number in range(count):
            method.start()
            gradients = method.record(self(), self)
            gradient = torch.empty(3, device=META) if gradients is None else gradients[0]
            state = {"param": self.weight.detach()}
            transition = Transition(0, SGDRule(), state, gradient, settings, {"lr": 0})
            is_traced = True if gradients else None
            method.advance(
                OptimizerStep([transition], [gradient], number=number, is_traced=is_traced)
            )


def test_no_step_of_forward_mode_waits_for_the_device():
    steps = Steps()
    steps.make(method := ForwardHypergradient([steps.weight], steps.hypers), 3)
    assert method.weight_tangents()[0].shape == (5, 3)


@pytest.mark.parametrize("tape", [Recompute, KeepGraph])
def test_no_step_of_reverse_mode_waits_for_the_device(tape, monkeypatch):
    class Reached(Exception):
        """All steps are pulled back, and it is read what they came to."""

    def refuse(self, edits):
        assert len(edits) == 3
        raise Reached

    monkeypatch.setattr(ReverseHypergradient, "_refuse", refuse)
    monkeypatch.setattr(Linearization, "still_holds", lambda *_: True)  # asked once a run
    steps = Steps()
    steps.make(method := ReverseHypergradient([steps.weight], steps.hypers, tape()), 3)
    outer = OuterGradient(torch.empty((), device=META), [torch.empty(3, device=META)], [None] * 3)
    outer.is_finite = True  # asked once an update
    with pytest.raises(Reached):
        method.hypergradient(outer)
