"""A hyperparameter stands where a number stood."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_rtho import Hyperparameter, Interval, NonNegative, Positive, Real
from lightning_rtho.dynamics import rule_class_for

LOW_TO_HIGH = [torch.bfloat16, torch.float32, torch.float64]


def _bits(value: Any) -> tuple[torch.dtype, torch.Size, bytes]:
    """Everything that could differ between two tensors."""
    plain = value.detach().as_subclass(Tensor).contiguous()
    return (
        plain.dtype,
        plain.shape,
        plain.view(torch.uint8).numpy().tobytes()
        if plain.dim()
        else (plain.reshape(1).view(torch.uint8).numpy().tobytes()),
    )


# Construction


@pytest.mark.parametrize(
    ("value", "domain"),
    [
        (0.0, Positive()),
        (-1e-3, Positive()),
        (-1e-9, NonNegative()),
        (1.5, Interval(0, 1)),
        (-0.1, Interval(0, 1)),
        (math.nan, Real()),
        (math.inf, Positive()),
    ],
)
def test_value_outside_the_domain_is_refused_and_shown(value: float, domain) -> None:
    with pytest.raises(ValueError, match="`value` must lie in") as refusal:
        Hyperparameter(value, domain)
    assert f"got {value}" in str(refusal.value)
    assert str(domain) in str(refusal.value)


def test_first_entry_outside_the_domain_is_shown() -> None:
    with pytest.raises(ValueError, match=r"got -2\.0"):
        Hyperparameter([1.0, -2.0, -3.0], Positive())


@pytest.mark.parametrize("domain", [Positive, "positive", None, (0, 1)])
def test_domain_that_is_none_is_refused_and_shown(domain: Any) -> None:
    with pytest.raises(TypeError, match="`domain` must be a Domain") as refusal:
        Hyperparameter(1.0, domain)
    assert repr(domain) in str(refusal.value)


@pytest.mark.parametrize(
    "value", [True, [True, False], 1j, torch.tensor([1j]), torch.tensor(True)], ids=repr
)
def test_value_that_is_not_real_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="`value` must be real"):
        Hyperparameter(value, Real())


@pytest.mark.parametrize(
    "value",
    [
        0.1,
        np.float64(0.1),
        torch.tensor(0.1, dtype=torch.float64),
        torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
        Hyperparameter(0.1, Real()),
    ],
    ids=repr,
)
def test_scalar_is_kept_exactly_whatever_the_default_dtype(value: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        hyperparameter = Hyperparameter(value, Positive())
        assert hyperparameter.item() == 0.1
        assert hyperparameter.dtype is torch.float64
        assert not hyperparameter.requires_grad


@pytest.mark.parametrize("value", [1, np.int32(1), torch.tensor(1)], ids=repr)
def test_whole_number_becomes_real(value: Any) -> None:
    hyperparameter = Hyperparameter(value, Real())
    assert (hyperparameter.item(), hyperparameter.dtype) == (1.0, torch.float64)


def test_value_is_copied() -> None:
    source = torch.ones(2)
    hyperparameter = Hyperparameter(source, Real())
    source.zero_()
    assert hyperparameter.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", LOW_TO_HIGH)
def test_tensor_with_shape_keeps_its_dtype(dtype: torch.dtype) -> None:
    hyperparameter = Hyperparameter(torch.ones(2, 3, dtype=dtype), Positive())
    assert (hyperparameter.dtype, hyperparameter.shape) == (dtype, (2, 3))
    product = hyperparameter * torch.ones(2, 3, dtype=dtype)
    assert product.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_list_and_whole_numbers_take_the_default_dtype(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    assert Hyperparameter([1.0, 2.0], Real()).dtype is dtype
    assert Hyperparameter([1, 2], Real()).dtype is dtype


# Copies and modules


@pytest.fixture(params=["scalar", "vector"])
def hyperparameter(request: pytest.FixtureRequest) -> Hyperparameter:
    value = 0.1 if request.param == "scalar" else torch.tensor([0.1, 0.2], dtype=torch.float32)
    return Hyperparameter(value, Interval(0, 1))


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["copy", "pickle"]
)
def test_copy_has_the_value_and_the_domain(hyperparameter, copied_by: Callable, live: bool) -> None:
    hyperparameter.requires_grad_(live)
    copied = copied_by(hyperparameter)
    assert type(copied) is Hyperparameter
    assert copied.domain == hyperparameter.domain
    assert _bits(copied) == _bits(hyperparameter)
    assert not copied.requires_grad
    copied.plain.fill_(0.5)
    assert hyperparameter.flatten()[0].item() == pytest.approx(0.1)


def test_module_and_optimizer_copied_together_share_the_copy() -> None:
    module = nn.Linear(1, 1)
    module.lr = Hyperparameter(0.1, Positive())
    optimizer = torch.optim.SGD(module.parameters(), lr=module.lr)
    for copied in (
        copy.deepcopy((module, optimizer)),
        pickle.loads(pickle.dumps((module, optimizer))),
    ):
        assert copied[0].lr is copied[1].param_groups[0]["lr"]
        assert copied[0].lr is not module.lr


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_optimizer_under_a_scheduler_can_be_copied(copied_by: Callable) -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=Hyperparameter(0.1, Positive()))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # keeps a clone of the rate in the group
    copied = copied_by(optimizer)
    assert copied.param_groups[0]["lr"].item() == 0.1
    assert float(copied.param_groups[0]["initial_lr"]) == 0.1


@pytest.mark.parametrize(
    "domain", [Real(), Positive(), NonNegative(), Interval(0, 1)], ids=lambda d: repr(d)
)
def test_saved_optimizer_loads_with_weights_only(domain) -> None:
    weight = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=Hyperparameter(0.1, domain))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = torch.optim.SGD([weight], lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.param_groups[0]["lr"].item() == 0.1
    assert float(other.param_groups[0]["initial_lr"]) == 0.1


def test_hyperparameter_is_no_weight_and_in_no_state_dict() -> None:
    module = nn.Linear(1, 1)
    module.lr = Hyperparameter(0.1, Positive())
    module.task_weights = Hyperparameter([0.1, 0.2], Positive())
    assert {name for name, _ in module.named_parameters()} == {"weight", "bias"}
    assert list(module.buffers()) == []
    assert set(module.state_dict()) == {"weight", "bias"}


def test_casting_a_module_leaves_its_hyperparameters_exact() -> None:
    module = nn.Linear(1, 1)
    module.lr = lr = Hyperparameter(0.1, Positive())
    module.to(torch.bfloat16)
    assert module.lr is lr
    assert lr.item() == 0.1


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        ((torch.float32,), {}),
        (("cpu", torch.bfloat16), {}),
        (("cpu",), {}),
        ((), {"dtype": torch.float16}),
        ((), {"device": "cpu", "dtype": torch.float32}),
        ((torch.zeros(1, dtype=torch.float32),), {}),
    ],
    ids=str,
)
def test_scalar_keeps_its_precision_wherever_it_is_sent(arguments: tuple, live: bool) -> None:
    scalar = Hyperparameter(0.1, Positive()).requires_grad_(live)
    args, kwargs = arguments
    sent = scalar.to(*args, **kwargs)
    assert (sent.dtype, sent.item()) == (torch.float64, 0.1)
    ones = torch.ones(2, dtype=torch.float32)
    assert (sent * ones).dtype is torch.float32
    assert (sent * ones).requires_grad == live


def test_scalar_moves_to_another_device_with_its_precision() -> None:
    moved = Hyperparameter(0.1, Positive()).to("meta", torch.float32)
    assert (moved.device.type, moved.dtype) == ("meta", torch.float64)


def test_tensor_with_shape_is_cast_as_any_tensor() -> None:
    assert Hyperparameter([0.1], Positive()).to(torch.float32).dtype is torch.float32


def test_plain_value_shares_memory_and_is_an_ordinary_tensor(hyperparameter) -> None:
    hyperparameter.requires_grad_()
    plain = hyperparameter.plain
    assert type(plain) is Tensor
    assert not plain.requires_grad
    plain.fill_(0.5)
    assert hyperparameter.flatten()[0].item() == 0.5


def test_repr_and_format_show_the_number() -> None:
    scalar = Hyperparameter(0.1, Positive())
    assert repr(scalar) == "Hyperparameter(0.1, Positive())"
    assert f"{scalar:.2e} {scalar}" == "1.00e-01 0.1"
    assert repr(Hyperparameter([1.0, 2.0], Real())) == "Hyperparameter([1.0, 2.0], Real())"


# In an optimizer

OPTIMIZERS: dict[type[torch.optim.Optimizer], dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01},
    torch.optim.Adam: {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    torch.optim.AdamW: {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    torch.optim.RMSprop: {
        "lr": 1e-3,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "momentum": 0.9,
    },
    torch.optim.Adagrad: {"lr": 1e-2, "lr_decay": 1e-3, "weight_decay": 0.01, "eps": 1e-10},
    torch.optim.Adadelta: {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.01},
    torch.optim.Adamax: {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    torch.optim.NAdam: {
        "lr": 2e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.01,
        "momentum_decay": 4e-3,
    },
    torch.optim.RAdam: {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    torch.optim.ASGD: {"lr": 1e-2, "lambd": 1e-4, "alpha": 0.75, "weight_decay": 0.01},
}

PLACES = [
    (optimizer_class, place)
    for optimizer_class, settings in OPTIMIZERS.items()
    for place in (*settings, "all of them")
]


def _hyper(value: float) -> Hyperparameter:
    return Hyperparameter(value, Real())


def _train(optimizer_class: type, settings: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(3)
    param = torch.randn(5, 3).to(dtype).requires_grad_()
    optimizer = optimizer_class([param], **settings)
    for _ in range(20):
        param.grad = torch.randn(5, 3).to(dtype)
        optimizer.step()
    return [param, *(t for t in optimizer.state[param].values() if isinstance(t, Tensor))]


def test_table_covers_every_real_valued_setting() -> None:
    for optimizer_class, settings in OPTIMIZERS.items():
        rule = rule_class_for(optimizer_class([torch.zeros(1)]))
        keys = {"betas" if name in ("beta1", "beta2") else name for name in rule.domains}
        assert keys == set(settings)


@pytest.mark.parametrize("dtype", LOW_TO_HIGH, ids=str)
@pytest.mark.parametrize(("optimizer_class", "place"), PLACES)
def test_training_is_bitwise_that_with_the_number(
    optimizer_class: type, place: str, dtype: torch.dtype
) -> None:
    # As users run it: torch keeps its scalar state in the default dtype.
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    settings = OPTIMIZERS[optimizer_class]
    tuned = dict(settings)
    for key, value in settings.items():
        if place in (key, "all of them"):
            is_pair = isinstance(value, tuple)
            tuned[key] = tuple(_hyper(v) for v in value) if is_pair else _hyper(value)
    with_number = _train(optimizer_class, settings, dtype)
    with_hyperparameter = _train(optimizer_class, tuned, dtype)
    assert [_bits(t) for t in with_hyperparameter] == [_bits(t) for t in with_number]


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("option", ["fused", "foreach"])
def test_fast_paths_take_numbers_that_are_hyperparameters(
    optimizer_class: type, option: str
) -> None:
    torch.set_default_dtype(torch.float32)
    settings = {**OPTIMIZERS[optimizer_class], option: True}
    tuned = {**settings, "weight_decay": _hyper(settings["weight_decay"])}
    with_number = _train(optimizer_class, settings, torch.float32)
    with_hyperparameter = _train(optimizer_class, tuned, torch.float32)
    assert [_bits(t) for t in with_hyperparameter] == [_bits(t) for t in with_number]


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}),
        (torch.optim.Adam, {"lr": 1e-3, "weight_decay": 0.0}),
        (torch.optim.RMSprop, {"lr": 1e-3, "momentum": 0.0}),
    ],
)
def test_zero_takes_the_path_that_torch_takes_for_zero(
    optimizer_class: type, settings: dict
) -> None:
    tuned = {key: _hyper(value) for key, value in settings.items()}
    with_number = _train(optimizer_class, settings, torch.float64)
    with_hyperparameter = _train(optimizer_class, tuned, torch.float64)
    assert [_bits(t) for t in with_hyperparameter] == [_bits(t) for t in with_number]


# In the loss

Expression = Callable[[Any, Tensor], Tensor]

ARITHMETIC: dict[str, Expression] = {
    "h * x": lambda h, x: h * x,
    "x * h": lambda h, x: x * h,
    "h + x": lambda h, x: h + x,
    "x - h": lambda h, x: x - h,
    "h - x": lambda h, x: h - x,
    "x / h": lambda h, x: x / h,
    "h / x": lambda h, x: h / x,
    "x ** h": lambda h, x: x.abs() ** h,
    "h ** x": lambda h, x: h**x,
    "-h * x": lambda h, x: -h * x,
    "(1 - h) * x": lambda h, x: (1 - h) * x,
    "h * h * x": lambda h, x: h * h * x,
    "(h + 1) / 3 * x": lambda h, x: (h + 1) / 3 * x,
    "h ** 2 * x": lambda h, x: h**2 * x,
    "h ** 3 * x": lambda h, x: h**3 * x,
    "h ** 0.5 * x": lambda h, x: h**0.5 * x,
    "2 ** h * x": lambda h, x: 2**h * x,
    "1 / h * x": lambda h, x: 1 / h * x,
    "(3 - h) / (1 + h) * x": lambda h, x: (3 - h) / (1 + h) * x,
    "h * x[0]": lambda h, x: h * x[0],
    "h * x.sum()": lambda h, x: h * x.sum(),
    "torch.mul": lambda h, x: torch.mul(x, h),
    "mean + h * penalty": lambda h, x: x.mean() + h * x.square().sum(),
    "sum of products": lambda h, x: sum(h * t for t in (x, x, x)),
    "whole numbers": lambda h, x: h * torch.arange(3),
}

OTHERS: dict[str, Expression] = {
    "alpha": lambda h, x: torch.add(x, x, alpha=h),
    "clamp": lambda h, x: x.clamp(min=-h, max=h),
    "where": lambda h, x: torch.where(x > h, x, h),
    "lerp": lambda h, x: torch.lerp(x, x + 1, h),
    "huber": lambda h, x: F.huber_loss(x, x.flip(0), delta=h),
    "label_smoothing": lambda h, x: F.cross_entropy(x[None], torch.tensor([1]), label_smoothing=h),
    "leaky_relu": lambda h, x: F.leaky_relu(x, h),
    "softplus": lambda h, x: F.softplus(x, beta=h),
    "in place": lambda h, x: x.clone().mul_(h).add_(h).sub_(x, alpha=h),
    "bool": lambda h, x: h * (x > 0),
    "full_like": lambda h, x: torch.full_like(x, h),
    "comparison": lambda h, x: x < h,
    "linear": lambda h, x: h * F.linear(x[None], x[None]),
}

VALUES = [0.1, 0.3, 1e-4, 0.9999]


def _inputs(dtype: torch.dtype) -> Tensor:
    return torch.tensor([0.37, -1.93, 2.71], dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", LOW_TO_HIGH, ids=str)
@pytest.mark.parametrize("name", [*ARITHMETIC, *OTHERS])
def test_expression_has_the_bits_and_the_dtype_of_that_with_the_number(
    name: str, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    expression = (ARITHMETIC | OTHERS)[name]
    for value in VALUES:
        x = _inputs(dtype)
        result = expression(_hyper(value), x)
        assert _bits(result) == _bits(expression(value, x))
        assert type(result) is Tensor


# torch raises to a tensor's power by another kernel than to a number's: see the test below.
EXACT = [name for name in ARITHMETIC if name != "x ** h"]


@pytest.mark.parametrize("dtype", LOW_TO_HIGH, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_live_expression_has_the_bits_and_the_dtype_of_that_with_the_number(
    name: str, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    for value in VALUES:
        x = _inputs(dtype)
        result = ARITHMETIC[name](_hyper(value).requires_grad_(), x)
        assert _bits(result) == _bits(ARITHMETIC[name](value, x))
        assert result.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# d(h ** w)/dw is log h in the precision of h: float32 beside a float32 weight, if h is live.
@pytest.mark.parametrize("name", [n for n in EXACT if n not in ("whole numbers", "h ** x")])
def test_weights_get_the_same_gradient_from_a_live_loss_bit_for_bit(
    name: str, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    for value in VALUES:
        weight = _inputs(dtype).requires_grad_()
        with_live = ARITHMETIC[name](_hyper(value).requires_grad_(), weight).sum()
        with_number = ARITHMETIC[name](value, weight).sum()
        gradients = [torch.autograd.grad(loss, weight)[0] for loss in (with_live, with_number)]
        assert _bits(gradients[0]) == _bits(gradients[1])


@pytest.mark.parametrize("dtype", LOW_TO_HIGH, ids=str)
def test_power_of_a_live_exponent_is_that_of_the_number_to_an_ulp(dtype: torch.dtype) -> None:
    torch.set_default_dtype(torch.float64 if dtype is torch.float64 else torch.float32)
    x = _inputs(dtype).abs()
    for value in [*VALUES, 2.0, 0.5]:
        result = x ** _hyper(value).requires_grad_()
        # Two kernels, each right to an ulp or so.
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(result, x**value, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", list(ARITHMETIC))
def test_gradient_flows_to_a_live_hyperparameter(name: str) -> None:
    h, x = _hyper(0.3).requires_grad_(), _inputs(torch.float64)
    [gradient] = torch.autograd.grad(ARITHMETIC[name](h, x).sum(), h)
    step = 1e-6
    ahead, behind = (ARITHMETIC[name](0.3 + s, x).sum().item() for s in (step, -step))
    # Truncation step^2 and rounding 1e-15 / step.
    assert gradient.item() == pytest.approx((ahead - behind) / (2 * step), rel=1e-7, abs=1e-8)
    assert gradient.dtype is torch.float64


def test_gradient_of_a_float32_loss_reaches_the_float64_scalar() -> None:
    h, x = _hyper(0.1).requires_grad_(), _inputs(torch.float32)
    (h * x.square().sum()).backward()
    assert h.grad.dtype is torch.float64
    assert h.grad.item() == x.square().sum().item()


def test_gradients_of_several_places_add_up() -> None:
    module = nn.Linear(3, 1)
    module.h = h = _hyper(0.5).requires_grad_()
    x = _inputs(torch.float64)
    loss = h * module(x).sum() + h**2 * x.sum() + (1 - h)
    [gradient] = torch.autograd.grad(loss, h)
    expected = module(x).sum() + 2 * 0.5 * x.sum() - 1
    torch.testing.assert_close(gradient, expected, rtol=1e-14, atol=1e-14)  # a few roundings


def test_second_derivatives_by_weight_and_hyperparameter_are_symmetric() -> None:
    h, w = _hyper(0.5).requires_grad_(), torch.tensor([1.0, 2.0], requires_grad=True)
    loss = h**2 * (w**3).sum()
    by_h, by_w = torch.autograd.grad(loss, (h, w), create_graph=True)
    [mixed] = torch.autograd.grad(by_h, w, retain_graph=True)
    back = torch.stack([torch.autograd.grad(g, h, retain_graph=True)[0] for g in by_w])
    # 6 h w^2, two ways.
    torch.testing.assert_close(mixed, 3 * w.detach() ** 2, rtol=1e-14, atol=0)
    torch.testing.assert_close(back, mixed, rtol=1e-14, atol=0)


def test_gradient_flows_into_every_entry_of_a_tensor() -> None:
    weights = Hyperparameter(torch.ones(3), Positive()).requires_grad_()
    losses = _inputs(torch.float64)
    [gradient] = torch.autograd.grad((weights * losses).sum(), weights)
    assert gradient.tolist() == losses.tolist()


def test_number_that_is_not_live_asks_for_no_gradient() -> None:
    x = _inputs(torch.float64).requires_grad_()
    assert not (_hyper(0.1) * x.detach()).requires_grad
    assert (_hyper(0.1) * x).requires_grad


def test_arithmetic_of_numbers_is_that_of_python_while_nothing_is_live() -> None:
    h, k = _hyper(0.1), _hyper(0.3)
    for expression in (
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: a**b,
        lambda a, b: -a + 1 - b / 3 + 2**a,
    ):
        result, expected = expression(h, k), expression(0.1, 0.3)
        assert type(result) is float
        assert result == expected


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("value", [0.5, [0.5, 0.25]], ids=["scalar", "vector"])
def test_augmented_assignment_gives_the_name_another_number(value: Any, live: bool) -> None:
    hyper = Hyperparameter(value, Real()).requires_grad_(live)
    expected = torch.as_tensor(value)
    found = hyper
    found *= 8
    found += 1
    found -= 2
    found /= 4
    found **= 2
    torch.testing.assert_close(torch.as_tensor(found), ((8 * expected - 1) / 4) ** 2)
    assert torch.equal(hyper.plain, torch.as_tensor(value, dtype=hyper.dtype))
    assert isinstance(found, Tensor) == (live or hyper.dim() > 0)


def test_comparisons_and_conversions_are_those_of_the_number() -> None:
    h = _hyper(0.1)
    assert h == 0.1
    assert h != 0
    assert not h > 0.1
    assert 0 <= h < 1
    assert float(h) == 0.1
    assert bool(h)
    assert math.exp(h) == math.exp(0.1)
    assert max(h, 0.05) == 0.1
    assert (round(h), round(h, 1)) == (0, 0.1)


def test_a_live_probability_draws_what_the_number_draws() -> None:
    h, drawn = _hyper(0.3).requires_grad_(), []
    for p in (0.3, h, 1 - h, 0.7):
        torch.manual_seed(0)
        drawn.append(torch.empty(20).bernoulli_(p))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[2], drawn[3])
    assert not torch.equal(drawn[1], drawn[2])


def test_value_written_in_place_acts_at_once_everywhere() -> None:
    h = _hyper(0.1)
    weight = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([{"params": [weight], "lr": h}, {"params": [torch.ones(1)]}])
    weight.grad = torch.ones(2)
    h.plain.fill_(0.25)
    optimizer.step()
    assert weight.tolist() == [0.75, 0.75]
    assert (h * torch.ones(1)).item() == 0.25


@pytest.mark.parametrize("live", [False, True])
def test_tensor_with_shape_goes_where_the_others_are(live: bool) -> None:
    weights = Hyperparameter([1.0, 2.0], Real()).requires_grad_(live)
    losses = torch.ones(2, device="meta")  # a device that every machine has
    for result in (weights * losses, losses @ weights, torch.stack([weights, losses])):
        assert result.device.type == "meta"
        assert result.requires_grad == live
    assert weights.device.type == "cpu"


def test_tensor_with_shape_stays_where_it_is_among_numbers_and_indices_of_the_host() -> None:
    weights = torch.ones(2, device="meta").as_subclass(Hyperparameter)
    for result in (weights * torch.tensor(0.5), weights[torch.tensor([0])]):
        assert result.device.type == "meta"


def test_where_torch_takes_no_live_weights_what_to_write_instead_is_said() -> None:
    weights = Hyperparameter([1.0, 2.0], Real()).requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable") as caught:
        torch.nn.functional.cross_entropy(torch.zeros(3, 2), torch.zeros(3).long(), weight=weights)
    assert "weights[target] *" in caught.value.__notes__[0]
