"""Clipping against torch's own, and its derivatives against finite differences."""

import pytest
import torch
from torch import Tensor

from lightning_rtho.linearization import ClipByNorm, ClipByValue, GradientClip

GRADS = (
    torch.tensor([[0.5, -1.0], [2.0, 0.1]], dtype=torch.float64),
    torch.tensor(-0.7, dtype=torch.float64),
    torch.tensor([0.3, 0.0, -1.5], dtype=torch.float64),
)
"""Joint norm 2.87."""

CLIPS = [ClipByNorm(1.0), ClipByNorm(2.8), ClipByNorm(10.0), ClipByValue(0.6), ClipByValue(10.0)]
each_clip = pytest.mark.parametrize("clip", CLIPS, ids=str)


def _clipped_by_torch(clip: GradientClip, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    params = [torch.zeros_like(grad) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    if isinstance(clip, ClipByNorm):
        torch.nn.utils.clip_grad_norm_(params, clip.limit)
    else:
        torch.nn.utils.clip_grad_value_(params, clip.limit)
    return tuple(param.grad for param in params)


@each_clip
@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 0.3, 1.0, 1e6])
def test_clipping_equals_that_of_torch(clip: GradientClip, scale: float) -> None:
    grads = tuple(scale * grad for grad in GRADS)
    # The norm's sum in another order.
    torch.testing.assert_close(clip(*grads), _clipped_by_torch(clip, grads), rtol=1e-14, atol=0)


@each_clip
@pytest.mark.parametrize("scale", [1.0, 300.0])  # the square of 300 is too much for float16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clipping_equals_that_of_torch_in_low_precision(
    clip: GradientClip, dtype: torch.dtype, scale: float
) -> None:
    grads = tuple((scale * grad).to(dtype) for grad in GRADS)
    clipped = clip(*grads)
    assert all(c.dtype is dtype for c in clipped)
    # The norm's sum and the factor round each to a few units in the last place.
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        clipped, _clipped_by_torch(clip, grads), rtol=tolerance, atol=tolerance
    )


@each_clip
def test_push_forward_equals_finite_differences(clip: GradientClip) -> None:
    grads_dot = tuple(torch.randn(2, *grad.shape) for grad in GRADS)
    clipped_dot = clip.jvp(GRADS, grads_dot)
    h = 1e-5
    for k in range(2):
        ahead, behind = (
            _clipped_by_torch(
                clip, tuple(g + s * h * d[k] for g, d in zip(GRADS, grads_dot, strict=True))
            )
            for s in (1, -1)
        )
        for dot, a, b in zip(clipped_dot, ahead, behind, strict=True):
            # Truncation h^2 and rounding 1e-16 / h, each 1e-10 or so.
            torch.testing.assert_close(dot[k], (a - b) / (2 * h), rtol=1e-8, atol=1e-9)


@each_clip
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_pull_back_is_the_adjoint_of_push_forward(clip: GradientClip, scale: float) -> None:
    grads = tuple(scale * grad for grad in GRADS)
    grads_dot = tuple(torch.randn(1, *grad.shape) for grad in grads)
    clipped_bar = tuple(torch.randn_like(grad) for grad in grads)
    clipped_dot = clip.jvp(grads, grads_dot)
    grads_bar = clip.vjp(grads, clipped_bar)
    lhs = sum((b * d[0]).sum() for b, d in zip(clipped_bar, clipped_dot, strict=True))
    rhs = sum((b * d[0]).sum() for b, d in zip(grads_bar, grads_dot, strict=True))
    torch.testing.assert_close(lhs, rhs, rtol=1e-12, atol=1e-12)  # same sums, other order


@each_clip
def test_zero_gradients_pass_unchanged_both_ways(clip: GradientClip) -> None:
    zeros = tuple(torch.zeros_like(grad) for grad in GRADS)
    grads_dot = tuple(torch.randn(3, *grad.shape) for grad in GRADS)
    torch.testing.assert_close(clip(*zeros), zeros, rtol=0, atol=0)
    torch.testing.assert_close(clip.jvp(zeros, grads_dot), grads_dot, rtol=0, atol=0)
    torch.testing.assert_close(clip.vjp(zeros, GRADS), GRADS, rtol=0, atol=0)


@pytest.mark.parametrize("limit", [2.0, 1e-3, 1e-9])
def test_clipped_norm_is_the_limit_and_feels_no_rescaling(limit: float) -> None:
    clip = ClipByNorm(limit)
    norm = torch.cat([c.flatten() for c in clip(*GRADS)]).norm().item()
    assert norm == pytest.approx(limit, rel=1e-6)  # torch's 1e-6 beside the norm
    along = clip.jvp(GRADS, tuple(grad[None] for grad in GRADS))
    for dot in along:
        assert dot.abs().max() <= 1e-6 * limit  # likewise


def test_clamped_entries_have_no_tangent_and_the_others_keep_theirs() -> None:
    grads, ones = (torch.tensor([3.0, -0.5, -2.0]),), (torch.ones(1, 3),)
    assert ClipByValue(1.0).jvp(grads, ones)[0].tolist() == [[0.0, 1.0, 0.0]]
    assert ClipByValue(1.0).vjp(grads, (torch.ones(3),))[0].tolist() == [0.0, 1.0, 0.0]


@each_clip
def test_neither_direction_changes_its_arguments(clip: GradientClip) -> None:
    grads = tuple(grad.clone() for grad in GRADS)
    with torch.no_grad():
        clip.jvp(grads, tuple(grad[None] for grad in grads))
        pulled = clip.vjp(grads, GRADS)
    torch.testing.assert_close(grads, GRADS, rtol=0, atol=0)
    assert not any(tensor.requires_grad for tensor in (*grads, *pulled))
