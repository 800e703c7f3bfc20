"""Raw coordinates of hyperparameters that act together."""

from functools import partial

import pytest
import torch

from lightning_rtho import (
    DifferentiableOptimizer,
    Hyperparameter,
    Interval,
    NonNegative,
    Positive,
    Real,
)
from lightning_rtho.callbacks._coupling import decoupled_coordinates
from lightning_rtho.outer import Coordinates, HyperparameterDescent, adam, relative_slopes


def rate_and_momentum(rate_domain=None, momentum=0.9):
    return [
        Hyperparameter(0.02, rate_domain or Positive()),
        Hyperparameter(momentum, Interval(0, 1)),
    ]


@pytest.mark.parametrize("domain", [Positive(), NonNegative()])
def test_there_and_back_changes_nothing(domain):
    hypers = rate_and_momentum(domain)
    coordinates = Coordinates(hypers, [(0, 1)], [1])
    found = coordinates.to_natural(coordinates.read())
    # Two logarithms and back.
    torch.testing.assert_close(found, [h.plain for h in hypers], rtol=1e-12, atol=0)


def test_moving_the_momentum_keeps_the_lasting_step():
    hypers = rate_and_momentum()
    coordinates = Coordinates(hypers, [(0, 1)], [1])
    raw = coordinates.read()
    raw[1] += 2.0
    lr, momentum = coordinates.to_natural(raw)
    assert momentum.item() > 0.93
    assert (lr / (1 - momentum)).item() == pytest.approx(0.02 / 0.1, rel=1e-12)


def test_slow_coordinates_move_less_far():
    moved = []
    for slow in ([], [0]):
        hyper = Hyperparameter(0.5, Interval(0, 1))
        HyperparameterDescent([hyper], adam, Coordinates([hyper], slow=slow)).step(
            torch.tensor([-1e6])
        )
        moved.append(hyper.plain.logit().item())
    assert moved == pytest.approx([0.2, 0.06], rel=1e-12)  # Adam's eps is 1e-14 of that


def test_the_descent_follows_the_chain_rule_through_both_coordinates():
    hypers = rate_and_momentum()
    coordinates = Coordinates(hypers, [(0, 1)], [1])
    raw = [value.requires_grad_() for value in coordinates.read()]
    hypergradient = torch.tensor([0.3, -0.2], dtype=torch.float64)
    # dE by each raw value, written out: lr = exp(u)(1 - mu), mu = sigmoid(0.3 v).
    lr, momentum = 0.02, 0.9
    slope = 0.3 * momentum * (1 - momentum)
    expected = [0.3 * lr, (-0.2 - 0.3 * lr / (1 - momentum)) * slope]
    descent = HyperparameterDescent(hypers, partial(torch.optim.SGD, lr=1.0), coordinates)
    descent.step(hypergradient)
    found = [(old - new).item() for old, new in zip(raw, descent.raw, strict=True)]
    assert found == pytest.approx(expected, rel=1e-10)  # differences of numbers near 1


def test_a_momentum_at_the_end_of_its_interval_leaves_the_rate_where_it_is():
    hypers = rate_and_momentum(momentum=0.0)
    descent = HyperparameterDescent(hypers, adam, Coordinates(hypers, [(0, 1)], [1]))
    descent.step(torch.zeros(2))
    assert hypers[0].item() == pytest.approx(0.02, rel=1e-12)
    assert 0 < hypers[1].item() < 0.002


def test_slopes_are_relative_changes():
    hypers = [
        Hyperparameter(0.02, Positive()),
        Hyperparameter(0.0, NonNegative()),
        Hyperparameter(0.9, Interval(0, 1)),
        Hyperparameter([-0.1, 5.0], Real()),
    ]
    expected = torch.tensor([0.02, 0.0, 0.09, 0.1, 1.0], dtype=torch.float64)
    torch.testing.assert_close(relative_slopes(hypers), expected, rtol=1e-7, atol=0)  # of float32


def test_the_jacobian_is_that_of_natural_by_raw_values():
    hypers = [*rate_and_momentum(), Hyperparameter([-0.1, 5.0], Real())]
    descent = HyperparameterDescent(hypers, adam, Coordinates(hypers, [(0, 1)], [1]))
    # Written out: lr = exp(u)(1 - mu), mu = sigmoid(0.3 v).
    lr, momentum = 0.02, 0.9
    slope = 0.3 * momentum * (1 - momentum)
    expected = torch.eye(4, dtype=torch.float64)
    expected[:2, :2] = torch.tensor([[lr, -lr / (1 - momentum) * slope], [0.0, slope]])
    # Raw values of the vector are float32.
    torch.testing.assert_close(descent.jacobian(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("rate", "momentum", "couplings"),
    [
        (Positive(), Interval(0, 1), [(0, 1)]),
        (NonNegative(), Interval(0.5, 0.99), [(0, 1)]),
        (Interval(1e-4, 1), Interval(0, 1), []),  # a rate over 1 - momentum may lie outside
        (Positive(), Interval(-0.5, 1), []),
        (Positive(), Real(), []),  # past 1 the rate would be negative
    ],
)
def test_what_would_leave_its_domain_is_not_coupled(rate, momentum, couplings):
    hypers = [Hyperparameter(0.5, rate), Hyperparameter(0.9, momentum)]
    weight = torch.zeros(2, requires_grad=True)
    sgd = DifferentiableOptimizer(torch.optim.SGD([weight], lr=hypers[0], momentum=hypers[1]))
    coordinates = decoupled_coordinates(hypers, [sgd])
    descent = HyperparameterDescent(hypers, partial(torch.optim.SGD, lr=1.0), coordinates)
    descent.step(torch.zeros(2))
    # Where nothing pulls, nothing moves.
    assert [hyper.item() for hyper in hypers] == pytest.approx([0.5, 0.9], rel=1e-6)
    assert coordinates._couplings == couplings
