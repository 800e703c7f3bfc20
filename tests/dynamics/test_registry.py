"""Which optimizers have a rule, and how their groups and states are read."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from lightning_rtho import DifferentiableOptimizer, Hyperparameter, Positive, UpdateRule
from lightning_rtho.dynamics import (
    AdamRule,
    SGDRule,
    get_setting,
    read_hypers,
    read_state,
    register_rule,
    rule_class_for,
    set_setting,
)
from lightning_rtho.dynamics._from_torch import _RULES
from tests.dynamics.cases import CASES

KNOWN = {
    "ASGD",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "RMSprop",
    "SGD",
}


class SignDescent(torch.optim.Optimizer):
    """An optimizer that torch does not know."""

    def __init__(self, params: list[torch.Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param -= group["lr"] * param.grad.sign()


@dataclass(frozen=True)
class SignDescentRule(UpdateRule):
    """Its rule."""

    domains = {"lr": Positive()}

    def update(self, state, grad, hyper):
        return {"param": state["param"] - hyper["lr"] * grad.sign()}


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A copy of the table of rules, which the test may add to."""
    rules = dict(_RULES)
    monkeypatch.setattr("lightning_rtho.dynamics._from_torch._RULES", rules)
    return rules


def _weight() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def test_case_table_covers_every_torch_optimizer_with_a_rule() -> None:
    torch_optimizers = {cls for cls in _RULES if cls.__module__.startswith("torch.")}
    assert {cls.__name__ for cls in torch_optimizers} == KNOWN
    assert torch_optimizers == {case.optimizer_class for case in CASES}


@pytest.mark.parametrize("optimizer_class", [torch.optim.LBFGS, torch.optim.Rprop, SignDescent])
def test_unknown_optimizer_is_refused_with_a_list_of_the_known(optimizer_class: type) -> None:
    optimizer = optimizer_class([_weight()], lr=0.1)
    with pytest.raises(TypeError) as refusal:
        rule_class_for(optimizer)
    message = str(refusal.value)
    assert f"`{optimizer_class.__name__}`" in message
    assert all(f"{name}" in message for name in KNOWN)
    assert "register_rule" in message
    with pytest.raises(TypeError, match="No differentiable rule"):
        DifferentiableOptimizer(optimizer)


def test_subclass_that_updates_otherwise_is_refused() -> None:
    class OtherAdam(torch.optim.Adam):
        def step(self, closure=None):
            for group in self.param_groups:
                group["eps"] = 1e-3
            return super().step(closure)

    with pytest.raises(TypeError, match="No differentiable rule for `OtherAdam`"):
        rule_class_for(OtherAdam([_weight()]))


def test_registered_rule_serves_an_optimizer_of_ones_own(registry: dict) -> None:
    register_rule(SignDescent, SignDescentRule)
    lr, weight = Hyperparameter(0.1, Positive()), _weight()
    optimizer = DifferentiableOptimizer(SignDescent([weight], lr=lr))
    weight.grad = torch.tensor([3.0, -2.0])
    [transition] = optimizer.transitions({id(lr): 0})
    new_state = transition.rule(transition.state, transition.grad, transition.hyper)
    optimizer.step()
    assert transition.columns == {"lr": 0}
    assert new_state["param"].equal(weight)
    assert weight.tolist() == [0.9, 1.1]


class CountingDescent(torch.optim.Optimizer):
    """w' = w - eta g / (t + 1), with a count t that is a number, as in many an own optimizer."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        with torch.no_grad():
            for group in self.param_groups:
                for param in group["params"]:
                    state = self.state[param]
                    state["step"] = state.get("step", 0) + 1
                    param -= group["lr"] / state["step"] * param.grad


@dataclass(frozen=True)
class CountingDescentRule(UpdateRule):
    domains = {"lr": Positive()}
    buffers = ("step",)

    def init(self, param, hyper):
        return {"step": torch.zeros(())}

    def update(self, state, grad, hyper):
        step = state["step"] + 1
        return {"param": state["param"] - hyper["lr"] / step * grad, "step": step}


def test_count_of_an_own_optimizer_may_be_a_number(registry: dict) -> None:
    register_rule(CountingDescent, CountingDescentRule)
    lr, weights = Hyperparameter(0.1, Positive()), [_weight(), _weight()]
    optimizer = DifferentiableOptimizer(CountingDescent(weights, lr=lr))
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.tensor([3.0, -2.0])
        transitions = optimizer.transitions({id(lr): 0})
        assert len({transition.cohort for transition in transitions}) == 1
        new = [t.rule(t.state, t.grad, t.hyper)["param"] for t in transitions]
        optimizer.step()
        torch.testing.assert_close(new, [weight.detach() for weight in weights])


def test_subclass_that_is_only_made_otherwise_has_the_rule_of_its_base() -> None:
    class SlowSGD(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1e-4)

    class SlowerSGD(SlowSGD):
        """Whose `step` torch wraps before that of its base."""

    assert rule_class_for(SlowerSGD([_weight()])) is SGDRule
    assert rule_class_for(SlowSGD([_weight()])) is SGDRule


def test_registered_subclass_is_known(registry: dict) -> None:
    class LoggedSGD(torch.optim.SGD):
        def step(self, closure=None):
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    class LoggedTwiceSGD(LoggedSGD):
        def step(self, closure=None):
            return super().step(closure)

    register_rule(LoggedSGD, SGDRule)
    assert rule_class_for(LoggedSGD([_weight()])) is SGDRule
    with pytest.raises(TypeError, match="LoggedTwiceSGD"):
        rule_class_for(LoggedTwiceSGD([_weight()]))


@pytest.mark.parametrize(
    ("optimizer_class", "rule_class", "argument"),
    [
        (torch.optim.SGD([torch.zeros(1)]), SGDRule, "optimizer_class"),
        (torch.nn.Linear, SGDRule, "optimizer_class"),
        ("SGD", SGDRule, "optimizer_class"),
        (SignDescent, SGDRule(), "rule_class"),
        (SignDescent, torch.optim.SGD, "rule_class"),
        (SignDescent, lambda state, grad, hyper: state, "rule_class"),
    ],
)
def test_registration_refuses_what_is_no_such_class(
    registry: dict, optimizer_class: object, rule_class: object, argument: str
) -> None:
    before = dict(registry)
    with pytest.raises(TypeError, match=f"`{argument}` must be a subclass of .* got "):
        register_rule(optimizer_class, rule_class)
    assert registry == before


def test_betas_are_read_and_written_one_by_one() -> None:
    group = torch.optim.Adam([_weight()], betas=(0.8, 0.95)).param_groups[0]
    set_setting(group, "beta2", 0.5)
    assert group["betas"] == (0.8, 0.5)
    set_setting(group, "beta1", 0.1)
    set_setting(group, "lr", 7.0)
    assert [get_setting(group, name) for name in ("beta1", "beta2", "lr")] == [0.1, 0.5, 7.0]
    assert "beta1" not in group


def test_reading_a_setting_that_the_group_lacks_is_an_error() -> None:
    group = torch.optim.SGD([_weight()]).param_groups[0]
    for name in ("beta1", "eps"):
        with pytest.raises(KeyError, match=name):
            get_setting(group, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_read_exactly_whatever_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    group = torch.optim.Adam([_weight()], lr=0.1, betas=(0.9, 0.999)).param_groups[0]
    hyper = read_hypers(AdamRule, group, torch.device("cpu"))
    values = {name: value.item() for name, value in hyper.items()}
    assert values == {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0,
    }
    assert all(value.shape == () for value in hyper.values())


def test_tensor_setting_is_read_in_its_own_dtype_as_a_scalar() -> None:
    lr = torch.tensor([0.1], dtype=torch.float32, requires_grad=True)
    group = torch.optim.Adam([_weight()], lr=lr, foreach=False).param_groups[0]
    read = read_hypers(AdamRule, group, torch.device("cpu"))["lr"]
    assert (read.dtype, read.shape, read.requires_grad) == (torch.float32, (), False)


def test_state_is_read_without_a_copy_and_without_what_the_rule_does_not_know() -> None:
    weight = _weight()
    optimizer = torch.optim.ASGD([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    state = read_state(rule_class_for(optimizer), optimizer, weight)
    assert set(state) == {"param", "step", "eta"}
    assert state["param"].data_ptr() == weight.data_ptr()
    assert not state["param"].requires_grad


def test_state_of_a_fresh_optimizer_is_the_parameter_alone() -> None:
    weight = _weight()
    assert set(read_state(AdamRule, torch.optim.Adam([weight]), weight)) == {"param"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule_reads_every_discrete_option_of_its_group(case) -> None:
    optimizer = case.optimizer(_weight())
    group = optimizer.param_groups[0]
    rule = rule_class_for(optimizer).from_group(group, ())
    for option in ("maximize", "nesterov", "amsgrad", "centered", "decoupled_weight_decay"):
        if option in group:
            assert getattr(rule, option) == group[option]


def test_rule_of_your_own_reads_options_as_they_are() -> None:
    @dataclass(frozen=True)
    class ScaledRule(UpdateRule):
        domains = {"lr": Positive()}
        scale: float = 1.0

        def update(self, state, grad, hyper):
            return {"param": state["param"] - self.scale * hyper["lr"] * grad}

    assert ScaledRule.from_group({"lr": 0.1, "scale": 0.5}, ()).scale == 0.5
