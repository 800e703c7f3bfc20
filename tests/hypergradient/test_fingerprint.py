import pytest
import torch

from lightning_rtho.hypergradient._fingerprint import fingerprint, is_of

_GENERATOR = torch.Generator().manual_seed(1)
GRADIENTS = [torch.randn(*shape, generator=_GENERATOR) for shape in ([300, 7], [11])]

EDITS = {
    "scaled": lambda gradient: 1.01 * gradient,
    "noise": lambda gradient: gradient + 0.01 * torch.randn_like(gradient),
    "centred": lambda gradient: gradient - gradient.mean(),
    "flipped": lambda gradient: -gradient,
    "one row zero": lambda gradient: gradient * (torch.arange(len(gradient)) > 0)[:, None],
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_gradient_is_known_by_its_fingerprint(edit):
    prints = fingerprint(GRADIENTS)
    assert is_of(prints, GRADIENTS)
    assert not is_of(prints, [edit(GRADIENTS[0]), GRADIENTS[1]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rounding_leaves_the_fingerprint(dtype):
    gradients = [gradient.to(dtype) for gradient in GRADIENTS]
    rounded = [g * (1 + torch.finfo(dtype).eps * torch.randn_like(g)) for g in gradients]
    assert is_of(fingerprint(gradients), rounded)


def test_gradients_that_are_not_finite_count_as_known():
    bad = [torch.tensor([1.0, torch.nan])]
    assert is_of(fingerprint(bad), bad)
