"""What is peculiar to forward mode: a derivative that is carried, discounted, and let go of."""

import gc
from functools import partial

import pytest
import torch

from lightning_rtho.hypergradient import ForwardHypergradient
from lightning_rtho.hypergradient._tangents import Tangents
from lightning_rtho.linearization import TracedLoss, _fused
from tests.helpers import (
    CASES,
    PROBLEMS,
    Run,
    derivative,
    hyperparameters,
    leaves,
    torch_states,
    watch_graph,
)

PROBLEM = PROBLEMS["network"]


def _run(case, discount=1.0):
    """A run of a row of the table, its hyperparameters and weights, and its loss of a step."""
    hypers = hyperparameters(case.settings | PROBLEM.loss_hypers)
    params = [w.requires_grad_() for w in PROBLEM.start]
    optimizer = case.optimizer(params, {name: hypers[name] for name in case.settings})
    run = Run(optimizer, hypers, partial(ForwardHypergradient, discount=discount))
    lambdas = {name: hypers[name] for name in PROBLEM.loss_hypers}
    return run, hypers, params, lambda step: partial(PROBLEM.inner, params, lambdas, step)


def _flat(hypers):
    """All natural values in one vector ``[m]``."""
    return torch.cat([hyper.plain.flatten() for hyper in hypers.values()])


def _reference(case, steps, start=None, states=None, shifts=lambda step: {}, factors=None):
    """Hypergradient of the unrolled run; `shifts` are added to the hyperparameters of a step.

    With `factors` they are moved in log space instead, and so is the derivative.
    """
    lambdas = leaves(case.settings | PROBLEM.loss_hypers)
    if factors is not None:
        lambdas = {n: value.detach().log().requires_grad_() for n, value in lambdas.items()}
    current = start or [w.requires_grad_() for w in PROBLEM.start]
    buffers = states or [{} for _ in current]
    for step in steps:
        if factors is None:
            shifted = {name: value + shifts(step).get(name, 0.0) for name, value in lambdas.items()}
        else:
            shifted = {name: value.exp() * factors(step, name) for name, value in lambdas.items()}
        grads = torch.autograd.grad(
            PROBLEM.inner(current, shifted, step), current, create_graph=True
        )
        update = case.textbook({name: shifted[name] for name in case.settings})
        pairs = [update(*wgs) for wgs in zip(current, grads, buffers, strict=True)]
        current, buffers = [w for w, _ in pairs], [s for _, s in pairs]
    return derivative(PROBLEM.outer(current), lambdas)


@pytest.mark.parametrize("name", ["sgd-momentum", "adam", "asgd"])
def test_the_derivative_reaches_back_to_the_first_step_however_often_it_is_read(name):
    case = CASES[name]
    run, _, params, loss = _run(case)
    for step in range(9):
        run.step(loss(step))
        if step % 3 == 2:
            torch.testing.assert_close(
                run.hypergradient(lambda: PROBLEM.outer(params)),
                _reference(case, range(step + 1)),
                rtol=1e-10,  # entry by entry, after up to 9 steps
                atol=0,
            )


@pytest.mark.parametrize("name", ["sgd-momentum-from-0", "rmsprop-momentum-from-0", "adam"])
def test_hyperparameters_may_move_on_the_way(name):
    # The derivative is by a shift of the whole trajectory of each hyperparameter.
    case = CASES[name]
    run, hypers, params, loss = _run(case)
    moved = {"lr": 0.03, "l2": 0.1} | ({"momentum": 0.4} if "momentum" in hypers else {})
    for step in range(6):
        if step == 3:
            for key, shift in moved.items():
                hypers[key].plain.add_(shift)
            run.optimizer.write_hyperparameters()
        run.step(loss(step))
    torch.testing.assert_close(
        run.hypergradient(lambda: PROBLEM.outer(params)),
        _reference(case, range(6), shifts=lambda step: moved if step >= 3 else {}),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("name", ["sgd-momentum", "adam"])
def test_history_that_is_taken_along_is_that_of_a_shift_of_all_raw_values(name):
    # lambda = exp(u): what three steps owe to a rate ten times smaller is scaled with it.
    run, hypers, params, loss = _run(CASES[name])
    factors = {"lr": 10.0, "l2": 3.0, "momentum": 0.5}
    for step in range(6):
        if step == 3:
            old = _flat(hypers).diag()
            for key, hyper in hypers.items():
                hyper.plain.mul_(factors.get(key, 1.0))
            run.method.transport(old, _flat(hypers).diag())
            run.optimizer.write_hyperparameters()
        run.step(loss(step))
    found = run.hypergradient(lambda: PROBLEM.outer(params))
    torch.testing.assert_close(
        found * _flat(hypers),
        _reference(
            CASES[name],
            range(6),
            factors=lambda step, key: factors.get(key, 1.0) if step >= 3 else 1.0,
        ),
        rtol=1e-10,  # entry by entry, after 6 steps
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_history_is_taken_along_in_place(dtype):
    w = torch.zeros(_fused._LARGE, requires_grad=True)
    hypers = [torch.ones((), requires_grad=True) for _ in range(4)]
    method = ForwardHypergradient([w], hypers, tangent_dtype=dtype)
    history = torch.randn(4, *w.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    state = {**method.state_dict(), "tangents": [{"param": history.clone()}]}
    method.load_state_dict(state, recollection=None)
    (before,) = method.weight_tangents()
    old, new = torch.diag(torch.tensor([0.5, 1.0, 2.0, 0.3])), torch.eye(4)
    old[0, 3], new[0, 3], new[1, 2] = 0.7, -0.4, 0.2  # rates that move with another entry
    method.transport(old, new)
    (found,) = method.weight_tangents()
    exact = new.double().T.inverse() @ old.double().T @ history.double()
    # Three products are added; then the sum is rounded once.
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert found.data_ptr() == before.data_ptr()


def test_reset_makes_the_present_state_a_constant():
    case = CASES["adam"]
    run, _, params, loss = _run(case)
    for step in range(3):
        run.step(loss(step))
    run.method.reset()
    start = [p.detach().clone().requires_grad_() for p in params]
    states = torch_states(run.optimizer, params)
    for step in range(3, 6):
        run.step(loss(step))
    torch.testing.assert_close(
        run.hypergradient(lambda: PROBLEM.outer(params)),
        _reference(case, range(3, 6), start, states),
        rtol=1e-10,
        atol=0,
    )


def test_products_of_half_precision_add_up_beyond_it():
    weight = torch.zeros(4, dtype=torch.float16)
    tangents = Tangents([weight], 1, None)
    tangents.write(0, range(1), {"param": torch.full((1, 4), 300.0, dtype=torch.float16)})
    found = tangents.pulled_back([torch.full((4,), 300.0, dtype=torch.float16)], [], [range(1)])
    assert found.tolist() == [4 * 300 * 300]  # float16 ends at 65,504


def test_discount_0_looks_one_step_back():
    case = CASES["sgd-momentum"]
    run, _, params, loss = _run(case, discount=0.0)
    for step in range(3):
        run.step(loss(step))
    start = [p.detach().clone().requires_grad_() for p in params]
    states = torch_states(run.optimizer, params)
    run.step(loss(3))
    torch.testing.assert_close(
        run.hypergradient(lambda: PROBLEM.outer(params)),
        _reference(case, [3], start, states),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("discount", [0.0, 0.5, 0.9, 1.0])
def test_discounted_derivative_is_the_recursion_with_dense_matrices(discount, micro_batches):
    lr, momentum, rho = 0.1, 0.7, 0.3
    curvature = torch.tensor([[2.0, 0.5], [0.5, 1.0]])
    hypers = hyperparameters({"lr": lr, "momentum": momentum, "rho": rho})
    start = torch.tensor([1.0, -2.0])
    w = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([w], lr=hypers["lr"], momentum=hypers["momentum"])
    run = Run(optimizer, hypers, partial(ForwardHypergradient, discount=discount))

    def loss():
        return (0.5 * w @ curvature @ w + hypers["rho"] * w.sum()) / micro_batches

    for _ in range(5):
        run.step(*[loss] * micro_batches)
    hypergradient = run.hypergradient(lambda: 0.5 * w @ w)

    # s = (w, v): v' = mu v + H w + rho 1, w' = w - eta v'. At v_0 = 0 the first step is no other.
    eye, ones = torch.eye(2), torch.ones(2)
    position, velocity, z = start, torch.zeros(2), torch.zeros(4, 3)
    a = torch.cat([
        torch.cat([eye - lr * curvature, -lr * momentum * eye], dim=1),
        torch.cat([curvature, momentum * eye], dim=1),
    ])
    for _ in range(5):
        old = velocity
        velocity = momentum * old + curvature @ position + rho * ones
        position = position - lr * velocity
        by_lr = torch.cat([-velocity, torch.zeros(2)])
        by_momentum = torch.cat([-lr * old, old])
        by_rho = torch.cat([-lr * ones, ones])
        z = discount * a @ z + torch.stack([by_lr, by_momentum, by_rho], dim=1)
    torch.testing.assert_close(hypergradient, position @ z[:2], rtol=1e-12, atol=1e-14)


def test_the_gradients_come_back_for_the_backward_pass_to_use():
    w, v = torch.tensor([3.0], requires_grad=True), torch.ones(1, requires_grad=True)
    method = ForwardHypergradient([w, v], [])
    assert method.record(TracedLoss((w**2).sum()), replay=None) == [torch.tensor([6.0]), None]


def test_the_graph_of_a_step_is_let_go_of_with_the_step():
    run, _, _, loss = _run(CASES["adam"])
    graphs = []

    def watched(step):
        value = loss(step)()
        graphs.append(watch_graph(value))
        return value

    run.step(partial(watched, 0))
    gc.disable()  # whatever only the collector would find counts as leaked
    try:
        for step in range(1, 30):
            run.step(partial(watched, step))
        assert [is_alive() for is_alive in graphs] == [False] * 30
    finally:
        gc.enable()


def test_the_number_of_live_tensors_stays_flat():
    run, _, _, loss = _run(CASES["adam"])

    def count():
        return sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects())

    for step in range(3):
        run.step(loss(step))
    assert run.method.take_faults() == []
    gc.collect()
    gc.disable()
    try:
        before = count()
        for step in range(30):
            run.step(loss(step))
            run.method.take_faults()
        assert count() == before
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [100, 2**19])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tangents_of_half_precision_are_off_by_its_rounding(size, dtype):
    steps = 6

    def follow(tangent_dtype):
        torch.manual_seed(0)
        hypers = hyperparameters({"lr": 0.1, "rho": 0.5})
        w = torch.randn(size, dtype=torch.float32, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=hypers["lr"], momentum=0.9)
        run = Run(optimizer, hypers, partial(ForwardHypergradient, tangent_dtype=tangent_dtype))
        for _ in range(steps):
            run.step(lambda: hypers["rho"] * (w.square() + 0.1 * w**4).mean() * size)
        hypergradient = run.hypergradient(lambda: w.square().mean())
        return hypergradient, run.method

    exact, _ = follow(None)
    found, method = follow(dtype)
    kept = {value.dtype for tangent in method.tangents.states for value in tangent.values()}
    assert kept == {dtype}
    # Each step rounds Z once, by eps / 2 at most; weights and velocity take turns.
    torch.testing.assert_close(found, exact, rtol=2 * steps * torch.finfo(dtype).eps, atol=0)
    assert not torch.equal(found, exact)


def test_tangents_of_another_precision_are_kept_in_it_after_loading():
    case = CASES["adam"]
    run, _, params, loss = _run(case)
    for step in range(3):
        run.step(loss(step))
    state = run.method.state_dict()
    method = ForwardHypergradient(params, run.hypers, tangent_dtype=torch.bfloat16)
    method.load_state_dict(state, None)
    assert all(t["param"].dtype == torch.bfloat16 for t in method.tangents.states)
