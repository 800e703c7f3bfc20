"""When learning rates move farther than others."""

import math

import pytest
import torch

from lightning_rtho.outer import Ramp


@pytest.mark.parametrize("value", [2.0, -2.0, 2e-9])
def test_a_hundredth_of_the_objective_is_where_it_ends(value):
    assert Ramp().stretch(0.009 * abs(value), value) == 5.0
    assert Ramp().stretch(0.011 * abs(value), value) == 1.0


@pytest.mark.parametrize(("change", "value"), [(math.nan, 1.0), (0.0, 0.0), (0.0, math.nan)])
def test_where_nothing_is_known_of_the_change_steps_are_ordinary(change, value):
    assert Ramp().stretch(change, value) == 1.0


def test_it_ends_once():
    ramp = Ramp()
    assert [ramp.stretch(change, 1.0) for change in (0.0, 0.5, 0.0)] == [5.0, 1.0, 1.0]
    other = Ramp()
    other.load_state_dict(ramp.state_dict())
    assert other.stretch(0.0, 1.0) == 1.0


# The climb


def climbed(ramp: Ramp, changes: list[float], value: float = 1.0) -> list[float]:
    return [ramp.climb(change, value) for change in changes]


@pytest.mark.parametrize(
    ("updates", "climbs"), [(0, 0), (3, 0), (4, 1), (50.9, 12), (1000, 20), (math.inf, 20)]
)
def test_a_climb_takes_a_quarter_of_the_run_and_at_most_twenty_updates(updates, climbs):
    ramp, counted = Ramp(updates), 0
    while ramp.is_climbing:
        ramp.climb(0.5, 1.0)
        counted += 1
    assert counted == climbs


@pytest.mark.parametrize("slope", [100.0, -30.0])
def test_one_update_leads_to_where_the_objective_changes_by_a_hundredth(slope):
    """On an objective that is linear in the rate, with derivatives by autograd."""
    raw = torch.tensor(1e-6, dtype=torch.float64).log().requires_grad_()
    objective = 2.0 + slope * raw.exp()
    (gradient,) = torch.autograd.grad(objective, raw)
    way = Ramp(updates=4).climb(gradient.abs().item(), objective.item())
    reached = 2.0 + slope * (raw + way).exp()
    # That the line begins at E(1e-6) and not at 2 counts for slope * 1e-6 / 2 of it.
    assert abs(reached.item() - 2.0) == pytest.approx(0.01 * 2.0, rel=0.01)


def test_rates_that_do_something_go_up_by_a_factor_of_e():
    assert climbed(Ramp(updates=12), [0.0099, 0.5, 7.0]) == [1.0] * 3


def test_no_update_leads_higher_than_ten_such_factors():
    assert climbed(Ramp(updates=4), [1e-30]) == [10.0]


@pytest.mark.parametrize(
    ("change", "value"), [(math.nan, 1.0), (0.0, 1.0), (0.0, 0.0), (1.0, math.inf)]
)
def test_where_nothing_is_known_of_the_change_a_climb_goes_on_by_e(change, value):
    assert Ramp(updates=4).climb(change, value) == 1.0


def test_after_a_climb_that_was_ended_steps_are_ordinary():
    ramp = Ramp(updates=50)
    ramp.climb(0.5, 1.0)
    ramp.end_climb()
    assert not ramp.is_climbing
    assert ramp.stretch(0.0, 1.0) == 1.0


def test_a_climb_that_is_resumed_goes_on_as_it_was():
    ramp, other = Ramp(updates=50), Ramp(updates=49)
    ramp.climb(0.5, 1.0)
    other.load_state_dict(ramp.state_dict())
    assert other.climbs == 11
    assert other.has_climbed


def test_a_climb_is_not_resumed_where_the_run_cannot_be_taken_back():
    ramp, other = Ramp(updates=50), Ramp()
    ramp.climb(0.5, 1.0)
    other.load_state_dict(ramp.state_dict())
    assert not other.is_climbing
