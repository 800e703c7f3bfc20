"""The outer objective: a mean over batches, differentiated by everything it depends on."""

import pytest
import torch

from lightning_rtho.outer import NoGraphError, outer_gradient


def test_value_and_derivatives_are_means_over_the_batches():
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    rho = torch.tensor(0.5, requires_grad=True)
    running = torch.tensor([3.0], requires_grad=True)
    losses = [
        lambda: (w**2).sum(),
        lambda: rho * w.sum() + running.sum() ** 2,
        lambda: rho**2 * w.sum(),
    ]
    outer = outer_gradient(losses, [w], [rho], [running])
    # Each by hand; the divisions by 3 round.
    assert outer.value.item() == pytest.approx((5 + (1.5 + 9) + 0.75) / 3, rel=1e-15)
    assert outer.params[0].tolist() == pytest.approx([(2 + 0.75) / 3, (4 + 0.75) / 3], rel=1e-15)
    assert outer.hypers[0].item() == pytest.approx((3 + 3) / 3, rel=1e-15)
    assert outer.statistics[0].tolist() == pytest.approx([6 / 3], rel=1e-15)


def test_what_no_loss_depends_on_is_none():
    w, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    frozen, rho = torch.ones(2), torch.tensor(1.0, requires_grad=True)
    outer = outer_gradient([lambda: (w * frozen).sum()], [w, unused, frozen], [rho])
    assert outer.params[1:] == [None, None]
    assert outer.hypers == [None]
    assert outer.statistics == []


def test_nothing_is_accumulated_and_no_graph_is_kept():
    w = torch.ones(2, requires_grad=True)
    outer = outer_gradient([lambda: (w**2).sum()], [w], [])
    assert w.grad is None
    assert not outer.value.requires_grad
    assert not outer.params[0].requires_grad


def test_one_graph_is_held_at_a_time():
    w = torch.ones(2, requires_grad=True)
    previous = []

    def loss():
        for value in previous:
            with pytest.raises(RuntimeError, match="backward through the graph a second time"):
                torch.autograd.grad(value, w)
        value = (w**2).sum()
        previous.append(value)
        return value

    outer_gradient([loss, loss], [w], [])
    assert len(previous) == 2


@pytest.mark.parametrize(
    "loss",
    [
        lambda w: (w**2).sum().detach(),
        lambda w: torch.tensor(1.0),
        lambda w: (w > 0).float().mean(),
    ],
    ids=["detached", "constant", "accuracy"],
)
def test_a_loss_without_a_graph_is_refused(loss):
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(NoGraphError, match="does not depend on the weights"):
        outer_gradient([lambda: (w**2).sum(), lambda: loss(w)], [w], [])


def test_the_value_follows_the_dtype_of_the_loss():
    w = torch.ones(2, requires_grad=True, dtype=torch.float32)
    assert outer_gradient([lambda: w.sum()], [w], []).value.dtype is torch.float32


def _half_precision_loss(size):
    w = torch.ones(4, dtype=torch.float32, requires_grad=True)

    def loss():
        return size * w.half().float().sum()  # as autocast sends weights, and gradients back

    return w, loss


@pytest.mark.parametrize(
    ("size", "scale"),
    [
        (1e-9, 2.0**16),  # which would be 0 in float16
        (1e3, 2.0**16),  # which would be infinite with the scale
    ],
)
def test_small_gradients_in_half_precision_are_kept_by_a_scale(size, scale):
    w, loss = _half_precision_loss(size)
    outer = outer_gradient([loss], [w], [], scale=scale)
    # float16 has 11 bits; 6.6e-5 is its smallest number with all of them.
    assert outer.params[0].tolist() == pytest.approx([size] * 4, rel=2**-10)
