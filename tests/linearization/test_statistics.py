"""Running statistics: what a forward pass does to them, and what depends on them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_rtho.linearization import RunningStatistics

LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(3), (5, 3)),
    "1d-sequence": (lambda: nn.BatchNorm1d(3), (5, 3, 4)),
    "2d": (lambda: nn.BatchNorm2d(3), (5, 3, 2, 2)),
    "3d": (lambda: nn.BatchNorm3d(3), (2, 3, 2, 2, 2)),
    "no-affine": (lambda: nn.BatchNorm1d(3, affine=False), (5, 3)),
    "momentum-0.7": (lambda: nn.BatchNorm1d(3, momentum=0.7), (5, 3)),
    "cumulative": (lambda: nn.BatchNorm1d(3, momentum=None), (5, 3)),
}

every_layer = pytest.mark.parametrize("layer", LAYERS)


def _trained(layer):
    """A layer that has seen two batches, and a third batch."""
    make, shape = LAYERS[layer]
    norm = make()
    for _ in range(2):
        norm(torch.randn(shape) * 2 + 1)
    return norm, torch.randn(shape)


@every_layer
def test_untraced_passes_tell_which_buffers_move_and_compute_nothing(layer):
    norm, x = _trained(layer)
    statistics = RunningStatistics(norm)
    statistics.start(traced=False)
    norm(x)
    updates = statistics.collect()
    assert [update.buffer for update in updates] == [0, 1]
    pairs = zip(updates, statistics.buffers, strict=True)
    assert all(update.statistic is buffer for update, buffer in pairs)


@every_layer
def test_updates_are_what_torch_makes_of_its_buffers(layer):
    norm, x = _trained(layer)
    statistics = RunningStatistics(norm)
    expected = [buffer.clone() for buffer in statistics.buffers]
    statistics.start()
    for scale in (1.0, 3.0):  # the second call sees the buffers that the first one left
        norm(scale * x)
    for update in statistics.collect():
        old = expected[update.buffer]
        expected[update.buffer] = (1 - update.factor) * old + update.factor * update.statistic
    for buffer, value in zip(statistics.buffers, expected, strict=True):
        torch.testing.assert_close(buffer, value, rtol=1e-13, atol=1e-15)  # the same few sums


def test_updates_name_the_buffers_of_their_layer_in_the_order_of_the_calls():
    shared, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    model = nn.Sequential(shared, nn.Tanh(), other, shared)
    statistics = RunningStatistics(model)
    statistics.start()
    model(torch.randn(4, 2))
    assert [update.buffer for update in statistics.collect()] == [0, 1, 2, 3, 0, 1]
    assert len(statistics.buffers) == 4


def test_updates_depend_differentiably_on_the_weights_before_the_layer():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    x = torch.randn(5, 2)
    statistics = RunningStatistics(model)
    statistics.start()
    model(x)
    mean, variance = (update.statistic for update in statistics.collect())
    linear = model[0]
    (by_bias,) = torch.autograd.grad(mean.sum(), linear.bias, retain_graph=True)
    (by_weight,) = torch.autograd.grad(variance.sum(), linear.weight)
    assert by_bias.tolist() == pytest.approx([1.0, 1.0, 1.0], rel=1e-14)
    # The variance of w x is w^T C w: its derivative is 2 C w.
    torch.testing.assert_close(by_weight, 2 * linear.weight @ x.T.cov(), rtol=1e-12, atol=1e-14)


def test_a_frozen_layer_has_no_updates():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    model[0].eval()
    statistics = RunningStatistics(model)
    statistics.start()
    model(torch.randn(4, 2))
    assert [update.buffer for update in statistics.collect()] == [2, 3]


def test_a_layer_without_running_statistics_is_none_of_ours():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), nn.LayerNorm(2))
    statistics = RunningStatistics(model)
    statistics.start()
    model(torch.randn(4, 2))
    assert statistics.collect() == ()
    assert statistics.buffers == []


def test_nothing_is_watched_before_the_start_or_after_the_collection():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    statistics = RunningStatistics(norm)
    norm(x)
    assert statistics.collect() == ()
    statistics.start()
    norm(x)
    statistics.start()  # a forward pass without a loss is forgotten
    norm(x)
    assert len(statistics.collect()) == 2
    norm(x)
    assert statistics.collect() == ()
    assert torch.batch_norm is torch._C._VariableFunctions.batch_norm


def test_watching_changes_neither_output_nor_buffers():
    norm, x = _trained("2d")
    plain, _ = _trained("2d")
    plain.load_state_dict(norm.state_dict())
    statistics = RunningStatistics(norm)
    statistics.start()
    assert torch.equal(norm(x), plain(x))
    statistics.collect()
    assert all(map(torch.equal, norm.state_dict().values(), plain.state_dict().values()))


@every_layer
def test_differentiable_evaluation_gives_what_torch_gives(layer):
    norm, x = _trained(layer)
    norm.eval()
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    expected = F.batch_norm(
        x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps
    )
    with RunningStatistics(norm).differentiable():
        torch.testing.assert_close(norm(x), expected, rtol=1e-13, atol=1e-14)  # five operations
    assert torch.equal(norm(x), expected)


@every_layer
def test_evaluation_depends_on_the_running_statistics_as_its_formula_does(layer):
    norm, x = _trained(layer)
    norm.eval()

    def by_hand(mean, var):
        shape = [1, -1, *[1] * (x.dim() - 2)]
        normal = (x - mean.reshape(shape)) / (var.reshape(shape) + norm.eps).sqrt()
        return (normal**3).sum()

    with RunningStatistics(norm).differentiable() as leaves:
        found = torch.autograd.grad((norm(x) ** 3).sum(), leaves)
    expected = torch.func.grad(by_hand, argnums=(0, 1))(norm.running_mean, norm.running_var)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)  # sums of 15 to 60 terms


def test_a_layer_in_training_mode_does_not_depend_on_its_running_statistics():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    plain = F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)
    with RunningStatistics(norm).differentiable():
        assert torch.equal(norm(x), plain)


def test_differentiable_evaluation_writes_nothing_and_leaves_no_patch_even_on_an_error():
    norm, x = _trained("1d")
    norm.eval()
    before = {name: value.clone() for name, value in norm.state_dict().items()}

    def fail():
        with RunningStatistics(norm).differentiable():
            norm(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert torch.batch_norm is torch._C._VariableFunctions.batch_norm


def test_a_layer_may_be_called_with_a_keyword():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    statistics = RunningStatistics(norm)
    statistics.start()
    norm(input=x)
    assert [update.statistic.shape for update in statistics.collect()] == [(2,), (2,)]
    norm.eval()
    expected = norm(x)
    with statistics.differentiable():
        torch.testing.assert_close(norm(input=x), expected, rtol=1e-13, atol=1e-14)


class ActivatedNorm(nn.BatchNorm1d):
    """Has a `forward` of its own, as layers of timm do that join normalization and activation."""

    def forward(self, x):
        parts = [  # "ghost" batches, each averaged in turn
            F.batch_norm(
                part, self.running_mean, self.running_var, self.weight, self.bias, self.training,
                0.3, self.eps,
            )
            for part in (x.chunk(2) if self.training else [x])
        ]  # fmt: skip
        return torch.cat(parts).relu()


def test_a_layer_with_a_forward_of_its_own_is_followed_by_the_kernel_that_it_calls():
    norm, x = ActivatedNorm(2), torch.randn(6, 2)
    statistics = RunningStatistics(norm)
    expected = [buffer.clone() for buffer in statistics.buffers]
    statistics.start()
    norm(x)
    updates = statistics.collect()
    assert len(updates) == 4
    for update in updates:
        old = expected[update.buffer]
        expected[update.buffer] = (1 - update.factor) * old + update.factor * update.statistic
    torch.testing.assert_close(statistics.buffers, expected, rtol=1e-13, atol=1e-15)
    assert statistics.unwatched is None
    norm.eval()
    evaluated = norm(x)
    with statistics.differentiable() as leaves:
        found = norm(x)
        assert all(part.any() for part in torch.autograd.grad(found.sum(), leaves))
    torch.testing.assert_close(found, evaluated, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_layer_that_averages_by_itself_is_found_out(in_place):
    class OwnAverage(nn.BatchNorm1d):
        def forward(self, x):
            with torch.no_grad():
                average = self.running_mean.lerp(x.mean(0), 0.1)
                if in_place:
                    self.running_mean.copy_(average)
                else:
                    self.running_mean = average
            return x - self.running_mean

    # Their dtype is not the default: tensors that nobody has written to.
    model = nn.Sequential(nn.BatchNorm1d(2), OwnAverage(2)).float()
    statistics = RunningStatistics(model)
    statistics.start()
    model(torch.randn(4, 2, dtype=torch.float32))
    statistics.collect()
    assert statistics.unwatched is model[1]
    statistics.collect()
    assert statistics.unwatched is None


def test_reading_statistics_that_were_updated_before_is_noticed():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    statistics = RunningStatistics(norm)

    def reads_past(*, training):
        norm.train(training)
        statistics.start()
        norm(x)
        statistics.collect()
        return statistics.reads_past

    assert not reads_past(training=False)  # nothing has depended on the weights yet
    assert not reads_past(training=True)
    assert reads_past(training=False)
    with torch.no_grad():
        assert not reads_past(training=False)
    statistics.forget()
    assert not reads_past(training=False)


def test_buffers_that_a_functional_call_brings_are_none_of_ours():
    norm, x = nn.BatchNorm1d(2), torch.randn(4, 2)
    statistics = RunningStatistics(norm)
    brought = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    statistics.start()
    torch.func.functional_call(norm, brought, x)
    assert statistics.collect() == ()
    assert brought["running_mean"].any()
