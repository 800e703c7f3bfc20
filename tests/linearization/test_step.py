"""The chain rule through one update; tests/dynamics/test_rules.py holds it for every rule."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from lightning_rtho import Domain, Interval, Positive, UpdateRule
from lightning_rtho.dynamics import SGDRule, Transition
from lightning_rtho.linearization import step_jvp, step_vjp
from tests.dynamics.cases import CASES, START, Case, warm_transition

LR, MOMENTUM = 0.1, 0.8


def _momentum_transition(columns: dict[str, int]) -> Transition:
    """SGD with momentum: v' = mu v + g, w' = w - eta v'."""
    settings = {"lr": LR, "momentum": MOMENTUM, "dampening": 0.0, "weight_decay": 0.0}
    return Transition(
        index=0,
        rule=SGDRule(buffered=True),
        state={"param": torch.tensor([1.0, 2.0]), "momentum_buffer": torch.tensor([3.0, -1.0])},
        grad=torch.tensor([0.5, 0.25]),
        hyper={name: torch.tensor(value) for name, value in settings.items()},
        columns=columns,
    )


@dataclass(frozen=True)
class _SignedRule(UpdateRule):
    """Lion: v' = beta_2 v + (1 - beta_2) g, w' = w - eta sign(beta_1 v + (1 - beta_1) g)."""

    domains: ClassVar[dict[str, Domain]] = {
        "lr": Positive(),
        "beta1": Interval(0, 1),
        "beta2": Interval(0, 1),
    }
    buffers = ("exp_avg",)

    def init(self, param: Tensor, hyper: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"exp_avg": torch.zeros_like(param)}

    def update(
        self, state: dict[str, Tensor], grad: Tensor, hyper: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        average, beta1, beta2 = state["exp_avg"], hyper["beta1"], hyper["beta2"]
        direction = (beta1 * average + (1 - beta1) * grad).sign()
        return {
            "param": state["param"] - hyper["lr"] * direction,
            "exp_avg": beta2 * average + (1 - beta2) * grad,
        }


def test_what_a_sign_hides_has_no_derivative() -> None:
    settings = {"lr": LR, "beta1": 0.9, "beta2": 0.99}
    state = {"param": torch.tensor([1.0, 2.0]), "exp_avg": torch.tensor([3.0, -1.0])}
    grad = torch.tensor([0.5, 0.25])
    hyper = {name: torch.tensor(value) for name, value in settings.items()}
    transition = Transition(0, _SignedRule(), state, grad, hyper, {"beta1": 0, "lr": 1})
    state_dot = {"param": torch.randn(2, 2), "exp_avg": torch.randn(2, 2)}
    hyper_dot = {"beta1": torch.tensor([1.0, 0.0]), "lr": torch.tensor([0.0, 1.0])}
    new_state_dot = step_jvp(transition, state_dot, torch.zeros(2, 2), hyper_dot)
    signs = torch.tensor([1.0, -1.0])
    expected = state_dot["param"] - hyper_dot["lr"][:, None] * signs
    torch.testing.assert_close(new_state_dot["param"], expected, rtol=0, atol=0)
    torch.testing.assert_close(new_state_dot["exp_avg"], 0.99 * state_dot["exp_avg"])


def _zeros(transition: Transition, m: int) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    return (
        {name: torch.zeros(m, *t.shape) for name, t in transition.state.items()},
        torch.zeros(m, *transition.grad.shape),
        {name: torch.zeros(m) for name in transition.columns},
    )


def test_push_forward_equals_the_closed_form_of_momentum() -> None:
    transition = _momentum_transition({"lr": 0, "momentum": 1})
    state_dot = {"param": torch.randn(2, 2), "momentum_buffer": torch.randn(2, 2)}
    grad_dot = torch.randn(2, 2)
    hyper_dot = {"lr": torch.tensor([1.0, 0.0]), "momentum": torch.tensor([0.0, 1.0])}
    new_state_dot = step_jvp(transition, state_dot, grad_dot, hyper_dot)
    buffer = transition.state["momentum_buffer"]
    velocity = MOMENTUM * buffer + transition.grad
    velocity_dot = (
        MOMENTUM * state_dot["momentum_buffer"] + grad_dot + hyper_dot["momentum"][:, None] * buffer
    )
    param_dot = state_dot["param"] - LR * velocity_dot - hyper_dot["lr"][:, None] * velocity
    # The same few products and sums, perhaps in another order.
    tolerance = {"rtol": 1e-14, "atol": 1e-14}
    torch.testing.assert_close(new_state_dot["momentum_buffer"], velocity_dot, **tolerance)
    torch.testing.assert_close(new_state_dot["param"], param_dot, **tolerance)


def test_pull_back_equals_the_closed_form_of_momentum() -> None:
    transition = _momentum_transition({"lr": 0, "momentum": 1})
    param_bar, velocity_bar = torch.randn(2), torch.randn(2)
    state_bar, grad_bar, hyper_bar = step_vjp(
        transition, {"param": param_bar, "momentum_buffer": velocity_bar}
    )
    buffer = transition.state["momentum_buffer"]
    through_velocity = velocity_bar - LR * param_bar
    velocity = MOMENTUM * buffer + transition.grad
    tolerance = {"rtol": 1e-14, "atol": 1e-14}  # as above
    torch.testing.assert_close(state_bar["param"], param_bar, **tolerance)
    torch.testing.assert_close(
        state_bar["momentum_buffer"], MOMENTUM * through_velocity, **tolerance
    )
    torch.testing.assert_close(grad_bar, through_velocity, **tolerance)
    torch.testing.assert_close(hyper_bar["lr"], -(param_bar @ velocity), **tolerance)
    torch.testing.assert_close(hyper_bar["momentum"], through_velocity @ buffer, **tolerance)


each_warm_case = pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.endswith("-weight_decay")], ids=lambda c: c.name
)


@each_warm_case
def test_push_forward_of_many_tangents_is_that_of_each(case: Case) -> None:
    transition = warm_transition(case, 3, START)
    m = 3
    state_dot = {name: torch.randn(m, *t.shape) for name, t in transition.state.items()}
    grad_dot = torch.randn(m, *START.shape)
    hyper_dot = {name: torch.randn(m) for name in transition.columns}
    together = step_jvp(transition, state_dot, grad_dot, hyper_dot)
    for k in range(m):
        alone = step_jvp(
            transition,
            {name: t[k : k + 1] for name, t in state_dot.items()},
            grad_dot[k : k + 1],
            {name: t[k : k + 1] for name, t in hyper_dot.items()},
        )
        for name, tangent in alone.items():
            # Vectorized kernels may round differently.
            torch.testing.assert_close(together[name][k], tangent[0], rtol=1e-12, atol=1e-14)


def test_setting_that_is_not_tuned_has_no_derivative() -> None:
    transition = _momentum_transition({"lr": 0})
    _, _, hyper_bar = step_vjp(transition, {"param": torch.ones(2)})
    assert set(hyper_bar) == {"lr"}


def test_missing_cotangents_are_zero() -> None:
    transition = _momentum_transition({"lr": 0, "momentum": 1})
    param_bar = torch.randn(2)
    short = step_vjp(transition, {"param": param_bar})
    full = step_vjp(transition, {"param": param_bar, "momentum_buffer": torch.zeros(2)})
    torch.testing.assert_close(short, full, rtol=0, atol=0)


@pytest.mark.parametrize("new_state_bar", [{}, {"another_buffer": torch.ones(2)}], ids=str)
def test_no_known_cotangent_pulls_back_to_zeros(new_state_bar: dict[str, Tensor]) -> None:
    transition = _momentum_transition({"lr": 0, "momentum": 1})
    state_bar, grad_bar, hyper_bar = step_vjp(transition, new_state_bar)
    assert {name: t.shape for name, t in state_bar.items()} == {
        "param": (2,),
        "momentum_buffer": (2,),
    }
    for tensor in (*state_bar.values(), grad_bar, *hyper_bar.values()):
        assert not tensor.any()


def test_zero_tangents_are_pushed_to_zeros() -> None:
    transition = _momentum_transition({"lr": 0})
    for tensor in step_jvp(transition, *_zeros(transition, m=2)).values():
        assert tensor.shape == (2, 2)
        assert not tensor.any()


@each_warm_case
def test_neither_direction_needs_grad_mode_nor_changes_its_arguments(case: Case) -> None:
    transition = warm_transition(case, 2, START)
    before = [t.clone() for t in (*transition.state.values(), transition.grad)]
    with torch.no_grad():
        new_state_dot = step_jvp(transition, *_zeros(transition, m=1))
        ones = {name: torch.ones(t.shape[1:]) for name, t in new_state_dot.items()}
        cotangents = step_vjp(transition, ones)
    after = [*transition.state.values(), transition.grad]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))
    state_bar, grad_bar, hyper_bar = cotangents
    for tensor in (*after, *state_bar.values(), grad_bar, *hyper_bar.values()):
        assert not tensor.requires_grad


def test_derivative_is_taken_at_the_settings_of_the_transition() -> None:
    transition = _momentum_transition({"momentum": 0})
    doubled = replace(transition, hyper={**transition.hyper, "lr": torch.tensor(2 * LR)})
    bar = {"param": torch.ones(2)}
    once, twice = (step_vjp(t, bar)[2]["momentum"] for t in (transition, doubled))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-15, atol=0)  # a power of two is exact
