"""Parameters taken through an update as one are taken through it as each by itself."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_rtho import Hyperparameter, Positive
from lightning_rtho.dynamics import Transition
from lightning_rtho.linearization import cohort_jvp, cohort_vjp, cohorts, step_jvp, step_vjp
from lightning_rtho.optim import DifferentiableOptimizer
from tests.dynamics.cases import CASES, Case

SHAPES = ((2, 3), (4,), (), (), (1, 2))
"""A scalar is shaped as counts are."""


def _transitions(case: Case, steps: int) -> list[Transition]:
    """The step after `steps` steps of several parameters, with the learning rate tuned."""
    torch.manual_seed(0)
    params = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    lr = Hyperparameter(case.keywords["lr"], Positive())
    case = replace(case, keywords={**case.keywords, "lr": lr})
    optimizer = DifferentiableOptimizer(case.optimizer(*params))
    for step in range(steps + 1):
        for param in params:
            param.grad = torch.sin(param.detach() + step)
        if step < steps:
            optimizer.step()
    return optimizer.transitions({id(lr): 0})


def _new_state(transition: Transition) -> dict[str, Tensor]:
    return transition.rule(transition.state, transition.grad, transition.hyper)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.endswith("decay-maximize")], ids=lambda c: c.name
)
def test_a_cohort_is_pulled_back_as_its_members(case: Case, steps: int) -> None:
    transitions = _transitions(case, steps)
    found = cohorts(transitions)
    assert steps or any(len(positions) > 2 for positions in found)
    for positions in found:
        members = [transitions[position] for position in positions]
        bars = [{k: torch.randn_like(x) for k, x in _new_state(t).items()} for t in members]
        if len(members) > 2:
            bars[0], bars[1] = {}, {"param": bars[1]["param"]}  # the rest is zero
        alone = [step_vjp(t, bar) for t, bar in zip(members, bars, strict=True)]
        state_bars, grad_bars, hyper_bar = cohort_vjp(members, bars)
        # The same operations, sums in another order.
        for name in members[0].state:
            parts = [
                torch.zeros_like(own[name]) if bar.get(name) is None else bar[name]
                for bar, (own, _, _) in zip(state_bars, alone, strict=True)
            ]
            expected = [own[name] for own, _, _ in alone]
            if name == "step":  # one for all
                parts, expected = [sum(parts)], [sum(expected)]
            torch.testing.assert_close(parts, expected)
        torch.testing.assert_close(grad_bars, [grad_bar for _, grad_bar, _ in alone])
        torch.testing.assert_close(hyper_bar["lr"], sum(hyper["lr"] for _, _, hyper in alone))


def test_a_buffer_that_the_next_step_has_and_this_one_does_not_make_is_left_out() -> None:
    (adam,) = (case for case in CASES if case.name == "Adam")
    transitions = _transitions(adam, 3)[:2]
    bars = [{k: torch.randn_like(x) for k, x in _new_state(t).items()} for t in transitions]
    more = [{**bar, "max_exp_avg_sq": torch.ones_like(bar["param"])} for bar in bars]
    torch.testing.assert_close(cohort_vjp(transitions, more), cohort_vjp(transitions, bars))


def test_large_parameters_are_no_cohort_and_small_ones_a_small_one_where_asked() -> None:
    (sgd,) = (case for case in CASES if case.name == "SGD")
    sizes = [2**15, 2**16, 2**15, 2**14]
    transitions = [
        replace(t, grad=torch.zeros(size))
        for t, size in zip(_transitions(sgd, 0), sizes, strict=False)
    ]
    assert cohorts(transitions) == [[0, 2, 3], [1]]
    assert cohorts(transitions, are_small=True) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name.endswith("decay-maximize")], ids=lambda c: c.name
)
def test_a_cohort_is_pushed_as_its_members(case: Case, steps: int) -> None:
    transitions = _transitions(case, steps)
    for positions in cohorts(transitions):
        members = [transitions[position] for position in positions]
        dots = [
            {
                k: torch.zeros(2).to(x) if k == "step" else torch.randn(2, *x.shape).to(x)
                for k, x in t.state.items()
            }
            for t in members
        ]
        grad_dots = [torch.randn(2, *t.grad.shape, dtype=torch.float64) for t in members]
        hyper_dot = {"lr": torch.randn(2, dtype=torch.float64)}
        expected = [
            step_jvp(t, dot, grad_dot, hyper_dot)
            for t, dot, grad_dot in zip(members, dots, grad_dots, strict=True)
        ]
        found = cohort_jvp(members, dots, grad_dots, hyper_dot, torch.tensor(False))
        torch.testing.assert_close(found, expected, check_dtype=False)  # of counts, which is 0
