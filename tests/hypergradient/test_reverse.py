"""What is peculiar to reverse mode: windows."""

from functools import partial

import pytest
import torch

from tests.helpers import (
    CASES,
    METHODS,
    PROBLEMS,
    Run,
    derivative,
    hyperparameters,
    leaves,
    torch_states,
    unroll,
)

PROBLEM = PROBLEMS["network"]
TAPES = [name for name in METHODS if name != "forward"]


def _run(case, tape):
    hypers = hyperparameters(case.settings | PROBLEM.loss_hypers)
    params = [w.requires_grad_() for w in PROBLEM.start]
    optimizer = case.optimizer(params, {name: hypers[name] for name in case.settings})
    run = Run(optimizer, hypers, METHODS[tape])
    lambdas = {name: hypers[name] for name in PROBLEM.loss_hypers}
    return run, hypers, params, lambda step: partial(PROBLEM.inner, params, lambdas, step)


def _reference(case, values, steps, start, states):
    """Hypergradient of an unrolled window that begins at a constant state."""
    lambdas = leaves(values)
    in_loss = {name: lambdas[name] for name in PROBLEM.loss_hypers}
    update = case.textbook({name: lambdas[name] for name in case.settings})
    losses = [[partial(PROBLEM.inner, lambdas=in_loss, step=step)] for step in steps]
    weights = unroll(start, [update] * len(start), losses, states)
    return derivative(PROBLEM.outer(weights), lambdas)


@pytest.mark.parametrize("tape", TAPES)
@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "asgd", "nadam"])
def test_each_window_starts_from_a_constant_state(name, tape):
    case = CASES[name]
    run, hypers, params, loss = _run(case, tape)
    for window in range(3):
        start = [p.detach().clone().requires_grad_() for p in params]
        states = torch_states(run.optimizer, params) if window else None
        steps = range(3 * window, 3 * window + 3)
        for step in steps:
            run.step(loss(step))
        hypergradient = run.hypergradient(lambda: PROBLEM.outer(params))
        expected = _reference(case, hypers, steps, start, states)
        torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)
        # An outer step between windows changes what the next window is.
        hypers["lr"].plain.mul_(0.9)
        hypers["l2"].plain.mul_(1.1)
        run.optimizer.write_hyperparameters()


@pytest.mark.parametrize("tape", TAPES)
def test_momentum_that_leaves_0_between_windows_takes_its_velocity_along(tape):
    case = CASES["sgd-momentum-from-0"]
    run, hypers, params, loss = _run(case, tape)
    for step in range(3):
        run.step(loss(step))
    run.hypergradient(lambda: PROBLEM.outer(params))
    hypers["momentum"].plain.fill_(0.5)
    run.optimizer.write_hyperparameters()
    # At momentum 0 the velocity of the last step was its gradient, decay included.
    run.optimizer.zero_grad()
    before = [p.detach().clone().requires_grad_() for p in params]
    velocities = [t.state["momentum_buffer"] for t in _transitions_at_zero_gradient(run)]
    states = [{"momentum_buffer": v.clone()} for v in velocities]
    for step in range(3, 6):
        run.step(loss(step))
    torch.testing.assert_close(
        run.hypergradient(lambda: PROBLEM.outer(params)),
        _reference(case, hypers, range(3, 6), before, states),
        rtol=1e-10,
        atol=0,
    )


def _transitions_at_zero_gradient(run):
    for param in run.params:
        param.grad = torch.zeros_like(param)
    return run.optimizer.transitions(run.columns)


@pytest.mark.parametrize("tape", TAPES)
def test_reset_forgets_the_window(tape):
    case = CASES["adam"]
    run, _, params, loss = _run(case, tape)
    run.step(loss(0))
    run.method.reset()
    hypergradient = run.hypergradient(lambda: PROBLEM.outer(params))
    assert hypergradient.tolist() == [0.0] * len(hypergradient)


@pytest.mark.parametrize("tape", TAPES)
def test_a_reset_between_micro_batch_and_step_leaves_no_loss_behind(tape):
    case = CASES["sgd"]
    run, hypers, params, loss = _run(case, tape)
    for hyper in hypers.values():
        hyper.requires_grad_()
    run.method.start()
    run.method.record(run._trace(loss(0)), run._replay(loss(0)))
    run.method.reset()
    start = [p.detach().clone().requires_grad_() for p in params]
    run.step(loss(1))
    torch.testing.assert_close(
        run.hypergradient(lambda: PROBLEM.outer(params)),
        _reference(case, hypers, [1], start, None),
        rtol=1e-10,
        atol=0,
    )
