"""Functions with a defined derivative at their singular points."""

import pytest
import torch

from lightning_rtho._numerics import sqrt_zero_slope

VALUES = [0.0, 5e-324, 1e-300, 1e-16, 0.25, 2.0, 1e300]


def test_root_equals_torch_everywhere() -> None:
    x = torch.tensor(VALUES)
    assert sqrt_zero_slope(x).equal(x.sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_root_keeps_dtype_and_shape(dtype: torch.dtype) -> None:
    for shape in ((), (2, 3), (0,)):
        root = sqrt_zero_slope(torch.ones(shape, dtype=dtype))
        assert (root.dtype, root.shape) == (dtype, shape)


def test_slope_is_that_of_the_root_above_zero_and_zero_at_zero() -> None:
    x = torch.tensor([0.0, 1e-16, 0.25, 2.0], requires_grad=True)
    slope = torch.autograd.grad(sqrt_zero_slope(x).sum(), x)[0]
    expected = torch.tensor([0.0, 5e7, 1.0, 0.5 / 2**0.5])
    torch.testing.assert_close(slope, expected, rtol=1e-15, atol=0)  # one rounding


def test_both_modes_agree_on_the_slope() -> None:
    x = torch.tensor([0.0, 1e-16, 0.25, 2.0])
    forward = torch.func.jacfwd(sqrt_zero_slope)(x)
    reverse = torch.func.jacrev(sqrt_zero_slope)(x)
    torch.testing.assert_close(forward, reverse, rtol=1e-15, atol=0)  # one rounding


def test_second_derivative_is_finite_at_zero() -> None:
    x = torch.zeros(2, requires_grad=True)
    slope = torch.autograd.grad(sqrt_zero_slope(x).sum(), x, create_graph=True)[0]
    assert torch.autograd.grad(slope.sum(), x)[0].tolist() == [0.0, 0.0]


def test_tangent_of_a_quotient_with_vanishing_numerator_is_one_over_eps() -> None:
    quotient = lambda mean: mean / (sqrt_zero_slope(mean * mean) + 1e-8)
    at_zero, direction = torch.zeros(2), torch.tensor([1.0, -3.0])
    tangent = torch.func.jvp(quotient, (at_zero,), (direction,))[1]
    torch.testing.assert_close(tangent, direction / 1e-8, rtol=1e-15, atol=0)  # one rounding
