"""Layers that people train: followed exactly, or refused by name."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn, optim
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_rtho import RTHO, TRHO, KeepGraph
from tests.callbacks.problems import (
    FEATURES,
    VAL_SIZE,
    SmallNet,
    finite_difference,
    fit,
    loader,
    validation_loss,
)

METHODS = {
    "forward": lambda: RTHO(["lr"], hyper_batch_size=4, outer_optimizer=None),
    "recompute": lambda: TRHO(["lr"], hyper_batch_size=4, outer_optimizer=None),
    "keep graph": lambda: TRHO(["lr"], hyper_batch_size=4, outer_optimizer=None, tape=KeepGraph()),
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(FEATURES, 12), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.inward(x)[None, None].chunk(3, -1)
        return self.outward(F.scaled_dot_product_attention(query, key, value)[0, 0])


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, activation="gelu")
        self.inward, self.outward = nn.Linear(FEATURES, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.layer(self.inward(x)[None])[0])


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer, self.outward = layer(FEATURES, 4, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.layer(x[:, None].repeat(1, 3, 1))[0][:, -1])


class Embedded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table, self.outward = nn.Embedding(5, 4, **options), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(self.table((x[:, 0] > 0).long()).tanh())


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(FEATURES, 4), nn.Linear(4, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.inward(x).tanh(), x, use_reentrant=self.use_reentrant)
        return self.outward(hidden)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).sum(1, keepdim=True)


class ActivatedNorm(nn.BatchNorm1d):
    """Normalization and activation in one `forward`, as in timm."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.2,
            self.eps,
        )  # fmt: skip
        return F.softplus(x)


class OwnAverage(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.running_mean.lerp_(x.mean(0), 0.1)
        return x - self.running_mean


class Padded(nn.Module):
    """Takes features that there are none of, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.none = nn.Linear(FEATURES, 4), nn.Parameter(torch.zeros(0, 4))
        self.outward = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward((self.inward(x) + x.new_zeros(len(x), 0) @ self.none).tanh())


class CheckpointedNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4), nn.Tanh())
        self.outward = nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (
            checkpoint(self.inward, x, use_reentrant=False) if self.training else self.inward(x)
        )
        return self.outward(hidden)


def around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 4), layer, nn.Tanh(), nn.Linear(4, 1))


FOLLOWED: dict[str, Callable[[], nn.Module]] = {
    "attention": Attention,
    "transformer": Transformer,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "rnn": lambda: Recurrent(nn.RNN),
    "embedding": Embedded,
    "group norm": lambda: around(nn.GroupNorm(2, 4)),
    "layer norm": lambda: around(nn.LayerNorm(4)),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "old weight norm": lambda: nn.Sequential(
        nn.utils.weight_norm(nn.Linear(FEATURES, 4)), nn.Tanh(), nn.Linear(4, 1)
    ),
    "batch norm with an activation": lambda: nn.Sequential(
        nn.Linear(FEATURES, 4), ActivatedNorm(4), nn.Linear(4, 1)
    ),
    "empty weight": Padded,
    "tied": Tied,
    "checkpointed": lambda: Checkpointed(use_reentrant=False),
    "compiled": lambda: nn.Sequential(
        torch.compile(nn.Linear(FEATURES, 4), backend="aot_eager"), nn.Tanh(), nn.Linear(4, 1)
    ),
}


def expected(body: Callable[[], nn.Module]) -> float:
    def loss_at(lr: float) -> float:
        module = SmallNet(optim.SGD, body=body, lr=lr, momentum=0.5)
        fit(module, steps=4)
        return validation_loss(module)

    return finite_difference(0.1, loss_at)


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed_exactly(name):
    reference = expected(FOLLOWED[name])
    for method, make in METHODS.items():
        if name == "checkpointed" and method == "keep graph":
            continue  # refused, below
        callback = make()
        fit(SmallNet(optim.SGD, body=FOLLOWED[name], lr=0.1, momentum=0.5), callback, steps=4)
        # Differences err by 1e-10 of the loss; see `finite_difference`.
        assert callback.hypergradients["lr"].item() == pytest.approx(reference, rel=1e-6), method


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


class Once(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(FEATURES, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(OnceDifferentiable.apply(self.inward(x)))


class Aligned(nn.Module):
    """The loss of an alignment, which torch differentiates once."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.inward(x).log_softmax(dim=-1)[:, None]
        target = torch.tensor([[1]])
        return F.ctc_loss(scores, target, (len(x),), (1,)).expand(len(x), 1)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(FEATURES, 1, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(torch.complex128) @ self.weight).abs()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "once differentiable": (Once, "`once_differentiable`"),
    "operation without": (Aligned, "an operation in it has none: .*ctc_loss_backward.* Write it"),
    "reentrant checkpointing": (lambda: Checkpointed(use_reentrant=True), "`use_reentrant=False`"),
    "complex": (Complex, "is complex"),
    "bag of embeddings": (lambda: around(nn.EmbeddingBag(4, 4)), "`net.1` is an EmbeddingBag"),
    "embedding that shortens": (lambda: Embedded(max_norm=1.0), "`net.table` shortens its weights"),
    "embedding scaled by frequency": (
        lambda: Embedded(scale_grad_by_freq=True),
        "`net.table` gives a gradient that is not",
    ),
    "spectral norm": (
        lambda: around(nn.utils.spectral_norm(nn.Linear(4, 4))),
        "`net.1` is normalized by its spectral norm",
    ),
    "spectral norm as a parametrization": (
        lambda: around(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))),
        "is normalized by its spectral norm",
    ),
    "batch norm that averages by itself": (
        lambda: around(OwnAverage(4)),
        "`net.1` averages its running statistics by itself",
    ),
    "running instance norm": (
        lambda: around(nn.InstanceNorm1d(4, track_running_stats=True)),
        "`net.1` keeps running statistics",
    ),
}


@pytest.mark.parametrize("method", ["forward", "recompute"])
def test_batch_norm_in_a_checkpoint_is_refused_by_name(method):
    module = SmallNet(optim.SGD, body=CheckpointedNorm, lr=0.1)
    with pytest.raises(MisconfigurationException, match="leave it out of what is checkpointed"):
        fit(module, METHODS[method](), steps=4)


class Words(SmallNet):
    """A sparse table of which each batch reads some rows, some of them twice.

    No penalty: it would make the gradient dense.
    """

    def __init__(self, optimizer: Any, *, sparse: bool = True, **settings: Any) -> None:
        super().__init__(optimizer, body=lambda: Embedded(sparse=sparse), **settings)
        self.sparse_steps = 0

    def training_step(self, batch, batch_idx):
        return self.validation_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        words = (2 * x[:, 0] + 2).round().long().clamp(0, 4)
        return F.mse_loss(self.net.outward(self.net.table(words).tanh()), y)

    def on_before_optimizer_step(self, optimizer):
        self.sparse_steps += self.net.table.weight.grad.is_sparse

    def error(self) -> float:
        (batch,) = loader(VAL_SIZE, seed=2, batch_size=VAL_SIZE)
        with torch.no_grad():
            return self.validation_step(batch, 0).item()


SPARSE_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"optimizer": optim.SGD},
    "momentum": {"optimizer": optim.SGD, "momentum": 0.5, "dampening": 0.2},
    "nesterov": {"optimizer": optim.SGD, "momentum": 0.5, "nesterov": True},
    "adagrad": {"optimizer": optim.Adagrad, "lr_decay": 0.1},
}


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("settings", SPARSE_SETTINGS)
def test_sparse_embedding_followed_exactly(settings, accumulated):
    def loss_at(lr: float) -> float:
        module = Words(**SPARSE_SETTINGS[settings], lr=lr)
        fit(module, steps=4, accumulate_grad_batches=accumulated)
        assert module.sparse_steps == 4
        return module.error()

    reference = finite_difference(0.1, loss_at)
    for method, make in METHODS.items():
        module, callback = Words(**SPARSE_SETTINGS[settings], lr=0.1), make()
        fit(module, callback, steps=4, accumulate_grad_batches=accumulated)
        assert module.sparse_steps == (4 if method == "recompute" else 0)
        # Differences err by 1e-10 of the loss; see `finite_difference`.
        assert callback.hypergradients["lr"].item() == pytest.approx(reference, rel=1e-6), method


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", SPARSE_SETTINGS)
def test_observer_of_a_sparse_embedding_changes_nothing(settings, method):
    torch.set_default_dtype(torch.float32)
    weights = []
    for callbacks in ([], [METHODS[method]()]):
        module = Words(**SPARSE_SETTINGS[settings], lr=0.1)
        fit(module, *callbacks, steps=8)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    if method == "recompute":
        assert torch.equal(*weights)
    else:  # the dense gradient sums a row's entries in another order
        torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", SPARSE_SETTINGS)
def test_run_of_a_sparse_embedding_is_taken_up_where_it_stands(settings):
    makers = (RTHO, TRHO, lambda *args, **kw: TRHO(*args, tape=KeepGraph(), **kw))
    found = []
    for make in makers:
        callback = make(["lr"], hyper_batch_size=4, start_step=3, outer_optimizer=None)
        fit(Words(**SPARSE_SETTINGS[settings], lr=0.1), callback, steps=7)
        found.append(callback.hypergradients["lr"].item())
    # The methods round differently; nothing else is between them.
    assert found[0] == pytest.approx(found[1], rel=1e-12)
    assert found[0] == pytest.approx(found[2], rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name, method):
    body, message = REFUSED[name]
    with pytest.raises(MisconfigurationException, match=message):
        fit(SmallNet(optim.SGD, body=body, lr=0.1, l2=0.0), METHODS[method](), steps=4)


def test_kept_graphs_that_read_the_weights_anew_are_refused():
    body = FOLLOWED["checkpointed"]
    with pytest.raises(MisconfigurationException, match="activation checkpointing"):
        fit(SmallNet(optim.SGD, body=body, lr=0.1), METHODS["keep graph"](), steps=4)


def test_a_compiled_lightning_module_runs_eagerly_with_a_warning():
    module = torch.compile(SmallNet(lr=0.1), backend="aot_eager")
    with pytest.warns(UserWarning, match="run them eagerly"):
        trainer = fit(module, callback := RTHO(["lr"], hyper_batch_size=2, outer_optimizer=None))
    assert len(callback.schedule) == trainer.global_step // 2


def test_compiled_modules_run_eagerly_with_a_warning():
    with pytest.warns(UserWarning, match="run them eagerly"):
        fit(SmallNet(optim.SGD, body=FOLLOWED["compiled"], lr=0.1), METHODS["forward"](), steps=1)


@pytest.mark.parametrize("name", ["attention", "lstm", "transformer"])
def test_recomputing_observer_changes_nothing(name):
    torch.set_default_dtype(torch.float32)
    weights = []
    for callbacks in ([], [METHODS["recompute"]()]):
        module = SmallNet(optim.Adam, body=FOLLOWED[name], lr=0.01)
        fit(module, *callbacks, steps=8)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


def test_kept_graphs_are_verified_anew_in_each_run():
    callback = METHODS["keep graph"]()
    fit(SmallNet(optim.SGD, body=FOLLOWED["layer norm"], lr=0.1), callback, steps=4)
    with pytest.raises(MisconfigurationException, match="activation checkpointing"):
        fit(SmallNet(optim.SGD, body=FOLLOWED["checkpointed"], lr=0.1), callback, steps=4)


@pytest.mark.parametrize("method", ["forward", "keep graph"])
def test_compiled_functions_run_eagerly(method):
    @torch.compile(backend="aot_eager")
    def error(predicted, target):
        return (predicted - target).square().mean()

    class Compiled(SmallNet):
        loss = staticmethod(error)

        def training_step(self, batch, batch_idx):
            return self.loss(self.net(batch[0]), batch[1])

    class Eager(Compiled):
        loss = staticmethod(F.mse_loss)

    found = []
    for module_class in (Compiled, Eager):
        callback = METHODS[method]()
        fit(module_class(optim.SGD, lr=0.1), callback, steps=4)
        found.append(callback.hypergradients)
    assert found[0] == found[1]


@pytest.mark.parametrize("compiles", ["module", "function"])
def test_a_step_that_is_made_again_is_compiled_as_without_us(compiles):
    graphs: list[Any] = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Compiled(SmallNet):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            inner = self.net if compiles == "module" else lambda x: self.net(x)
            self.fast = torch.compile(inner, backend=backend, fullgraph=True)

        def training_step(self, batch, batch_idx):
            return torch.nn.functional.mse_loss(self.fast(batch[0]), batch[1])

    weights, counts = [], []
    for callbacks in ([], [TRHO(["lr"], hyper_batch_size=2, outer_optimizer=None)]):
        torch.compiler.reset()
        graphs.clear()
        fit(module := Compiled(lr=0.1), *callbacks, steps=25)  # 20 are looked at, eagerly
        weights.append([*module.net.parameters()])
        counts.append(len(graphs))
    assert all(map(torch.equal, *weights))
    assert counts == [1, 1]


def compiled_dropout() -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.Dropout(0.5), nn.Tanh())
    return nn.Sequential(torch.compile(net), nn.Linear(4, 1))  # whose kernels draw otherwise


def test_dropout_in_compiled_modules_is_the_same_when_it_is_computed_again():
    found = {}
    for method, make in METHODS.items():
        fit(SmallNet(optim.SGD, body=compiled_dropout, lr=0.1), callback := make(), steps=4)
        found[method] = callback.hypergradients["lr"].item()
    # One run three times: what is added up in another order.
    assert found == pytest.approx(dict.fromkeys(found, found["forward"]), rel=1e-10)


def compiled_norm() -> nn.Module:
    net = nn.Sequential(nn.Linear(FEATURES, 4), nn.BatchNorm1d(4, momentum=0.4), nn.Tanh())
    return nn.Sequential(torch.compile(net, backend="aot_eager"), nn.Linear(4, 1))


@pytest.mark.parametrize("method", METHODS)
def test_statistics_of_compiled_modules_are_followed(method):
    """A compiled module calls nothing that stands in for a function of torch."""

    def loss_at(lr: float) -> float:
        module = SmallNet(optim.SGD, body=compiled_norm, lr=lr)
        fit(module, steps=4)
        with torch.compiler.set_stance("force_eager"):
            return validation_loss(module)

    callback = METHODS[method]()
    fit(SmallNet(optim.SGD, body=compiled_norm, lr=0.1), callback, steps=4)
    # Differences err by 1e-10 of the loss; see `finite_difference`.
    assert callback.hypergradients["lr"].item() == pytest.approx(
        finite_difference(0.1, loss_at), rel=1e-6
    )


class Turned(nn.Module):
    """Weights that are pairs of numbers, read as complex ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 3)  # of an odd number of weights and biases
        self.turn = nn.Parameter(torch.ones(3, 2))
        self.last = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x) * torch.view_as_complex(self.turn)).abs())


def test_weights_may_be_viewed_as_complex_numbers():
    def loss_at(lr: float) -> float:
        fit(module := SmallNet(optim.SGD, body=Turned, lr=lr, momentum=0.5), steps=4)
        return validation_loss(module)

    for make in (RTHO, TRHO):
        callback = make(["lr", "momentum"], hyper_batch_size=4, outer_optimizer=None)
        fit(SmallNet(optim.SGD, body=Turned, lr=0.1, momentum=0.5), callback, steps=4)
        found = callback.hypergradients["lr"].item()
        assert found == pytest.approx(finite_difference(0.1, loss_at), rel=1e-6)


def test_padding_in_a_table_that_is_shared_is_warned_of():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 3, padding_idx=0)
            self.head = nn.Linear(3, 4)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.table(x[:, 0].abs().long() % 4)).sum(1, keepdim=True)

    with pytest.warns(UserWarning, match="`net.table` shares its weight"):
        fit(SmallNet(optim.SGD, body=Shared, lr=0.1), METHODS["forward"](), steps=4)
