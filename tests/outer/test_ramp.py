"""When learning rates move farther than others."""

import math

import pytest

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
