"""Every method against closed forms and against autograd through the unrolled run."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import Hyperparameter, Real
from lightning_rtho.hypergradient import GradientMismatchError
from lightning_rtho.linearization import ClipByNorm, ClipByValue
from tests.helpers import (
    CASES,
    METHODS,
    PROBLEMS,
    Run,
    derivative,
    hyperparameters,
    leaves,
    measured,
    settings_of,
    sgd,
    unroll,
    unrolled,
)

every_method = pytest.mark.parametrize("method", METHODS)


# Closed form


@every_method
def test_scalar_quadratic_has_the_derivatives_derived_by_hand(method):
    lr, a, start, steps = 0.3, 0.8, -0.7, 6
    hypers = hyperparameters({"lr": lr, "a": a})
    w = torch.tensor(start, requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=hypers["lr"]), hypers, METHODS[method])
    for _ in range(steps):
        run.step(lambda: 0.5 * hypers["a"] * (w - 1) ** 2)
    hypergradient = run.hypergradient(lambda: 0.5 * w**2)
    # w_T - 1 = (1 - lr a)^T (w_0 - 1), and E = w_T^2 / 2.
    shrinking = 1 - lr * a
    last = 1 + shrinking**steps * (start - 1)
    slope = last * steps * shrinking ** (steps - 1) * (start - 1)
    expected = torch.tensor([-a * slope, -lr * slope])
    torch.testing.assert_close(hypergradient, expected, rtol=1e-12, atol=0)  # some 20 roundings


@every_method
def test_without_a_step_only_the_direct_part_is_left(method):
    hypers = hyperparameters({"l2": 0.5})
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=0.1), hypers, METHODS[method])
    hypers["l2"].requires_grad_()
    hypergradient = run.hypergradient(lambda: hypers["l2"] * w.square().sum())
    assert hypergradient.tolist() == [5.0]


# Autograd through the unrolled run, for every optimizer


@pytest.mark.parametrize("optimizer", {case.make for case in CASES.values()})
def test_every_setting_of_every_optimizer_is_tuned_in_the_table(optimizer):
    cases = [case for case in CASES.values() if case.make is optimizer]
    assert {name for case in cases for name in case.settings} == settings_of(optimizer)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
@every_method
def test_hypergradient_is_that_of_the_unrolled_run(method, case, problem, warm):
    expected = unrolled(case, problem, warm)
    assert expected.isfinite().all()
    # Entry by entry; seen are errors up to 1e-13, where an entry is a difference of large terms.
    torch.testing.assert_close(measured(case, problem, warm, method), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("warm", [False, True], ids=["fresh", "warm"])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_reverse_agree_and_tapes_agree_to_the_last_bit(case, problem, warm):
    forward = measured(case, problem, warm, "forward")
    reverse = measured(case, problem, warm, "recompute")
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=0)  # same terms, other order
    assert torch.equal(reverse, measured(case, problem, warm, "keep-graph"))
    assert torch.equal(reverse, measured(case, problem, warm, "offload"))


# Autograd through the unrolled run, for what stands around the optimizer

SETTINGS = {"lr": 0.2, "momentum": 0.6}


def _network_run(method, problem, **keywords):
    """A run of SGD with momentum on the network, and its loss of a step."""
    hypers = hyperparameters(SETTINGS | problem.loss_hypers)
    params = [w.requires_grad_() for w in problem.start]
    optimizer = torch.optim.SGD(params, lr=hypers["lr"], momentum=hypers["momentum"])
    run = Run(optimizer, hypers, METHODS[method], **keywords)
    return run, lambda step: partial(problem.inner, params, hypers, step), params


def _network_reference(problem, steps: Callable, **keywords):
    """The last weights of the unrolled run, and the hyperparameters that they depend on."""
    lambdas = leaves(SETTINGS | problem.loss_hypers)
    update = partial(sgd, lr=lambdas["lr"], momentum=lambdas["momentum"])
    losses = steps(lambda step: partial(problem.inner, lambdas=lambdas, step=step))
    params = [w.requires_grad_() for w in problem.start]
    return unroll(params, [update] * len(params), losses, **keywords), lambdas


@every_method
def test_accumulated_micro_batches_count_as_one_step(method):
    problem = PROBLEMS["network"]

    def steps(loss):
        def scaled(step):
            return lambda *args: loss(step)(*args) / 3

        return [[scaled(3 * k), scaled(3 * k + 1), scaled(3 * k + 2)] for k in range(3)]

    run, loss, params = _network_run(method, problem)
    for losses in steps(loss):
        run.step(*losses)
    hypergradient = run.hypergradient(lambda: problem.outer(params))
    weights, lambdas = _network_reference(problem, steps)
    expected = derivative(problem.outer(weights), lambdas)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


def _clipped_by_norm(grads: list[Tensor], limit: float) -> list[Tensor]:
    norm = torch.cat([grad.flatten() for grad in grads]).norm()
    return [grad * limit / (norm + 1e-6) for grad in grads] if norm + 1e-6 > limit else grads


def _clipped_by_value(grads: list[Tensor], limit: float) -> list[Tensor]:
    return [torch.where(g.abs() > limit, limit * g.detach().sign(), g) for g in grads]


CLIPS = {
    "norm-active": (ClipByNorm(0.5), partial(_clipped_by_norm, limit=0.5)),
    "norm-at-times": (ClipByNorm(1.2), partial(_clipped_by_norm, limit=1.2)),
    "norm-inactive": (ClipByNorm(100.0), lambda grads: grads),
    "value": (ClipByValue(0.2), partial(_clipped_by_value, limit=0.2)),
}


@pytest.mark.parametrize("clip", CLIPS)
@every_method
def test_clipping_belongs_to_the_step(method, clip):
    problem = PROBLEMS["network"]
    ours, reference = CLIPS[clip]
    run, loss, params = _network_run(method, problem, clip=ours)
    for step in range(4):
        run.step(loss(step))

    def steps(loss):
        return [[loss(step)] for step in range(4)]

    hypergradient = run.hypergradient(lambda: problem.outer(params))
    weights, lambdas = _network_reference(problem, steps, clip=reference)
    expected = derivative(problem.outer(weights), lambdas)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("clip", [None, ClipByNorm(0.5)], ids=["unclipped", "clipped"])
@every_method
def test_a_scale_on_the_loss_is_none_of_the_hypergradients_business(method, clip):
    problem = PROBLEMS["network"]
    found = []
    for scale in (1.0, 1024.0):
        run, loss, params = _network_run(method, problem, clip=clip, scale=scale)
        for step in range(3):
            run.step(loss(step))
        found.append(run.hypergradient(lambda params=params: problem.outer(params)))
    # A power of two costs no digit of a gradient; the products are summed in the same order.
    torch.testing.assert_close(*found, rtol=1e-13, atol=0)


@every_method
def test_a_skipped_step_is_none(method):
    problem = PROBLEMS["network"]
    found = []
    for steps in ([0, 1, 2], [0, "overflown", 1, 2]):
        run, loss, params = _network_run(method, problem)
        for step in steps:
            if step == "overflown":
                overflown = loss(7)
                run.step(lambda loss=overflown: loss() * float("inf"), skip=True)
            else:
                run.step(loss(step))
        found.append(run.hypergradient(lambda params=params: problem.outer(params)))
    assert torch.equal(*found)


@every_method
def test_weights_without_a_gradient_in_a_step_stand_still_in_it(method):
    problem = PROBLEMS["network"]

    def losses(step, compute):
        """The odd steps leave out the network: only the penalty of one weight is left."""
        return compute if step % 2 == 0 else lambda weights: weights[1].square().sum()

    run, loss, params = _network_run(method, problem)
    for step in range(5):
        run.step(partial(losses(step, lambda _, step=step: loss(step)()), params))

    def steps(loss):
        return [[losses(step, loss(step))] for step in range(5)]

    hypergradient = run.hypergradient(lambda: problem.outer(params))
    weights, lambdas = _network_reference(problem, steps)
    expected = derivative(problem.outer(weights), lambdas)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


@every_method
def test_a_weight_may_be_unfrozen_on_the_way(method):
    problem = PROBLEMS["network"]
    run, loss, params = _network_run(method, problem)
    for step in range(4):
        params[0].requires_grad_(step >= 2)
        run.step(loss(step))
    hypergradient = run.hypergradient(lambda: problem.outer(params))

    def steps(loss):
        def frozen(step):
            return lambda weights: loss(step)([weights[0].detach(), *weights[1:]])

        return [[frozen(0)], [frozen(1)], [loss(2)], [loss(3)]]

    weights, lambdas = _network_reference(problem, steps)
    expected = derivative(problem.outer(weights), lambdas)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


@every_method
def test_frozen_unused_tied_and_foreign_weights_are_followed(method):
    # Tied: `w` is used twice. Frozen: no gradient is asked of it. Unused: it never has one.
    # Foreign: it has a gradient, but no optimizer trains it.
    hypers = hyperparameters({"lr": 0.2, "beta1": 0.8, "rho": 0.3})
    w, frozen, unused, foreign = (torch.randn(3) for _ in range(4))
    for weight in (w, unused, foreign):
        weight.requires_grad_()
    x, y = torch.randn(5, 3), torch.randn(5)

    def inner(w, frozen, foreign, rho):
        hidden = torch.tanh(x * w + frozen * foreign)
        return (hidden @ w - y).square().mean() + rho * (w - foreign).square().sum()

    optimizer = torch.optim.Adam(
        [frozen, w, unused], lr=hypers["lr"], betas=(hypers["beta1"], torch.tensor(0.9)), eps=1e-3
    )
    run = Run(optimizer, hypers, METHODS[method], bystanders=[foreign])
    lambdas, start = leaves(hypers), [t.detach().clone() for t in (w, frozen, foreign)]
    for _ in range(4):
        run.step(lambda: inner(w, frozen, foreign, hypers["rho"]))
    hypergradient = run.hypergradient(lambda: (w**3).sum())

    update = partial(
        CASES["adam"].update, lr=lambdas["lr"], beta1=lambdas["beta1"], beta2=0.9, eps=1e-3
    )
    losses = [[lambda weights: inner(weights[0], *start[1:], lambdas["rho"])]] * 4
    (last,) = unroll([start[0].requires_grad_()], [update], losses)
    expected = derivative((last**3).sum(), lambdas)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


@every_method
def test_one_hyperparameter_acts_in_several_groups_in_the_loss_and_in_the_objective(method):
    problem = PROBLEMS["network"]
    hypers = hyperparameters({"shared": 0.1, "lr": 0.3, "decay": 0.05})
    params = [w.requires_grad_() for w in problem.start]
    groups = [
        {"params": params[:1], "lr": hypers["shared"], "weight_decay": hypers["shared"]},
        {"params": params[1:2], "lr": hypers["lr"], "momentum": 0.5},
        {"params": params[2:], "lr": hypers["shared"], "weight_decay": hypers["decay"]},
    ]
    run = Run(torch.optim.SGD(groups), hypers, METHODS[method])
    for step in range(4):
        run.step(lambda step=step: problem.inner(params, {"l2": hypers["shared"]}, step))

    def outer(weights, lam):
        return lam["shared"] ** 2 * problem.outer(weights) + lam["decay"] * weights[0].sum()

    hypergradient = run.hypergradient(lambda: outer(params, hypers))
    lam = leaves(hypers)
    updates = [
        partial(sgd, lr=lam["shared"], weight_decay=lam["shared"]),
        partial(sgd, lr=lam["lr"], momentum=0.5),
        partial(sgd, lr=lam["shared"], weight_decay=lam["decay"]),
    ]
    losses = [[partial(problem.inner, lambdas={"l2": lam["shared"]}, step=k)] for k in range(4)]
    weights = unroll([w.requires_grad_() for w in problem.start], updates, losses)
    expected = derivative(outer(weights, lam), lam)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-10, atol=0)


@every_method
def test_the_gradient_handed_out_is_that_of_backward_to_the_last_bit(method):
    problem = PROBLEMS["network"]
    run, loss, params = _network_run(method, problem)
    run.step(loss(0))
    run.method.reset()
    followed = [param.detach().clone() for param in params]
    plain = [w.requires_grad_() for w in problem.start]
    lambdas = leaves(SETTINGS | problem.loss_hypers)
    optimizer = torch.optim.SGD(plain, lr=SETTINGS["lr"], momentum=SETTINGS["momentum"])
    problem.inner(plain, lambdas, 0).backward()
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(followed, plain, strict=True))


# Finite differences through the running statistics of batch normalization


class _Normalized(nn.Module):
    """A smooth network whose validation loss depends on running statistics."""

    def __init__(self, momentum: float | None = 0.3, shared: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3, momentum=momentum)
        self.other = self.norm if shared else nn.BatchNorm1d(3, momentum=momentum, affine=False)
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        return self.last(torch.tanh(self.other(self.second(hidden)))).squeeze(1)


def _normalized_run(model, lambdas, micro_batches, skipped, make_step):
    """Train by the function made by `make_step`; return the validation loss as a function."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(16, 6, 2, generator=generator), torch.randn(16, 6, generator=generator)
    step = make_step(
        torch.optim.SGD(model.parameters(), lr=lambdas["lr"], momentum=lambdas["momentum"])
    )

    def loss(batch):
        model.train()
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.mse_loss(model(x[batch]), y[batch]) / micro_batches + lambdas["l2"] * penalty

    for k in range(4):
        losses = [partial(loss, micro_batches * k + i) for i in range(micro_batches)]
        step(*losses, skip=k == skipped)

    def validation_loss():
        model.eval()
        return F.mse_loss(model(x[15]), y[15])

    return validation_loss


def _normalized_difference(make_model, values, name, micro_batches, skipped, width):
    """Central difference of the validation loss after plain training with torch alone."""

    def make_step(optimizer):
        def step(*losses, skip):
            optimizer.zero_grad()
            for loss in losses:
                loss().backward()
            if not skip:
                optimizer.step()

        return step

    def validation_loss(shift):
        torch.manual_seed(5)
        lambdas = values | {name: values[name] + shift}
        return _normalized_run(make_model(), lambdas, micro_batches, skipped, make_step)().item()

    return (validation_loss(width) - validation_loss(-width)) / (2 * width)


@dataclass(frozen=True)
class _Training:
    """How a normalized network is trained."""

    make_model: Callable[[], nn.Module] = _Normalized
    micro_batches: int = 1
    scale: float = 1.0
    skipped: int | None = None


NORMALIZED = {
    "plain": _Training(),
    "cumulative": _Training(partial(_Normalized, momentum=None)),
    "accumulated": _Training(micro_batches=2),
    "cumulative-accumulated": _Training(partial(_Normalized, momentum=None), micro_batches=2),
    "called-twice": _Training(partial(_Normalized, shared=True)),
    "cumulative-called-twice": _Training(partial(_Normalized, momentum=None, shared=True)),
    "scaled": _Training(scale=1024.0),
    "skipped": _Training(skipped=2),  # the forward pass has moved the statistics all the same
}


@pytest.mark.parametrize("name", NORMALIZED)
@every_method
def test_running_statistics_carry_their_part_of_the_hypergradient(method, name):
    training = NORMALIZED[name]
    size, skipped = training.micro_batches, training.skipped
    values = {"lr": 0.2, "momentum": 0.5, "l2": 0.02}
    torch.manual_seed(5)
    model, hypers, runs = training.make_model(), hyperparameters(values), []

    def make_step(optimizer):
        runs.append(Run(optimizer, hypers, METHODS[method], module=model, scale=training.scale))
        return runs[0].step

    outer = _normalized_run(model, hypers, size, skipped, make_step)
    running = [buffer.clone() for buffer in runs[0].statistics.buffers]
    hypergradient = runs[0].hypergradient(outer, running=True)
    expected = torch.tensor([
        _normalized_difference(training.make_model, values, name, size, skipped, 1e-5)
        for name in values
    ])
    # Central differences of width 1e-5: truncation of about 1e-10, rounding of 1e-16 / 1e-5.
    torch.testing.assert_close(hypergradient, expected, rtol=1e-6, atol=0)
    assert all(map(torch.equal, running, runs[0].statistics.buffers))


# What cannot be followed is refused


def _two_steps(method, edit=lambda param: None, replay=None):
    """A run of two steps, in the second of which something may happen."""
    hypers = hyperparameters({"lr": 0.1})
    w = torch.randn(4, requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=hypers["lr"]), hypers, METHODS[method])
    target = torch.randn(4)

    def loss():
        return (w - target).square().sum()

    run.step(loss)
    run.step(loss, edit=lambda: edit(w), replays=None if replay is None else [lambda: replay(w)])
    return run.hypergradient(lambda: w.square().sum())


@every_method
def test_an_edited_gradient_is_refused(method):
    with pytest.raises(GradientMismatchError, match="gradient"):
        _two_steps(method, edit=lambda w: w.grad[0].mul_(1.001))


@every_method
def test_a_difference_within_rounding_is_not_refused(method):
    assert _two_steps(method, edit=lambda w: w.grad.mul_(1 + 1e-12)).isfinite().all()


@pytest.mark.parametrize("method", ["recompute", "offload"])
def test_a_replay_of_another_loss_is_refused(method):
    with pytest.raises(GradientMismatchError, match="gradient"):
        _two_steps(method, replay=lambda w: w.square().sum())


@pytest.mark.parametrize("method", ["recompute", "offload"])
def test_an_edit_of_a_past_step_is_refused_even_where_the_last_is_sound(method):
    hypers = {"lr": Hyperparameter(0.1, Real())}
    w = torch.randn(4, requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=hypers["lr"]), hypers, METHODS[method])
    run.step(lambda: w.square().sum(), edit=lambda: w.grad.add_(0.1))
    run.step(lambda: w.square().sum())
    with pytest.raises(GradientMismatchError):
        run.hypergradient(lambda: w.sum())


@every_method
def test_a_refused_window_leaves_nothing_open(method):
    with pytest.raises(GradientMismatchError):
        _two_steps(method, edit=lambda w: w.grad.add_(1))
    w = torch.ones(2, requires_grad=True)
    value = (w**2).sum()
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
