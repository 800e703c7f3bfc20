"""Products with the joint Hessian against the dense Hessian."""

import pytest
import torch
from torch import nn

from lightning_rtho.linearization import Linearization, StatisticUpdate, TracedLoss

SHAPES = [(2, 3), (3,), (), (2,)]  # two weights, then a scalar and a vector hyperparameter
X = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)


def _loss(weight, bias, rho, example):
    hidden = torch.tanh(X @ weight + bias)
    errors = hidden.sum(1).square()
    return (errors[:2] * example).sum() + errors[2:].sum() + rho * (weight**3).sum()


def _statistic(weight, bias):
    return (X @ weight + bias).var(0)


def _split(flat):
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [part.reshape(shape) for part, shape in zip(flat.split(sizes), SHAPES, strict=True)]


def _point():
    """A point, its parts as leaves, and the dense Hessian there."""
    flat = torch.randn(sum(torch.Size(shape).numel() for shape in SHAPES))
    inputs = [part.clone().requires_grad_() for part in _split(flat)]
    hessian = torch.func.hessian(lambda z: _loss(*_split(z)))(flat)
    return flat, inputs, hessian


def _close(actual, expected):
    for part, exact in zip(actual, expected, strict=True):
        # Two routes to the same second derivative: rounding of some 50 terms.
        torch.testing.assert_close(part, exact, rtol=1e-12, atol=1e-13)


def test_gradients_are_detached_and_those_of_backward():
    _, inputs, _ = _point()
    line = Linearization(TracedLoss(_loss(*inputs)), inputs[:2], inputs[2:])
    _loss(*inputs).backward()
    assert all(torch.equal(g, w.grad) for g, w in zip(line.gradients, inputs[:2], strict=True))
    assert not any(g.requires_grad for g in line.gradients)


def test_product_is_that_of_the_dense_hessian_again_and_again():
    flat, inputs, hessian = _point()
    line = Linearization(TracedLoss(_loss(*inputs)), inputs[:2], inputs[2:])
    for _ in range(3):
        vector = torch.randn_like(flat)
        parts = _split(vector)
        product = line.product(parts[:2], parts[2:])
        _close([*product.params, *product.hypers], _split(hessian @ vector))
        assert product.statistics == []


@pytest.mark.parametrize("kept", range(4))
def test_none_is_a_zero_vector(kept):
    flat, inputs, hessian = _point()
    line = Linearization(TracedLoss(_loss(*inputs)), inputs[:2], inputs[2:])
    parts = [p if i == kept else None for i, p in enumerate(_split(torch.randn_like(flat)))]
    dense = torch.cat([
        torch.zeros(torch.Size(shape).numel()) if part is None else part.flatten()
        for part, shape in zip(parts, SHAPES, strict=True)
    ])
    product = line.product(parts[:2], parts[2:])
    found = [
        torch.zeros(shape) if part is None else part
        for part, shape in zip([*product.params, *product.hypers], SHAPES, strict=True)
    ]
    _close(found, _split(hessian @ dense))


@pytest.mark.parametrize("wrt", ["params", "hypers"])
def test_only_the_wanted_part_is_computed(wrt):
    flat, inputs, hessian = _point()
    line = Linearization(TracedLoss(_loss(*inputs)), inputs[:2], inputs[2:])
    vector = torch.randn_like(flat)
    parts, expected = _split(vector), _split(hessian @ vector)
    flags = {"wrt_params": wrt == "params", "wrt_hypers": wrt == "hypers"}
    product = line.product(parts[:2], parts[2:], **flags)
    if wrt == "params":
        _close(product.params, expected[:2])
        assert product.hypers == [None, None]
    else:
        _close(product.hypers, expected[2:])
        assert product.params == [None, None]


def test_statistics_are_differentiated_in_the_direction_of_the_vector():
    flat, inputs, hessian = _point()
    updates = (StatisticUpdate(0, 0.1, _statistic(*inputs[:2])),)
    line = Linearization(TracedLoss(_loss(*inputs), updates), inputs[:2], inputs[2:])
    vector = torch.randn_like(flat)
    parts = _split(vector)
    product = line.product(parts[:2], parts[2:])
    _, expected = torch.func.jvp(
        _statistic, tuple(t.detach() for t in inputs[:2]), tuple(parts[:2])
    )
    _close(product.statistics, [expected])
    _close([*product.params, *product.hypers], _split(hessian @ vector))


def test_cotangents_of_statistics_are_pulled_back_beside_the_product():
    flat, inputs, hessian = _point()
    updates = (StatisticUpdate(0, 0.1, _statistic(*inputs[:2])),)
    line = Linearization(TracedLoss(_loss(*inputs), updates), inputs[:2], inputs[2:])
    vector, cotangent = torch.randn_like(flat), torch.randn(3)
    parts = _split(vector)
    product = line.product(parts[:2], parts[2:], [cotangent])
    _, pull_back = torch.func.vjp(_statistic, *[t.detach() for t in inputs[:2]])
    expected = _split(hessian @ vector)
    for i, pulled in enumerate(pull_back(cotangent)):
        expected[i] = expected[i] + pulled
    _close([*product.params, *product.hypers], expected)


def test_a_cotangent_of_a_statistic_alone_gives_a_product():
    _, inputs, _ = _point()
    updates = (StatisticUpdate(0, 0.1, _statistic(*inputs[:2])),)
    line = Linearization(TracedLoss(_loss(*inputs), updates), inputs[:2], inputs[2:])
    cotangent = torch.randn(3)
    product = line.product([None, None], [None, None], [cotangent])
    _, pull_back = torch.func.vjp(_statistic, *[t.detach() for t in inputs[:2]])
    _close(product.params, pull_back(cotangent))


def test_a_statistic_that_does_not_depend_on_the_weights_has_no_derivative():
    w = torch.ones(2, requires_grad=True)
    updates = (StatisticUpdate(0, 0.1, torch.ones(2)),)
    line = Linearization(TracedLoss((w**2).sum(), updates), [w], [])
    assert line.product([torch.ones(2)], []).statistics == [None]
    # d/dw <grad, v> = 2 v, whatever the cotangent of a constant
    assert line.product([torch.ones(2)], [], [torch.ones(2)]).params[0].tolist() == [2.0, 2.0]


def test_unused_and_frozen_inputs_have_no_part():
    w, unused = (torch.ones(2, requires_grad=True) for _ in range(2))
    frozen, rho = torch.ones(2), torch.tensor(1.0, requires_grad=True)
    params = [w, unused, frozen]
    line = Linearization(TracedLoss((w**3 * frozen).sum()), params, [rho])
    assert line.gradients[1:] == [None, None]
    product = line.product([torch.ones(2)] * 3, [torch.tensor(1.0)])
    assert product.params[0].tolist() == [6.0, 6.0]
    assert product.params[1:] == [None, None]
    assert product.hypers == [None]


def test_a_linear_loss_has_no_second_derivative():
    w, rho = torch.ones(2, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    line = Linearization(TracedLoss(3 * w.sum()), [w], [rho])
    assert line.gradients[0].tolist() == [3.0, 3.0]
    assert line.product([torch.ones(2)], [torch.tensor(1.0)]) == ([None], [None], [])


def test_a_loss_linear_in_the_weights_still_has_a_mixed_derivative():
    w, rho = torch.ones(2, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    line = Linearization(TracedLoss(rho * w.sum()), [w], [rho])
    product = line.product([torch.tensor([1.0, 4.0])], [torch.tensor(3.0)])
    assert product.params[0].tolist() == [3.0, 3.0]
    assert product.hypers[0].item() == 5.0


@pytest.mark.parametrize("after", [torch.sum, lambda y: (y**2).sum()], ids=["linear", "curved"])
def test_an_operation_without_second_derivative_is_an_error_not_a_zero(after):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        Linearization(TracedLoss(after(Square.apply(w))), [w], [])


def test_double_backward_of_normalization_in_training_mode_is_exact():
    norm, x = nn.BatchNorm1d(3), torch.randn(5, 3)
    target = torch.randn(5, 3)
    w = torch.randn(3, requires_grad=True)

    def loss(w):
        return (torch.tanh(norm(torch.tanh(x * w))) - target).square().sum()

    def by_hand(w):
        h = torch.tanh(x * w)
        normal = (h - h.mean(0)) / (h.var(0, correction=0) + norm.eps).sqrt()
        return (torch.tanh(normal) - target).square().sum()

    v = torch.randn(3)
    product = Linearization(TracedLoss(loss(w)), [w], []).product([v], [])
    expected = torch.func.hessian(by_hand)(w.detach()) @ v
    # The quotient by the batch deviation costs some digits of the Hessian.
    torch.testing.assert_close(product.params[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("change", "holds"), [(1e-5, True), (1e-2, False)])
def test_a_kept_graph_may_round_otherwise_but_not_give_another_gradient(change, holds):
    """One entry in a hundred differs: as sums in any order do, or as weights that have moved."""
    factors = torch.ones(100, dtype=torch.float32)

    class Rescaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * factors

    w = torch.linspace(-1, 1, 100, dtype=torch.float32).requires_grad_()
    kept = Linearization(TracedLoss(Rescaled.apply(w).square().sum()), [w], [])
    assert kept.still_holds()
    factors = factors.clone()
    factors[0] += change
    assert kept.still_holds() == holds


def test_weights_that_statistics_alone_depend_on_have_no_gradient():
    own, other = (torch.ones(2, requires_grad=True) for _ in range(2))
    update = StatisticUpdate(0, 0.1, (own * other).square())
    line = Linearization(TracedLoss(own.square().sum(), (update,)), [own, other], [])
    assert line.gradients[1] is None
    assert line.gradients[0].tolist() == [2.0, 2.0]
    # s = (a b)^2, so ds/db = 2 a^2 b; the loss has no part in it.
    product = line.product([None, None], [], [torch.ones(2)])
    assert product.params[1].tolist() == [2.0, 2.0]
