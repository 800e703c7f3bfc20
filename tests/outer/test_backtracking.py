"""When a run counts as lost."""

import math

import pytest

from lightning_rtho.outer import Backtracking


def begun(start: float) -> Backtracking:
    """A run that is on no trial."""
    backtracking = Backtracking()
    backtracking.begin(start, on_trial=False)
    return backtracking


def on_trial(start: float) -> Backtracking:
    backtracking = Backtracking()
    backtracking.begin(start)
    return backtracking


@pytest.mark.parametrize("start", [2.0, -2.0])
def test_a_rise_of_more_than_a_twentieth_above_the_start_is_suspect(start):
    judge = begun(start)
    assert not judge.suspects(start + 0.09, distance=0)
    assert judge.suspects(start + 0.11, distance=0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_suspect_and_the_data_decide(value):
    judge = begun(2.0)
    assert judge.suspects(value, distance=math.nan)
    assert judge.confirms(value, best=2.0, distance=math.nan)
    assert not judge.confirms(value, best=value, distance=math.nan)


def test_a_noisy_batch_that_is_bad_for_the_best_state_too_is_not_held_against_the_run():
    assert begun(2.0).suspects(3.0, distance=0.5)
    assert not begun(2.0).confirms(3.0, best=3.0, distance=0.5)


@pytest.mark.parametrize(
    ("distance", "value", "lost"),
    [
        (1.9, 1.9, False),
        (2.1, 1.7, True),
        (2.1, 1.5, False),
        (6.0, 1.1, True),  # 2 * 0.8 ** 3 = 1.02
        (6.0, 1.0, False),
    ],
)
def test_weights_have_to_gain_a_fifth_for_every_two_lengths(distance, value, lost):
    assert begun(2.0).suspects(value, distance) == lost
    assert begun(9.0).confirms(value, best=2.0, distance=distance) == lost


@pytest.mark.parametrize(
    ("sensitivity", "value", "is_too_fast"),
    [
        (0.9, 1.9, False),
        (1.1, 1.7, True),
        (1.1, 1.5, False),
        (3.0, 1.1, True),  # 2 * 0.8 ** 3 = 1.02
        (3.0, 1.0, False),
        (math.nan, 1.9, False),
    ],
)
def test_on_trial_a_fifth_is_to_be_gained_for_every_length(sensitivity, value, is_too_fast):
    judge = on_trial(2.0)
    assert judge.sets_out_too_fast(value, sensitivity) == is_too_fast
    assert judge.suspects(value, distance=sensitivity) == is_too_fast
    assert judge.confirms(value, best=2.0, distance=sensitivity) == is_too_fast
    assert not begun(2.0).sets_out_too_fast(value, sensitivity)


def test_a_run_is_on_trial_for_ten_updates_and_keeps_its_start_meanwhile():
    judge = on_trial(2.0)
    for _ in range(6):
        judge.go_on()
    judge.begin_again()
    for _ in range(10):
        assert judge.sets_out_too_fast(1.9, sensitivity=3.0)
        assert not judge.is_worth_keeping(1.0)
        judge.go_on()
    judge.begin_again()  # it is over
    assert not judge.sets_out_too_fast(1.9, sensitivity=3.0)
    assert judge.is_worth_keeping(1.0)


def test_a_judge_that_is_resumed_goes_on_as_it_was():
    judge, other = on_trial(2.0), Backtracking()
    judge.go_on()
    other.load_state_dict(judge.state_dict())
    assert vars(other) == vars(judge)


def test_a_run_begins_where_its_objective_is_finite():
    judge = begun(math.inf)
    assert not judge.has_begun
    judge.begin(1.0)
    assert judge.has_begun


def test_few_states_are_kept_while_the_objective_falls():
    judge, value, kept = begun(1.0), 1.0, 0
    while value > 0.01:
        value *= 0.999
        if judge.is_worth_keeping(value):
            judge.best, kept = value, kept + 1
    assert 80 <= kept <= 90  # ln 0.01 / ln 0.95


def test_state_is_taken_over():
    judge, other = begun(2.0), Backtracking()
    judge.best = 1.0
    other.load_state_dict(judge.state_dict())
    assert (other.start, other.best) == (2.0, 1.0)
