"""A tape leaves weights, graphs and autograd as it found them."""

import gc

import pytest
import torch
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.graph import GradientEdge

from lightning_rtho.hypergradient import (
    GradientMismatchError,
    KeepGraph,
    OptimizerStep,
    ReverseHypergradient,
)
from lightning_rtho.hypergradient._arena import Arena
from lightning_rtho.hypergradient._saved import SavedWeights
from lightning_rtho.linearization import TracedLoss, _fused, _gradient
from tests.helpers import METHODS, Run, hyperparameters, watch_graph

TAPES = [name for name in METHODS if name != "forward"]


class Interrupted(Exception):
    """What a replay raises."""


def _run(tape, steps, replay=None, watch=lambda value: None):
    hypers = hyperparameters({"lr": 0.1, "rho": 0.5})
    w = torch.randn(4, requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=hypers["lr"], momentum=0.9), hypers, METHODS[tape])

    def loss():
        value = hypers["rho"] * (w.tanh() ** 4).sum()
        watch(value)
        return value

    for _ in range(steps):
        run.step(loss, replays=[replay or loss])
    return run, w, loss


def _plain_autograd_watches_its_saved_tensors() -> bool:
    """Whether an in-place write to what a graph has saved is refused, as torch does by itself."""
    w = torch.ones(2, requires_grad=True)
    value = (w**2).sum()
    with torch.no_grad():
        w.add_(1)
    try:
        value.backward()
    except RuntimeError as error:
        return "modified by an inplace operation" in str(error)
    return False


@pytest.mark.parametrize("tape", TAPES)
def test_weights_and_optimizer_state_are_bitwise_what_they_were(tape):
    run, w, _ = _run(tape, steps=3)
    velocity = run.optimizer.state[w]["momentum_buffer"]
    before, address = (w.detach().clone(), velocity.clone()), w.data_ptr()
    run.hypergradient(lambda: w.sum())
    assert torch.equal(w, before[0])
    assert torch.equal(velocity, before[1])
    assert w.data_ptr() == address


@pytest.mark.parametrize("tape", ["recompute", "offload"])
def test_weights_are_restored_when_a_replay_raises(tape):
    def interrupt():
        raise Interrupted

    run, w, _ = _run(tape, steps=3, replay=interrupt)
    before = w.detach().clone()
    with pytest.raises(Interrupted):
        run.hypergradient(lambda: w.sum())
    assert torch.equal(w, before)


@pytest.mark.parametrize("tape", TAPES)
def test_training_is_bitwise_plain_training(tape):
    run, w, _ = _run(tape, steps=5)
    run.method.reset()
    torch.manual_seed(0)
    followed = w.detach().clone()
    plain = torch.randn(4, requires_grad=True)
    optimizer = torch.optim.SGD([plain], lr=0.1, momentum=0.9)
    for _ in range(5):
        optimizer.zero_grad()
        (0.5 * (plain.tanh() ** 4).sum()).backward()
        optimizer.step()
    assert torch.equal(followed, plain)


@pytest.mark.parametrize("end", ["step", "reset", "clear"])
def test_a_kept_tape_suspends_the_check_of_saved_tensors_for_forward_passes_alone(end):
    run, _, loss = _run("keep-graph", steps=2)
    assert _plain_autograd_watches_its_saved_tensors()
    run.method.start()
    assert not _plain_autograd_watches_its_saved_tensors()
    if end == "step":
        run.step(loss)
    elif end == "reset":
        run.method.reset()
    else:
        run.method.tape.clear()
    assert _plain_autograd_watches_its_saved_tensors()


def test_kept_graphs_read_what_was_overwritten_since():
    w, table = torch.tensor([2.0], requires_grad=True), torch.tensor([3.0])
    saved = SavedWeights([w], [table])
    with saved.hooks():
        value = (table * w**3).sum()
        (gradient,) = torch.autograd.grad(value, w, create_graph=True)
    (copied,) = saved.copy([w], Arena(w.device, saved.size()))
    with torch.no_grad():
        w.fill_(100.0)
        table.fill_(100.0)
    assert copied.item() == 2.0
    (curvature,) = torch.autograd.grad(gradient, w)
    assert curvature.item() == 3 * 6 * 2  # d^2/dw^2 of 3 w^3


def test_a_kept_graph_refuses_other_tensors_that_were_overwritten():
    w, noise = torch.ones(2, requires_grad=True), torch.ones(2)
    with SavedWeights([w], []).hooks():
        value = (noise * w).sum()
    noise.add_(1)
    with pytest.raises(RuntimeError, match="overwritten later in the window"):
        value.backward()


def test_a_kept_tape_may_be_cleared_before_it_was_ever_started():
    KeepGraph().clear()
    assert _plain_autograd_watches_its_saved_tensors()


def test_a_tape_is_emptied_when_a_method_takes_it_over():
    run, w, _ = _run("keep-graph", steps=2)
    run.method = ReverseHypergradient([w], run.hypers, run.method.tape)
    assert _plain_autograd_watches_its_saved_tensors()
    assert run.hypergradient(lambda: w.sum()).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("tape", "kept"), [("recompute", False), ("offload", False), ("keep-graph", True)]
)
def test_graphs_are_held_by_the_kept_tape_alone_and_no_longer_than_its_window(tape, kept):
    graphs = []
    gc.collect()
    gc.disable()  # whatever only the collector would find counts as leaked
    try:
        run, w, _ = _run(tape, steps=4, watch=lambda value: graphs.append(watch_graph(value)))
        assert [is_alive() for is_alive in graphs] == [kept] * 4
        run.hypergradient(lambda: w.sum())
        assert not any(is_alive() for is_alive in graphs)
    finally:
        gc.enable()


def _held(size):
    """Live memory of tensors in units of `size` bytes, each byte counted once; small ones left out.

    A memory may be a part of another, where a tensor was made of an address.
    """
    kinds = (torch.Tensor, torch.nn.Parameter)
    tensors = [
        x for x in gc.get_objects() if type(x) in kinds and not is_functorch_wrapped_tensor(x)
    ]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    held, end = 0, 0
    for start, nbytes in sorted(storages.items()):
        if nbytes >= size:
            held += max(0, start + nbytes - max(start, end))
            end = max(end, start + nbytes)
    return held / size


@pytest.mark.parametrize("tape", ["recompute", "offload"])
def test_while_a_window_is_read_nothing_is_held_twice(tape, monkeypatch):
    gc.collect()
    size = 8 * _fused._LARGE
    before = _held(size)  # by other tests
    hypers = hyperparameters({"lr": 0.1})
    w = torch.randn(_fused._LARGE, requires_grad=True)
    run = Run(torch.optim.SGD([w], lr=hypers["lr"], momentum=0.9), hypers, METHODS[tape])
    for _ in range(3):
        run.step(lambda: (w**3).sum())
    held, gradients = [], _gradient._gradients

    def watched(outputs, *args, **kwargs):
        if isinstance(outputs[0], GradientEdge):  # a product, when there is most to hold
            held.append(_held(size) - before)
        return gradients(outputs, *args, **kwargs)

    monkeypatch.setattr(_gradient, "_gradients", watched)
    run.hypergradient(lambda: (w**2).sum())
    # Weights and velocity now and of each step, the gradient, and the cotangents of weights and
    # gradient; the velocity's lies in the place of a velocity, the present weights in that of past.
    assert held == [2 + 2 * 3 + 1 + 2] * 3


def test_a_kept_tape_refuses_gradients_that_were_written_to_after_their_step():
    run, w, loss = _run("keep-graph", steps=0)
    method = run.method
    method.start()
    (gradient,) = method.record(TracedLoss(loss()), None)
    w.grad = gradient
    method.advance(
        OptimizerStep(run.optimizer.transitions(run.columns), [gradient], is_traced=True)
    )
    run.optimizer.step()
    w.grad.zero_()  # as `zero_grad(set_to_none=False)` does
    with pytest.raises(GradientMismatchError, match="written to after"):
        run.hypergradient(lambda: w.sum())


@pytest.mark.parametrize("tape", TAPES)
def test_memory_for_copies_is_kept_between_windows_and_let_go_of_at_the_end(tape):
    run, w, _ = _run(tape, steps=3)
    run.hypergradient(lambda: w.sum())
    free = run.method.tape._arenas._free
    assert len(free) == 3
    run.method.reset()
    assert run.method.tape._arenas._free == []
