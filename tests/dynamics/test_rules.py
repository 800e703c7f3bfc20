"""Every update rule against its torch optimizer."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_rtho import DifferentiableOptimizer, Hyperparameter, Real
from lightning_rtho.dynamics import read_hypers, read_state, rule_class_for, set_setting
from lightning_rtho.linearization import step_jvp, step_vjp
from tests.dynamics.cases import (
    CASES,
    DEAD,
    START,
    Case,
    gradient,
    rule_of,
    train,
    warm_transition,
)

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_rule_equals_torch_for_50_steps(case: Case) -> None:
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(2, 3, generator=generator), torch.randn(4, generator=generator)]
    optimizer = case.optimizer(*(param.requires_grad_() for param in params))
    rule, rule_class = rule_of(case), rule_class_for(optimizer)
    hyper = read_hypers(rule_class, optimizer.param_groups[0], params[0].device)
    states = [
        {name: t.clone() for name, t in read_state(rule_class, optimizer, param).items()}
        for param in params
    ]
    for step in range(50):
        params[0].grad = torch.randn(2, 3, generator=generator)
        params[0].grad[0, 1] = 0  # an input that is always zero
        params[1].grad = None if step % 3 == 1 else torch.randn(4, generator=generator)
        states = [
            state if param.grad is None else rule(state, param.grad, hyper)
            for state, param in zip(states, params, strict=True)
        ]
        optimizer.step()
        for state, param in zip(states, params, strict=True):
            # 50 steps of rounding, each of a few units in the last place of numbers around 1.
            expected = read_state(rule_class, optimizer, param)
            # torch counts steps in the default dtype, the rule in float32; neither rounds here.
            torch.testing.assert_close(state, expected, rtol=1e-11, atol=1e-13, check_dtype=False)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.SGD, {}),
        (torch.optim.SGD, {"nesterov": True}),
        (torch.optim.RMSprop, {}),
        (torch.optim.RMSprop, {"centered": True}),
    ],
)
def test_velocity_stays_while_a_scheduler_holds_momentum_at_0(
    optimizer_class: type[torch.optim.Optimizer], settings: dict[str, bool]
) -> None:
    param = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = optimizer_class([param], lr=0.1, momentum=0.9, **settings)
    (group,), rule_class = optimizer.param_groups, rule_class_for(optimizer)
    for momentum in (0.9, 0.9, 0.0, 0.0, 0.9):
        # Where an optimizer is made torch refuses Nesterov's form without momentum.
        group["momentum"] = momentum
        param.grad = param.detach().sin()
        state = {k: t.clone() for k, t in read_state(rule_class, optimizer, param).items()}
        hyper = read_hypers(rule_class, group, param.device)
        found = rule_class.from_group(group, ())(state, param.grad.clone(), hyper)
        optimizer.step()
        # Rounding of one step.
        expected = read_state(rule_class, optimizer, param)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15, check_dtype=False)


def test_rectification_has_a_slope_where_its_denominator_is_0() -> None:
    beta2 = Hyperparameter(0.6, Real())  # the limit of rho is 4: it is never rectified
    param = torch.tensor([1.0, -2.0], requires_grad=True)
    optimizer = DifferentiableOptimizer(torch.optim.RAdam([param], lr=0.1, betas=(0.5, beta2)))
    for _ in range(8):
        param.grad = param.detach().sin()
        (transition,) = optimizer.transitions({id(optimizer.hyperparameters[0]): 0})
        state_bar, grad_bar, hyper_bar = step_vjp(transition, {"param": torch.ones(2)})
        assert hyper_bar["beta2"] == 0  # no part in the weights
        assert grad_bar.isfinite().all()
        assert all(bar.isfinite().all() for bar in state_bar.values())
        optimizer.step()


def _derivatives(case: Case, settings: list[str], steps: int) -> Tensor:
    """Derivative of the trained parameter by `settings` and by each entry of START ``[m, 4]``."""
    hypers = [Hyperparameter(case.settings[name], Real()) for name in settings]
    param = START.clone().requires_grad_()
    inner = case.optimizer(param)
    for name, hyper in zip(settings, hypers, strict=True):
        set_setting(inner.param_groups[0], name, hyper)
    optimizer = DifferentiableOptimizer(inner)
    columns = {id(hyper): column for column, hyper in enumerate(hypers)}
    m = len(settings) + START.numel()
    tangent = {"param": torch.eye(m)[:, len(settings) :]}
    for step in range(steps):
        param.grad = gradient(param.detach(), step)
        [transition] = transitions = optimizer.transitions(columns)
        jacobian = torch.func.jacrev(gradient)(param.detach(), step)
        state_dot = {
            name: tangent.get(name, torch.zeros(m, *value.shape))
            for name, value in transition.state.items()
        }
        hyper_dot = {name: torch.eye(m)[column] for name, column in transition.columns.items()}
        tangent = step_jvp(transition, state_dot, tangent["param"] @ jacobian.T, hyper_dot)
        optimizer.carry_derivative_buffers(transitions)
        optimizer.step()
    return tangent["param"]


def _central_difference(function, value: float, scale: float) -> Tensor:
    """Derivative with error of order (0.001 scale)^4."""
    h = 1e-3 * scale
    near = function(value + h) - function(value - h)
    far = function(value + 2 * h) - function(value - 2 * h)
    return (8 * near - far) / (12 * h)


def _settings(case: Case) -> list[str]:
    """The settings whose derivative finite differences can tell, all tuned at once."""
    untold = set()
    if case.settings.get("momentum") == 0:
        # SGD's dampening may not be tuned beside a momentum of 0, and RMSprop ignores a momentum
        # below 0; tests/test_optim.py has both.
        untold.add("dampening" if case.optimizer_class is torch.optim.SGD else "momentum")
    return [name for name in case.settings if name not in untold]


@each_case
@pytest.mark.parametrize("steps", [1, 2, 9], ids=["fresh", "second", "warm"])
def test_derivative_equals_finite_differences_of_torch(case: Case, steps: int) -> None:
    settings = _settings(case)
    derivatives = _derivatives(case, settings, steps)
    # rtol: truncation 1e-12 times the fifth derivative; atol: rounding of numbers around 1 over
    # the smallest h, 1e-5.
    tolerance = {"rtol": 1e-6, "atol": 1e-10}
    for setting, derivative in zip(settings, derivatives, strict=False):
        value = case.settings[setting]
        at = lambda v, setting=setting: train(case, steps, **{setting: v})
        expected = _central_difference(at, value, min(abs(value), abs(1 - value)) or 0.1)
        if setting == "weight_decay" and value == 0:
            # The decay is all that this entry feels, and g / (|g| + eps) is straight only within
            # 1e-7 eps of 0: truncation 1e-7, rounding 1e-16 over h = 1e-9.
            close_to_zero = _central_difference(at, value, 1e-6)[DEAD]
            torch.testing.assert_close(derivative[DEAD], close_to_zero, rtol=1e-6, atol=1e-6)
            expected[DEAD] = derivative[DEAD]
        torch.testing.assert_close(
            derivative, expected, **tolerance, msg=lambda m, s=setting: f"{s}: {m}"
        )
    for entry, derivative in enumerate(derivatives[len(settings) :]):
        direction = torch.eye(4)[entry]
        at = lambda v, direction=direction: train(case, steps, START + v * direction)
        expected = _central_difference(at, 0.0, 1.0)
        torch.testing.assert_close(derivative, expected, **tolerance)


def test_every_setting_changes_the_trained_parameter_of_some_case() -> None:
    # Otherwise zero may have equalled zero above.
    felt: dict[tuple[str, str], bool] = {}
    for case in CASES:
        settings = _settings(case)
        derivatives = _derivatives(case, settings, steps=9)
        for setting, derivative in zip(settings, derivatives, strict=False):
            key = (case.optimizer_class.__name__, setting)
            felt[key] = felt.get(key, False) or bool(derivative.abs().amax() > 1e-6)
    assert [key for key, is_felt in felt.items() if not is_felt] == []


@each_case
@pytest.mark.parametrize("steps", [0, 1, 9])
def test_pull_back_is_the_adjoint_of_push_forward(case: Case, steps: int) -> None:
    transition = warm_transition(case, steps, START)
    state_dot = {name: torch.randn(1, *t.shape) for name, t in transition.state.items()}
    grad_dot = torch.randn(1, *transition.grad.shape)
    hyper_dot = {name: torch.randn(1) for name in transition.columns}
    new_state_dot = step_jvp(transition, state_dot, grad_dot, hyper_dot)
    new_state_bar = {name: torch.randn(t.shape[1:]) for name, t in new_state_dot.items()}
    state_bar, grad_bar, hyper_bar = step_vjp(transition, new_state_bar)
    lhs = sum((new_state_bar[name] * t[0]).sum() for name, t in new_state_dot.items())
    rhs = (
        sum((state_bar[name] * t[0]).sum() for name, t in state_dot.items())
        + (grad_bar * grad_dot[0]).sum()
        + sum(hyper_bar[name] * t[0] for name, t in hyper_dot.items())
    )
    torch.testing.assert_close(lhs, rhs, rtol=1e-10, atol=1e-10)  # same sums, other order


def _at_default_eps(case: Case) -> Case:
    keywords = {name: value for name, value in case.keywords.items() if name != "eps"}
    return replace(case, keywords=keywords)


@each_case
@pytest.mark.parametrize("steps", [0, 1, 10])
def test_derivative_is_finite_where_every_gradient_was_zero(case: Case, steps: int) -> None:
    transition = warm_transition(
        _at_default_eps(case), steps, torch.zeros(3), lambda param, step: torch.zeros(3)
    )
    state_dot = {name: torch.randn(2, *t.shape) for name, t in transition.state.items()}
    hyper_dot = {name: torch.randn(2) for name in transition.columns}
    new_state_dot = step_jvp(transition, state_dot, torch.randn(2, 3), hyper_dot)
    ones = {name: torch.ones(t.shape[1:]) for name, t in new_state_dot.items()}
    state_bar, grad_bar, hyper_bar = step_vjp(transition, ones)
    for tensor in (
        *new_state_dot.values(),
        *state_bar.values(),
        grad_bar,
        *hyper_bar.values(),
    ):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("name", ["Adam", "Adam-amsgrad", "AdamW"])
@pytest.mark.parametrize("steps", [0, 5])
def test_adam_has_slope_one_over_eps_where_every_gradient_was_zero(name: str, steps: int) -> None:
    case = _at_default_eps(next(case for case in CASES if case.name == name))
    transition = warm_transition(case, steps, torch.zeros(3), lambda param, step: torch.zeros(3))
    beta1, eps = 0.8, 1e-8
    mean_dot, grad_dot = torch.randn(1, 3), torch.randn(1, 3)
    state_dot = {name: torch.zeros(1, *t.shape) for name, t in transition.state.items()}
    if steps:
        state_dot["exp_avg"] = mean_dot
    hyper_dot = {name: torch.zeros(1) for name in transition.columns}
    param_dot = step_jvp(transition, state_dot, grad_dot, hyper_dot)["param"]
    moment_dot = (beta1 * mean_dot if steps else 0) + (1 - beta1) * grad_dot
    corrected_dot = moment_dot / (1 - beta1 ** (steps + 1))
    # A handful of roundings.
    torch.testing.assert_close(param_dot, -0.03 * corrected_dot / eps, rtol=1e-12, atol=0)


def test_dead_entry_of_adam_at_default_eps_spoils_nothing() -> None:
    case = _at_default_eps(next(case for case in CASES if case.name == "Adam"))
    derivatives = _derivatives(case, ["lr", "beta1", "beta2"], steps=9)
    assert derivatives.isfinite().all()
    assert (derivatives[:3, DEAD] == 0).all()
    for derivative, setting in zip(derivatives, ("lr", "beta1", "beta2"), strict=False):
        value = case.settings[setting]
        expected = _central_difference(
            lambda v, setting=setting: train(case, 9, **{setting: v}), value, min(value, 1 - value)
        )
        # As above: no other entry comes near the singular point.
        torch.testing.assert_close(derivative, expected, rtol=1e-6, atol=1e-10)


@each_case
@pytest.mark.parametrize("shape", [(), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_state_and_tangent_keep_the_dtype_of_torch(
    case: Case, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(torch.float32)
    transition = warm_transition(
        case, 2, torch.full(shape, 0.5, dtype=dtype), lambda param, step: param + 0.1 * step
    )
    m = 2
    state_dot = {
        name: torch.randn(m, *t.shape, dtype=t.dtype) for name, t in transition.state.items()
    }
    grad_dot = torch.randn(m, *shape, dtype=dtype)
    hyper_dot = {name: torch.randn(m, dtype=torch.float64) for name in transition.columns}
    new_state_dot = step_jvp(transition, state_dot, grad_dot, hyper_dot)
    new_state = transition.rule(transition.state, transition.grad, transition.hyper)
    for state, leading in ((new_state, ()), (new_state_dot, (m,))):
        for name in ("param", *(n for n in state if transition.state[n].shape == shape)):
            assert (state[name].dtype, state[name].shape) == (
                transition.state[name].dtype if shape else dtype,
                (*leading, *shape),
            )


@each_case
def test_scalar_parameter_in_float32_steps_as_torch(case: Case) -> None:
    torch.set_default_dtype(torch.float32)
    param = torch.tensor(0.5, requires_grad=True)
    optimizer = case.optimizer(param)
    rule, rule_class = rule_of(case), rule_class_for(optimizer)
    hyper = read_hypers(rule_class, optimizer.param_groups[0], param.device)
    for step in range(10):
        param.grad = torch.tensor(0.3 + 0.1 * step)
        new_state = rule(read_state(rule_class, optimizer, param), param.grad, hyper)
        optimizer.step()
        # Some roundings to float32, of terms that may cancel.
        torch.testing.assert_close(new_state["param"], param.detach(), rtol=1e-5, atol=1e-6)
