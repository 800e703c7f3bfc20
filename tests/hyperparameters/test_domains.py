"""Domains: where values may lie, and the coordinates in which they move."""

import math
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_rtho import Domain, Interval, NonNegative, Positive, Real

DOMAINS = [Real(), Positive(), NonNegative(), Interval(0, 1), Interval(-3.0, 5.0)]
each_domain = pytest.mark.parametrize("domain", DOMAINS, ids=str)


def _tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _round_trip(domain: Domain, value: float) -> float:
    return domain.from_raw(domain.to_raw(_tensor(value))).item()


@given(st.floats(-1e300, 1e300))
def test_real_is_its_own_coordinate(value: float) -> None:
    assert _round_trip(Real(), value) == value


@given(st.floats(1e-300, 1e300))
def test_positive_comes_back_from_log_space(value: float) -> None:
    # exp turns the rounding of |log| < 700 into a relative error of 700 units.
    assert _round_trip(Positive(), value) == pytest.approx(value, rel=1e-12)


@given(st.one_of(st.floats(0, 1e-5), st.floats(0, 1e100)))
def test_non_negative_comes_back(value: float) -> None:
    # As above; below the unit, 1e-6, the coordinate is linear and rounds like the value.
    assert _round_trip(NonNegative(), value) == pytest.approx(value, rel=1e-12, abs=1e-300)


@given(st.floats(1e-5, 1 - 1e-5), st.floats(-100, 100), st.floats(0.1, 100))
def test_interval_comes_back(fraction: float, low: float, width: float) -> None:
    domain = Interval(low, low + width)
    value = low + fraction * width
    # Roundings of a few units of the larger end.
    assert _round_trip(domain, value) == pytest.approx(value, rel=1e-13, abs=1e-13 * (100 + width))


@each_domain
@given(raw=st.floats(-1e3, 1e3))
def test_projected_raw_values_map_into_the_domain(domain: Domain, raw: float) -> None:
    for dtype in (torch.float64, torch.float32):
        projected = domain.project(torch.tensor(raw, dtype=dtype))
        value = domain.from_raw(projected)
        assert domain.contains(value).all()
        assert domain.project(projected).equal(projected)


@given(st.floats(-1e3, 1e3))
def test_interval_never_reaches_its_ends(raw: float) -> None:
    for dtype in (torch.float64, torch.float32):
        value = Interval(0, 1).from_raw(Interval(0, 1).project(torch.tensor(raw, dtype=dtype)))
        assert 0 < value.item() < 1


@each_domain
def test_projection_leaves_raw_values_of_the_domain_alone(domain: Domain) -> None:
    raw = domain.to_raw(_tensor(0.001, 0.5, 0.9))
    assert domain.project(raw).equal(raw)


@each_domain
def test_derivative_of_the_coordinate_equals_finite_differences(domain: Domain) -> None:
    raw = domain.to_raw(_tensor(1e-3, 0.3, 0.99)).requires_grad_()
    slope = torch.autograd.grad(domain.from_raw(raw).sum(), raw)[0]
    h = 1e-5
    difference = (domain.from_raw(raw + h) - domain.from_raw(raw - h)).detach() / (2 * h)
    # Truncation h^2 / 6 and rounding 1e-16 / h, relative to slopes of 1e-3 and more.
    torch.testing.assert_close(slope, difference, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("domain", "slope"),
    [
        (Real(), lambda v: 1.0),
        (Positive(), lambda v: v),
        (NonNegative(), lambda v: math.hypot(v, 1e-6)),
        (Interval(0, 1), lambda v: v * (1 - v)),
        (Interval(-3.0, 5.0), lambda v: (v + 3) * (5 - v) / 8),
    ],
    ids=lambda argument: str(argument) if isinstance(argument, Domain) else "",
)
@pytest.mark.parametrize("value", [1e-6, 1e-3, 0.5, 0.999])
def test_derivative_of_the_coordinate_is_its_closed_form(domain, slope, value: float) -> None:
    raw = domain.to_raw(_tensor(value)).requires_grad_()
    [derivative] = torch.autograd.grad(domain.from_raw(raw).sum(), raw)
    # The roundings of a logarithm near -14, magnified by the exponential.
    assert derivative.item() == pytest.approx(slope(value), rel=1e-10)


@each_domain
def test_nothing_contains_what_is_no_finite_number(domain: Domain) -> None:
    assert not domain.contains(_tensor(math.nan, math.inf, -math.inf)).any()


@pytest.mark.parametrize(
    ("domain", "inside", "outside"),
    [
        (Real(), [-1e300, 0.0, 1e300], []),
        (Positive(), [1e-300, 1.0, 1e300], [0.0, -0.0, -1e-300, -1.0]),
        (NonNegative(), [0.0, -0.0, 1e-300, 1e300], [-1e-300, -1.0]),
        (Interval(0, 1), [0.0, 0.5, 1.0], [-1e-9, 1 + 1e-9]),
        (Interval(-3.0, 5.0), [-3.0, 0.0, 5.0], [-3.001, 5.001]),
    ],
    ids=str,
)
def test_ends_belong_to_a_domain_as_its_name_says(domain, inside, outside) -> None:
    assert domain.contains(_tensor(*inside)).all()
    assert not domain.contains(_tensor(*outside)).any()


@pytest.mark.parametrize("domain", [Interval(0, 1), Interval(-3.0, 5.0)], ids=str)
def test_value_at_an_end_sets_out_a_thousandth_of_the_width_inside(domain: Interval) -> None:
    width = domain.high - domain.low
    raw = domain.to_raw(_tensor(domain.low, domain.high))
    expected = _tensor(domain.low + 1e-3 * width, domain.high - 1e-3 * width)
    # Roundings of a logit and a sigmoid.
    torch.testing.assert_close(domain.from_raw(raw), expected, rtol=1e-13, atol=1e-13)
    assert domain.project(raw).equal(raw)


def test_zero_is_an_ordinary_point_of_the_non_negative_numbers() -> None:
    domain = NonNegative()
    raw = domain.to_raw(_tensor(0.0)).requires_grad_()
    assert raw.item() == 0
    value = domain.from_raw(raw)
    assert value.item() == 0
    assert torch.autograd.grad(value.sum(), raw)[0].item() == 1e-6  # cosh(0) = 1
    assert domain.from_raw(domain.project(_tensor(-5.0))).item() == 0


def test_step_in_a_non_negative_coordinate_is_relative_above_the_unit() -> None:
    domain = NonNegative()
    for value in (1e-4, 1.0, 100.0):
        stepped = domain.from_raw(domain.to_raw(_tensor(value)) + 0.1).item()
        # sinh is exp / 2 but for (1e-6 / value)^2.
        assert stepped / value == pytest.approx(math.exp(0.1), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 2)], ids=str)
@each_domain
def test_maps_keep_dtype_and_shape(domain: Domain, dtype: torch.dtype, shape) -> None:
    value = torch.full(shape, 0.5, dtype=dtype)
    for tensor in (domain.to_raw(value), domain.from_raw(value), domain.project(value)):
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
    assert domain.contains(value).dtype is torch.bool


@pytest.mark.parametrize(
    ("low", "high"),
    [(1, 0), (0.5, 0.5), (0, math.inf), (-math.inf, 0), (math.nan, 1), (0, math.nan)],
)
def test_interval_that_is_none_is_refused_with_its_ends(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="`low` must be below `high`") as refusal:
        Interval(low, high)
    assert f"low={low}" in str(refusal.value)
    assert f"high={high}" in str(refusal.value)


@each_domain
def test_domains_are_values(domain: Domain) -> None:
    copied = pickle.loads(pickle.dumps(domain))
    assert copied == domain
    assert hash(copied) == hash(domain)
    assert eval(repr(domain)) == domain


def test_domain_itself_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Domain()
