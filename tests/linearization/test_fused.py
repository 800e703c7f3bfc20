"""The compiled derivatives equal the plain ones, write in place, and do without a compiler."""

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, optim
from torch._dynamo.utils import counters

from lightning_rtho.linearization import (
    _fused,
    fused_step_jvp,
    fused_step_vjp,
    step_jvp,
    step_vjp,
)
from tests.dynamics.cases import CASES, Case, warm_transition

SIZE = _fused._LARGE
CLASSES = (optim.SGD, optim.AdamW, optim.RAdam, optim.ASGD)
"""Of one buffer, of several, with branches, with scalar buffers: compiling each takes seconds."""

ONE_A_RULE = [{case.optimizer_class: case for case in CASES}[found] for found in CLASSES]
"""The last variant of each class, with weight decay and `maximize`."""


def _inputs(case: Case, steps: int, m: int = 2):
    transition = warm_transition(
        case, steps, torch.randn(2, SIZE // 2), lambda param, step: torch.sin(param + step)
    )
    state_dot = {name: torch.randn(m, *t.shape) for name, t in transition.state.items()}
    hyper_dot = {name: torch.randn(m, dtype=torch.float64) for name in transition.columns}
    return transition, state_dot, torch.randn(m, *transition.grad.shape), hyper_dot


def _clone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
@pytest.mark.parametrize("case", ONE_A_RULE, ids=lambda case: case.name)
def test_fused_equals_plain_and_keeps_what_it_shall_keep(case):
    for steps in (0, 3):
        transition, state_dot, grad_dot, hyper_dot = _inputs(case, steps)
        expected = step_jvp(transition, state_dot, grad_dot, hyper_dot)
        kept = fused_step_jvp(
            transition, _clone(state_dot), grad_dot, hyper_dot, keep=torch.tensor(True)
        )
        for name, value in kept.items():
            assert torch.equal(value, state_dot.get(name, torch.zeros_like(value)))
        overwritten = _clone(state_dot)
        found = fused_step_jvp(
            transition, overwritten, grad_dot, hyper_dot, keep=torch.tensor(False)
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            # The same operations; a compiler may contract a product and a sum into one rounding.
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
        assert found["param"].data_ptr() == overwritten["param"].data_ptr()


def test_tangents_may_lie_in_another_order():
    transition, state_dot, grad_dot, hyper_dot = _inputs(ONE_A_RULE[0], 3)
    expected = step_jvp(transition, state_dot, grad_dot, hyper_dot)

    def turned(x):
        return x.mT.contiguous().mT if x.dim() > 2 else x.clone()

    found = fused_step_jvp(
        transition,
        {name: turned(value) for name, value in state_dot.items()},
        turned(grad_dot),
        hyper_dot,
        keep=torch.tensor(False),
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
@pytest.mark.parametrize("case", ONE_A_RULE, ids=lambda case: case.name)
def test_fused_pulls_back_as_the_plain_one_does(case):
    warm, state_dot, _, _ = _inputs(case, 3)
    full = {name: torch.randn_like(x[0]) for name, x in state_dot.items()}
    used = torch.full((warm.grad.numel(),), math.nan, dtype=warm.grad.dtype)
    for new_state_bar, memory in ((full, None), ({"param": full["param"]}, used)):
        transition = replace(warm, state=_clone(warm.state))
        expected = step_vjp(transition, new_state_bar)
        overwritten = _clone(new_state_bar)
        found = fused_step_vjp(transition, overwritten, memory)
        assert memory is None or found[1].data_ptr() == memory.data_ptr()
        for name, value in found[0].items():
            if value.dim() > 0:  # in the place of what is not needed any more
                place = overwritten if name == "param" else transition.state
                assert value.data_ptr() == place[name].data_ptr()
        # The same operations, sums over all entries in another order.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
def test_cotangent_of_weights_on_which_nothing_depends_is_zero():
    transition, _, _, _ = _inputs(CASES[0], 3)  # as of an auxiliary head
    state_bar, grad_bar, hyper_bar = fused_step_vjp(transition, {})
    assert state_bar.keys() == transition.state.keys()
    for value in (*state_bar.values(), grad_bar, *hyper_bar.values()):
        assert not value.any()


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
def test_where_tensors_begin_in_their_memory_is_nothing_to_compile_anew():
    transition = _inputs(ONE_A_RULE[0], 3)[0]
    bar = {name: torch.randn_like(value) for name, value in transition.state.items()}
    expected = step_vjp(transition, bar)[0]
    compiled = []
    for offset in (8, 1, 0, SIZE):
        placed = replace(transition, state=_placed(transition.state, offset))
        given = _placed(bar, offset // 2)
        found = fused_step_vjp(placed, given)[0]
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)  # as above
        assert found["param"].data_ptr() == given["param"].data_ptr()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled == [compiled[0]] * 4


def _placed(state: dict[str, Tensor], offset: int) -> dict[str, Tensor]:
    """Copy tensors into memories in which they begin somewhere."""
    placed = {}
    for number, (name, value) in enumerate(state.items()):
        memory = torch.empty(offset * (number + 1) + value.numel())
        piece = memory[offset * (number + 1) :].view(value.shape)
        placed[name] = piece.copy_(value) if value.dim() > 0 else value
    return placed


def test_lack_of_memory_is_not_taken_for_a_missing_compiler(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        _fused._Compiled(torch.neg)(torch.ones(2))


@pytest.mark.filterwarnings("error:The derivatives of the optimizer's update")
def test_a_process_may_meet_many_rules_and_sets_of_settings():
    add = _fused._Compiled(lambda state: sum(state.values()))
    for count in range(1, 12):  # torch gives up after 8 versions unless told otherwise
        state = {str(i): torch.full((4,), float(i)) for i in range(count)}
        assert add(state)[0] == count * (count - 1) / 2


def test_without_a_compiler_it_runs_plainly_and_says_so_once(monkeypatch):
    def missing(*args, **kwargs):
        raise RuntimeError("no compiler found")

    monkeypatch.setattr(torch, "compile", missing)
    monkeypatch.setattr(_fused, "_write_jvp", _fused._Compiled(_fused._write_jvp._function))
    transition, state_dot, grad_dot, hyper_dot = _inputs(CASES[0], 3)
    expected = step_jvp(transition, state_dot, grad_dot, hyper_dot)

    def push():
        return fused_step_jvp(
            transition, _clone(state_dot), grad_dot, hyper_dot, keep=torch.tensor(False)
        )

    with pytest.warns(UserWarning, match="no compiler found"):
        first = push()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = push()
    for name, value in expected.items():
        # As small tensors are pushed, but in another order.
        torch.testing.assert_close(first[name], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(second[name], value, rtol=1e-12, atol=1e-14)
