"""Descent on hyperparameters in the raw coordinates of their domains."""

import math
from functools import partial

import pytest
import torch
from torch.autograd.functional import jacobian

from lightning_rtho import Hyperparameter, Interval, NonNegative, Positive, Real
from lightning_rtho.outer import HyperparameterDescent, Ramp, adam

POINTS = {
    "real": (Real(), -0.7),
    "positive": (Positive(), 1e-3),
    "positive-large": (Positive(), 40.0),
    "non-negative": (NonNegative(), 3e-4),
    "non-negative-tiny": (NonNegative(), 2e-7),
    "interval": (Interval(0, 1), 0.9),
    "interval-wide": (Interval(-2, 5), 0.3),
}

plain_descent = partial(torch.optim.SGD, lr=1.0)


@pytest.mark.parametrize("point", POINTS)
def test_the_raw_gradient_is_the_chain_rule_and_the_value_follows_the_raw_one(point):
    domain, start = POINTS[point]
    hyper = Hyperparameter(start, domain)
    descent = HyperparameterDescent([hyper], plain_descent)
    raw = descent.raw[0].detach().clone()
    slope = jacobian(domain.from_raw, raw)
    hypergradient = 0.01 / slope  # moves the raw value by 0.01, whatever the domain
    descent.step(hypergradient.reshape(1))
    # One product and one map; logit and asinh cost a digit.
    torch.testing.assert_close(descent.raw[0].detach(), raw - 0.01, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hyper.plain, domain.from_raw(raw - 0.01), rtol=1e-12, atol=0)


@pytest.mark.parametrize("point", POINTS)
def test_a_hypergradient_of_zero_keeps_the_value(point):
    domain, start = POINTS[point]
    hyper = Hyperparameter(start, domain)
    HyperparameterDescent([hyper], plain_descent).step(torch.zeros(1))
    assert hyper.item() == pytest.approx(start, rel=1e-14)  # there and back through the domain


def test_entries_are_dealt_out_in_order_to_hyperparameters_of_any_shape():
    scalar = Hyperparameter(0.5, Real())
    matrix = Hyperparameter(torch.zeros(2, 2), Real())
    vector = Hyperparameter([1.0, 1.0], Positive())
    descent = HyperparameterDescent([scalar, matrix, vector], plain_descent)
    descent.step(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 0.1, 0.2]))
    assert scalar.item() == -0.5
    assert matrix.tolist() == [[-2.0, -3.0], [-4.0, -5.0]]
    expected = torch.tensor([-0.1, -0.2]).exp()
    torch.testing.assert_close(vector.plain, expected, rtol=1e-14, atol=0)  # exp(log 1 - g)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("point", POINTS)
def test_no_step_leaves_the_domain(point, sign):
    domain, start = POINTS[point]
    hyper = Hyperparameter(start, domain)
    optimizer = partial(torch.optim.Adam, lr=3.0)  # moves the raw value by 3 each time
    descent = HyperparameterDescent([hyper], optimizer)
    for _ in range(20):
        descent.step(torch.tensor([sign]))
        assert domain.contains(hyper.plain)


def test_a_non_negative_value_reaches_0_and_comes_back():
    hyper = Hyperparameter(1e-4, NonNegative())
    descent = HyperparameterDescent([hyper], partial(torch.optim.SGD, lr=1e6))
    descent.step(torch.tensor([1e3]))
    assert hyper.item() == 0.0
    descent.step(torch.tensor([-1.0]))  # dE/du = -1e-6 at 0, so u = 1
    assert hyper.item() == pytest.approx(1e-6 * torch.tensor(1.0).sinh().item(), rel=1e-12)


def test_a_value_at_the_end_of_its_interval_can_be_moved():
    hyper = Hyperparameter(0.0, Interval(0, 1))
    HyperparameterDescent([hyper], adam).step(torch.tensor([-1.0]))
    assert 0 < hyper.item() < 0.01


def test_projection_keeps_a_raw_value_from_running_away():
    hyper = Hyperparameter(0.5, Interval(0, 1))
    descent = HyperparameterDescent([hyper], partial(torch.optim.Adam, lr=5.0))
    for _ in range(20):
        descent.step(torch.tensor([-1.0]))
    assert 1 - hyper.item() == pytest.approx(1e-6, rel=1e-3)  # sigmoid(ln 1e6) = 1 - 1e-6
    for _ in range(8):
        descent.step(torch.tensor([1e6]))
    assert hyper.item() < 0.5


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.AdamW, lr=0.1),
        partial(torch.optim.RMSprop, lr=0.1),
        partial(torch.optim.Adagrad, lr=0.1),
        adam,
    ],
    ids=["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "default"],
)
def test_any_torch_optimizer_moves_the_raw_values_as_it_moves_weights(make):
    hyper = Hyperparameter([0.5, 2.0], Positive())
    descent = HyperparameterDescent([hyper], make)
    twin = torch.tensor([0.5, 2.0]).log().requires_grad_()
    optimizer = make([twin])
    for _ in range(5):
        hypergradient = 2 * (hyper.plain - 1)
        descent.step(hypergradient)
        optimizer.zero_grad()
        (twin.exp() - 1).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(hyper.plain, twin.detach().exp(), rtol=1e-12, atol=0)  # 5 steps


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_default_moves_a_rate_by_a_fifth_whatever_the_scale(scale):
    # dE/dlog lr = lr dE/dlr is kept constant: then m / sqrt(v) is 1 after bias correction.
    hyper = Hyperparameter(0.01, Positive())
    descent = HyperparameterDescent([hyper], adam)
    for step in range(1, 13):
        descent.step(-scale / hyper.plain.reshape(1))
        # Adam's eps of 1e-8 stands beside a derivative of 1e-4.
        assert hyper.plain.log().item() == pytest.approx(math.log(0.01) + 0.2 * step, rel=1e-3)


def test_a_rate_that_does_nothing_moves_five_times_as_far_and_others_do_not():
    rate, other = Hyperparameter(1e-6, Positive()), Hyperparameter(1e-6, Positive())
    descent = HyperparameterDescent([rate, other], adam, ramped=[0])
    travelled = []
    for change in (1e-4, 1e-4, 1.0, 1e-4):  # of an objective of 1, by a raw unit
        before = rate.plain.log().item(), other.plain.log().item()
        step = -change / torch.stack([rate.plain, other.plain])
        descent.step(step, objective=1.0)
        travelled.append((rate.plain.log() - before[0], other.plain.log() - before[1]))
    (first, ordinary), (second, _), *later = travelled
    # Adam's first steps have a length of 0.2, but for its eps of 1e-8 beside 1e-4.
    assert first.item() == pytest.approx(1.0, rel=1e-3)
    assert second.item() == pytest.approx(1.0, rel=1e-3)
    assert ordinary.item() == pytest.approx(0.2, rel=1e-3)
    for moved, beside in later:
        assert moved.item() == pytest.approx(beside.item(), rel=1e-12)


def test_rates_climb_against_their_hypergradient_and_others_do_not():
    rate, other = Hyperparameter(0.01, Positive()), Hyperparameter(0.01, Positive())
    descent = HyperparameterDescent([rate, other], adam, ramped=[0], ramp=Ramp(updates=8))
    travelled = []
    for _ in range(3):
        before = torch.stack([rate.plain, other.plain]).log()
        # dE/du is 0.5 of an objective of 1, so that both ought to become smaller.
        descent.step(0.5 / torch.stack([rate.plain, other.plain]), objective=1.0)
        travelled.append((torch.stack([rate.plain, other.plain]).log() - before).tolist())
    for up, down in travelled[:2]:
        assert up == pytest.approx(1.0, rel=1e-6)  # rounding of float32
        assert down == pytest.approx(-0.2, rel=1e-5)
    assert travelled[2][0] == pytest.approx(-0.2, rel=1e-5)  # two are a quarter of eight
    assert not descent.is_climbing


def test_a_climb_ends_before_the_end_of_an_interval():
    """Where raw values have gone far without moving natural ones it is a long way back."""
    rate = Hyperparameter(1e-3, Interval(1e-5, 0.1))
    descent = HyperparameterDescent([rate], adam, ramped=[0], ramp=Ramp(updates=80))
    values = [rate.item()]
    while descent.is_climbing:
        descent.step(torch.tensor([0.5]), objective=1.0)
        values.append(rate.item())
    assert 0.05 < values[-1] < 0.09
    for _ in range(15):  # a fifth of a raw unit each
        descent.step(torch.tensor([0.5]), objective=1.0)
    assert rate.item() < 0.03


def test_without_a_rate_nothing_climbs():
    other = Hyperparameter(0.01, Positive())
    assert not HyperparameterDescent([other], adam, ramp=Ramp(updates=8)).is_climbing


def test_a_descent_that_is_resumed_goes_on_as_it_was():
    values = []
    for is_resumed in (False, True):
        hyper = Hyperparameter(1e-6, Positive())
        descent = HyperparameterDescent([hyper], adam, ramped=[0], ramp=Ramp(updates=8))
        for change in (1e-4, 1e-4, 1e-4, 1.0, 1e-4, 1e-4):
            if is_resumed:
                state = descent.state_dict()
                descent = HyperparameterDescent([hyper], adam, ramped=[0], ramp=Ramp(updates=8))
                descent.load_state_dict(state)
            descent.step(-change / hyper.plain.reshape(1), objective=1.0)
        values.append(hyper.item())
    assert values[0] == values[1]


def test_the_state_of_another_optimizer_is_refused():
    hyper = Hyperparameter(1.0, Positive())
    state = HyperparameterDescent([hyper], adam).state_dict()
    other = HyperparameterDescent([hyper], lambda raw: torch.optim.SGD(raw, lr=0.1))
    with pytest.raises(ValueError, match="`outer_optimizer` must be the one that the checkpoint"):
        other.load_state_dict(state)


def test_the_default_follows_a_trend_in_noise_and_not_the_noise():
    generator = torch.Generator().manual_seed(0)
    travelled = {}
    for trend in (0.0, 0.5):
        hyper = Hyperparameter(1.0, Positive())
        descent, moves = HyperparameterDescent([hyper], adam), []
        for noise in torch.randn(400, generator=generator, dtype=torch.float64):
            before = hyper.plain.log().item()
            descent.step((noise - trend).reshape(1) / hyper.plain)
            moves.append(hyper.plain.log().item() - before)
        travelled[trend] = sum(moves)
        assert max(abs(move) for move in moves[20:]) < 0.25
    # 0.2 times the trend over the size of the hypergradient, 0.5 / sqrt(1 + 0.25), each time; a
    # random walk of steps of 0.2 leads 4 away in 400.
    assert travelled[0.5] == pytest.approx(400 * 0.2 * 0.5 / 1.25**0.5, rel=0.3)
    assert abs(travelled[0.0]) < 8


def test_a_vector_keeps_its_dtype():
    hyper = Hyperparameter(torch.ones(2, dtype=torch.float32), Positive())
    HyperparameterDescent([hyper], adam).step(torch.tensor([1.0, -1.0], dtype=torch.float64))
    assert hyper.dtype is torch.float32
    assert hyper[0] < 1 < hyper[1]


def test_values_are_written_in_place_and_stay_as_live_as_they_were():
    hyper = Hyperparameter(0.1, Positive())
    hyper.requires_grad_()
    address = hyper.data_ptr()
    HyperparameterDescent([hyper], adam).step(torch.tensor([1.0]))
    assert hyper.data_ptr() == address
    assert hyper.requires_grad
    assert hyper.is_leaf
