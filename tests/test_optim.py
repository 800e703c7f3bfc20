"""The wrapped optimizer: it trains as the user's own, and tells what it is about to do."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lightning_rtho import DifferentiableOptimizer, Hyperparameter, Interval, NonNegative, Positive
from lightning_rtho.dynamics import read_state
from lightning_rtho.linearization import step_jvp
from lightning_rtho.optim import adopt_settings
from tests.dynamics.cases import CASES, START, Case, gradient, train

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _weights() -> list[Tensor]:
    return [START.clone().requires_grad_(), torch.ones(2, 2, requires_grad=True)]


def _set_gradients(weights: list[Tensor], step: int) -> None:
    weights[0].grad = gradient(weights[0].detach(), step)
    weights[1].grad = None if step % 3 == 1 else weights[1].detach().sin() + step


def _lr(value: float = 0.1) -> Hyperparameter:
    return Hyperparameter(value, Positive())


def _adam(**keywords: Any) -> tuple[DifferentiableOptimizer, list[Tensor]]:
    weights = _weights()
    return DifferentiableOptimizer(torch.optim.Adam(weights, **{"lr": _lr(), **keywords})), weights


# Delegation


@each_case
def test_steps_are_bitwise_those_of_the_inner_optimizer(case: Case) -> None:
    plain, wrapped = _weights(), _weights()
    plain_optimizer = case.optimizer(*plain)
    lr = _lr(case.keywords["lr"])
    inner = case.optimizer_class(wrapped, **{**case.keywords, "lr": lr})
    optimizer = DifferentiableOptimizer(inner)
    for step in range(10):
        _set_gradients(plain, step)
        plain_optimizer.step()
        _set_gradients(wrapped, step)
        optimizer.carry_derivative_buffers(optimizer.transitions({id(lr): 0}))
        optimizer.step()
    assert all(a.equal(b) for a, b in zip(plain, wrapped, strict=True))
    states = (plain_optimizer.state_dict()["state"], optimizer.state_dict()["state"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_wrapper_is_an_instance_of_the_inner_class() -> None:
    optimizer, _ = _adam()
    assert isinstance(optimizer, torch.optim.Adam)
    assert isinstance(optimizer, DifferentiableOptimizer)
    assert not isinstance(optimizer, torch.optim.SGD)
    assert repr(optimizer).startswith("DifferentiableAdam (")


def test_groups_state_defaults_and_state_dict_are_the_inner_ones() -> None:
    optimizer, weights = _adam()
    _set_gradients(weights, 0)
    optimizer.step()
    inner = optimizer.optimizer
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    torch.testing.assert_close(optimizer.state_dict(), inner.state_dict(), rtol=0, atol=0)


def test_checkpoint_passes_between_wrapped_and_plain_optimizers() -> None:
    optimizer, weights = _adam()
    _set_gradients(weights, 0)
    optimizer.step()
    plain = torch.optim.Adam(_weights(), lr=7.0)
    plain.load_state_dict(optimizer.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1
    other, _ = _adam()
    other.load_state_dict(plain.state_dict())
    torch.testing.assert_close(other.state_dict(), optimizer.state_dict(), rtol=0, atol=0)


def test_groups_hold_numbers_while_the_wrapper_holds_the_hyperparameters() -> None:
    lr, beta2 = _lr(), Hyperparameter(0.9, Interval(0, 1))
    optimizer, _ = _adam(lr=lr, betas=(0.8, 0.9))
    assert optimizer.hyperparameters == [lr]
    weights = _weights()
    beta1 = Hyperparameter(0.5, Interval(0, 1))
    optimizer = DifferentiableOptimizer(torch.optim.Adam(weights, lr=lr, betas=(beta1, beta2)))
    group = optimizer.param_groups[0]
    assert [type(value) for value in (group["lr"], *group["betas"])] == [float] * 3
    assert (group["lr"], group["betas"]) == (0.1, (0.5, 0.9))
    assert optimizer.tuned_settings == {"lr", "beta1", "beta2"}
    assert [id(h) for h in optimizer.hyperparameters] == [id(lr), id(beta1), id(beta2)]


def test_assigned_values_reach_every_place_where_they_act() -> None:
    shared, first, second = _lr(), *_weights()
    own = _lr(0.3)
    inner = torch.optim.RMSprop(
        [{"params": [first], "eps": own}, {"params": [second]}], lr=shared, eps=1e-4
    )
    optimizer = DifferentiableOptimizer(inner)
    assert {id(h) for h in optimizer.hyperparameters} == {id(shared), id(own)}
    assert len(optimizer.hyperparameters) == 2
    shared.assign(torch.tensor(0.25))
    own.assign(torch.tensor(0.5))
    optimizer.write_hyperparameters()
    assert [(g["lr"], g["eps"]) for g in inner.param_groups] == [(0.25, 0.5), (0.25, 1e-4)]


def test_everything_else_is_found_on_the_inner_optimizer() -> None:
    optimizer, weights = _adam()
    optimizer.optimizer.note = "mine"
    assert optimizer.note == "mine"
    with pytest.raises(AttributeError):
        _ = optimizer.nothing_of_that_name
    _set_gradients(weights, 0)
    optimizer.zero_grad()
    assert weights[0].grad is None
    added = torch.zeros(1, requires_grad=True)
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["lr"] == 0.5
    assert optimizer.params[-1] is added


# The moment before the update


@pytest.mark.parametrize("with_closure", [False, True])
def test_before_update_runs_between_gradient_and_update(with_closure: bool) -> None:
    optimizer, weights = _adam()
    seen = []

    def before_update() -> None:
        assert not torch.is_grad_enabled()
        seen.append((weights[0].detach().clone(), weights[0].grad.clone()))

    def closure() -> float:
        assert torch.is_grad_enabled()
        _set_gradients(weights, 0)
        return 7.0

    optimizer.before_update = before_update
    if with_closure:
        assert optimizer.step(closure) == 7.0
    else:
        _set_gradients(weights, 0)
        assert optimizer.step() is None
    [(weight, grad)] = seen
    assert weight.equal(START)
    assert grad.equal(gradient(START, 0))
    assert not weights[0].equal(START)


@pytest.mark.parametrize("with_closure", [False, True])
def test_step_hooks_of_torch_run_exactly_once_a_step(with_closure: bool) -> None:
    optimizer, weights = _adam()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    on_all = [
        register_optimizer_step_pre_hook(lambda *_: calls.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: calls.append("all post")),
    ]
    optimizer.before_update = lambda: calls.append("before")
    _set_gradients(weights, 0)
    try:
        for _ in range(2):
            optimizer.step((lambda: None) if with_closure else None)
    finally:
        for handle in on_all:
            handle.remove()
    assert sorted(calls) == sorted(2 * ["pre", "post", "all pre", "all post", "before"])
    for first in (calls[:5], calls[5:]):
        assert first.index("before") < first.index("post")


# Transitions


@each_case
def test_transition_tells_the_update_that_follows(case: Case) -> None:
    weights = _weights()
    lr = _lr(case.keywords["lr"])
    optimizer = DifferentiableOptimizer(
        case.optimizer_class(weights, **{**case.keywords, "lr": lr})
    )
    for step in range(5):
        _set_gradients(weights, step)
        transitions = optimizer.transitions({id(lr): 3})
        assert [t.index for t in transitions] == ([0] if step % 3 == 1 else [0, 1])
        told = [t.rule(t.state, t.grad, t.hyper)["param"] for t in transitions]
        assert all(t.columns == {"lr": 3} for t in transitions)
        optimizer.step()
        for transition, param in zip(transitions, told, strict=True):
            # One step's roundings.
            torch.testing.assert_close(
                param, weights[transition.index].detach(), rtol=1e-13, atol=1e-13
            )


def test_transitions_name_only_the_hyperparameters_that_are_asked_for() -> None:
    first, second = _weights()
    shared, own = Hyperparameter(0.1, NonNegative()), _lr()
    inner = torch.optim.SGD(
        [{"params": [first], "lr": own}, {"params": [second]}], weight_decay=shared
    )
    optimizer = DifferentiableOptimizer(inner)
    _set_gradients([first, second], 0)
    columns = [t.columns for t in optimizer.transitions({id(shared): 0, id(own): 1})]
    assert columns == [{"weight_decay": 0, "lr": 1}, {"weight_decay": 0}]
    assert [t.columns for t in optimizer.transitions({id(own): 0})] == [{"lr": 0}, {}]
    assert [t.columns for t in optimizer.transitions({})] == [{}, {}]


@each_case
def test_state_size_is_foretold_before_the_first_step(case: Case) -> None:
    weights = _weights()
    optimizer = DifferentiableOptimizer(case.optimizer(*weights))
    foretold = optimizer.state_size()
    _set_gradients(weights, 0)
    optimizer.step()
    states = [read_state(optimizer.rule_class, optimizer.optimizer, w).values() for w in weights]
    kept = [value for state in states for value in state]
    # Counts of steps are float32 or float64.
    slack = 8 * sum(value.dim() == 0 for value in kept)
    assert abs(foretold - sum(value.nbytes for value in kept)) <= slack


# Refusals


def test_hyperparameter_among_the_weights_is_refused() -> None:
    weight, lr = torch.ones(1, requires_grad=True), _lr()
    with pytest.raises(ValueError, match=r"`params` must hold weights, got Hyperparameter\(0.1"):
        DifferentiableOptimizer(torch.optim.SGD([weight, lr.requires_grad_()], lr=0.1))


def test_hyperparameter_with_a_shape_is_refused_as_a_setting() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    optimizer.param_groups[0]["lr"] = Hyperparameter([0.1, 0.2], Positive())
    with pytest.raises(ValueError, match=r"`lr` of group 0 must be a scalar, .* shape \(2,\)"):
        DifferentiableOptimizer(optimizer)


@pytest.mark.parametrize(
    ("optimizer_class", "key"),
    [(torch.optim.SGD, "nesterov"), (torch.optim.Adam, "amsgrad"), (torch.optim.SGD, "my_note")],
)
def test_hyperparameter_where_the_rule_has_no_setting_is_refused(
    optimizer_class: type, key: str
) -> None:
    optimizer = optimizer_class([torch.ones(1)], lr=0.1)
    optimizer.param_groups[0][key] = _lr()
    with pytest.raises(ValueError, match=f"`{key}` of {optimizer_class.__name__} cannot be"):
        DifferentiableOptimizer(optimizer)


# Copies


@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copy_steps_as_the_original_and_alone(copied_by) -> None:
    optimizer, weights = _adam()
    _set_gradients(weights, 0)
    optimizer.step()
    before = [weight.detach().clone() for weight in weights]
    copied = copied_by(optimizer)
    assert isinstance(copied, torch.optim.Adam)
    _set_gradients(copied.params, 1)
    copied.step()
    assert all(a.equal(b) for a, b in zip(weights, before, strict=True))
    _set_gradients(weights, 1)
    optimizer.step()
    assert all(a.equal(b) for a, b in zip(weights, copied.params, strict=True))


@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_copy_holds_copies_of_the_hyperparameters(copied_by) -> None:
    optimizer, _ = _adam()
    copied = copied_by(optimizer)
    [lr], [copied_lr] = optimizer.hyperparameters, copied.hyperparameters
    assert copied_lr is not lr
    copied_lr.assign(torch.tensor(0.5))
    copied.write_hyperparameters()
    assert (copied.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.5, 0.1)


@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["copy", "pickle"]
)
def test_hooks_registered_on_a_copy_run(copied_by) -> None:
    optimizer, _ = _adam()
    copied, calls = copied_by(optimizer), []
    copied.register_step_post_hook(lambda *_: calls.append("post"))
    _set_gradients(copied.params, 0)
    copied.step()
    assert calls == ["post"]


def test_copy_keeps_the_velocity_that_only_the_derivative_has() -> None:
    weight, momentum = START.clone().requires_grad_(), Hyperparameter(0.0, Interval(0, 1))
    optimizer = DifferentiableOptimizer(torch.optim.SGD([weight], lr=0.1, momentum=momentum))
    weight.grad = gradient(START, 0)
    optimizer.carry_derivative_buffers(optimizer.transitions({id(momentum): 0}))
    optimizer.step()
    copied = copy.deepcopy(optimizer)
    copied.params[0].grad = gradient(START, 1)
    [transition] = copied.transitions({id(copied.hyperparameters[0]): 0})
    assert transition.state["momentum_buffer"].equal(gradient(START, 0))


def test_copy_takes_its_schedule_along() -> None:
    weight, lr = START.clone().requires_grad_(), _lr(0.4)
    inner = torch.optim.SGD([weight], lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(inner, 1, gamma=0.5)
    optimizer = DifferentiableOptimizer(inner, [scheduler])
    optimizer.step()
    scheduler.step()
    copied = copy.deepcopy(optimizer)
    copied.hyperparameters[0].assign(torch.tensor(0.8))
    copied.write_hyperparameters()
    # Powers of two: exact.
    assert (copied.param_groups[0]["lr"], optimizer.param_groups[0]["lr"]) == (0.4, 0.2)


# Schedulers


def test_schedulers_built_on_the_inner_optimizer_set_its_rate() -> None:
    plain, wrapped = _weights(), _weights()
    inners = [torch.optim.SGD(weights, lr=0.1, momentum=0.9) for weights in (plain, wrapped)]
    schedulers = [torch.optim.lr_scheduler.StepLR(inner, 2, gamma=0.5) for inner in inners]
    optimizers = [inners[0], DifferentiableOptimizer(inners[1])]
    rates = []
    for step in range(6):
        for weights, optimizer, scheduler in zip(
            (plain, wrapped), optimizers, schedulers, strict=True
        ):
            _set_gradients(weights, step)
            if optimizer is not inners[0]:
                rates.append(optimizer.transitions({})[0].hyper["lr"].item())
            optimizer.step()
            scheduler.step()
    assert rates == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]
    assert all(a.equal(b) for a, b in zip(plain, wrapped, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_rate_that_may_reach_0_is_refused_under_a_scheduler(value: float) -> None:
    inner = torch.optim.SGD(_weights(), lr=Hyperparameter(value, NonNegative()))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.9)
    with pytest.raises(ValueError, match=r"`lr` cannot be tuned from 0, or to it, .* `Positive"):
        DifferentiableOptimizer(inner, [scheduler])


# Momentum tuned from 0

FROM_ZERO = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD-weight_decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.03, "alpha": 0.8, "eps": 1e-2}),
    "RMSprop-centered": (
        torch.optim.RMSprop,
        {"lr": 0.03, "alpha": 0.8, "eps": 1e-2, "centered": True},
    ),
}
from_zero = pytest.mark.parametrize("name", FROM_ZERO)


def _tuned_from_zero(name: str) -> tuple[DifferentiableOptimizer, Tensor, Hyperparameter]:
    optimizer_class, keywords = FROM_ZERO[name]
    weight, momentum = START.clone().requires_grad_(), Hyperparameter(0.0, Interval(0, 1))
    inner = optimizer_class([weight], momentum=momentum, **keywords)
    return DifferentiableOptimizer(inner), weight, momentum


@from_zero
def test_derivative_by_momentum_at_zero_equals_finite_differences_of_torch(name: str) -> None:
    steps = 6
    optimizer, weight, momentum = _tuned_from_zero(name)
    tangent: dict[str, Tensor] = {}
    for step in range(steps):
        weight.grad = gradient(weight.detach(), step)
        [transition] = transitions = optimizer.transitions({id(momentum): 0})
        state_dot = {
            key: tangent.get(key, torch.zeros(1, *value.shape))
            for key, value in transition.state.items()
        }
        grad_dot = state_dot["param"] @ torch.func.jacrev(gradient)(weight.detach(), step).T
        tangent = step_jvp(transition, state_dot, grad_dot, {"momentum": torch.ones(1)})
        optimizer.carry_derivative_buffers(transitions)
        optimizer.step()
    assert "momentum_buffer" not in {k for k, v in optimizer.state[weight].items() if v is not None}
    optimizer_class, keywords = FROM_ZERO[name]
    case = Case(name, optimizer_class, keywords)
    at = lambda value: train(case, steps, momentum=value)
    h = 1e-4
    # From above alone, since torch ignores a momentum below 0: truncation h^3 times the fourth
    # derivative, rounding 1e-16 / h.
    expected = (-11 * at(0.0) + 18 * at(h) - 9 * at(2 * h) + 2 * at(3 * h)) / (6 * h)
    torch.testing.assert_close(tangent["param"][0], expected, rtol=1e-7, atol=1e-9)
    assert expected.abs().max() > 0.01


@from_zero
def test_run_goes_on_with_the_velocity_when_momentum_leaves_zero(name: str) -> None:
    def step_once(
        optimizer: DifferentiableOptimizer, weight: Tensor, momentum: Hyperparameter, step: int
    ) -> Tensor | None:
        weight.grad = gradient(weight.detach(), step)
        transitions = optimizer.transitions({id(momentum): 0})
        optimizer.carry_derivative_buffers(transitions)
        told = transitions[0].rule(transitions[0].state, transitions[0].grad, transitions[0].hyper)[
            "momentum_buffer"
        ]
        optimizer.step()
        return told

    optimizer, weight, momentum = _tuned_from_zero(name)
    for step in range(3):
        velocity = step_once(optimizer, weight, momentum, step)
    before, square = weight.detach().clone(), optimizer.state[weight].get("square_avg")
    square = None if square is None else square.clone()
    momentum.assign(torch.tensor(0.7))
    optimizer.write_hyperparameters()
    step_once(optimizer, weight, momentum, 3)
    # The step by hand: v' = 0.7 v + d, d the direction of the same optimizer without momentum.
    lr = optimizer.param_groups[0]["lr"]
    plain, _, _ = _tuned_from_zero(name)
    plain_weight = plain.params[0]
    for step in range(4):
        plain_weight.grad = gradient(plain_weight.detach(), step)
        held = plain_weight.detach().clone()
        plain.step()
    assert held.equal(before)
    direction = (held - plain_weight.detach()) / lr
    expected = before - lr * (0.7 * velocity + direction)
    # A difference of numbers around 1, over lr and times lr.
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-13, atol=1e-13)
    # torch keeps the velocity from here on, and the derivative reads torch's.
    weight.grad = gradient(weight.detach(), 4)
    [transition] = optimizer.transitions({id(momentum): 0})
    assert transition.state["momentum_buffer"].equal(optimizer.state[weight]["momentum_buffer"])


@from_zero
def test_observing_momentum_at_zero_leaves_the_state_of_torch_alone(name: str) -> None:
    optimizer, weight, momentum = _tuned_from_zero(name)
    optimizer_class, keywords = FROM_ZERO[name]
    plain_weight = START.clone().requires_grad_()
    plain = optimizer_class([plain_weight], **keywords)
    for step in range(4):
        weight.grad = gradient(weight.detach(), step)
        optimizer.carry_derivative_buffers(optimizer.transitions({id(momentum): 0}))
        optimizer.step()
        plain_weight.grad = gradient(plain_weight.detach(), step)
        plain.step()
    assert weight.equal(plain_weight)
    states = (optimizer.state_dict()["state"], plain.state_dict()["state"])
    torch.testing.assert_close(*states, rtol=0, atol=0)


@pytest.mark.parametrize("dampening", [0.3, Hyperparameter(0.0, Interval(0, 1))], ids=repr)
def test_momentum_tuned_from_zero_beside_dampening_is_refused(dampening: Any) -> None:
    weight, momentum = START.clone().requires_grad_(), Hyperparameter(0.0, Interval(0, 1))
    inner = torch.optim.SGD([weight], lr=0.1, momentum=momentum, dampening=dampening)
    optimizer = DifferentiableOptimizer(inner)
    weight.grad = gradient(START, 0)
    columns = {id(hyper): column for column, hyper in enumerate(optimizer.hyperparameters)}
    with pytest.raises(ValueError, match="`momentum` cannot be tuned from 0 with dampening"):
        optimizer.transitions(columns)


def test_dampening_has_no_derivative_without_momentum() -> None:
    weight, dampening = START.clone().requires_grad_(), Hyperparameter(0.0, Interval(0, 1))
    optimizer = DifferentiableOptimizer(torch.optim.SGD([weight], lr=0.1, dampening=dampening))
    weight.grad = gradient(START, 0)
    [transition] = optimizer.transitions({id(dampening): 0})
    state_dot, grad_dot = {"param": torch.zeros(1, 4)}, torch.zeros(1, 4)
    pushed = step_jvp(transition, state_dot, grad_dot, {"dampening": torch.ones(1)})
    assert not pushed["param"].any()


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("scheduled", [False, True])
def test_settings_of_a_checkpoint_are_adopted_once_where_optimizers_share_them(scheduled, shape):
    def make(value: float) -> tuple[Any, list[Any], list[Any]]:
        lr = Hyperparameter(torch.full(shape, value), Positive())
        inner = [optim.SGD([torch.zeros(2, requires_grad=True)], lr=lr) for _ in range(2)]
        schedulers = [optim.lr_scheduler.StepLR(o, 10) for o in inner] if scheduled else []
        pairs = zip(inner, [[s] for s in schedulers] or [[], []], strict=True)
        return lr, [DifferentiableOptimizer(*pair) for pair in pairs], schedulers

    _, saved, saved_schedulers = make(0.1)
    lr, optimizers, schedulers = make(0.05)
    for new, old in zip([*optimizers, *schedulers], [*saved, *saved_schedulers], strict=True):
        new.load_state_dict(old.state_dict())
    adopt_settings(optimizers)
    for optimizer in optimizers:
        optimizer.write_hyperparameters()
    assert [o.param_groups[0]["lr"] for o in optimizers] == pytest.approx([0.1, 0.1])
    bases = [base for scheduler in schedulers for base in scheduler.base_lrs]
    assert bases == pytest.approx([0.1] * len(schedulers))
    assert lr.item() == pytest.approx(0.1)


def test_settings_that_two_optimizers_do_not_agree_on_are_not_adopted():
    lr = Hyperparameter(0.05, Positive())
    optimizers = [
        DifferentiableOptimizer(optim.SGD([torch.zeros(2, requires_grad=True)], lr=lr))
        for _ in range(2)
    ]
    optimizers[0].param_groups[0]["lr"] = 0.1
    adopt_settings(optimizers)
    assert lr.item() == 0.05
