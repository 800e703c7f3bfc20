"""What is trained in the benchmarks: Lightning modules with random data of their own."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_rtho import Hyperparameter, Interval, NonNegative, Positive

__all__ = ["WORKLOADS", "Task", "describe", "make_task"]

Batch = Sequence[Tensor]


class Task(L.LightningModule):
    """A network, a loss with hyperparameters in it, an optimizer with others, and random batches.

    The loss is `criterion` of the network's output plus `penalty` of its weights; both read the
    hyperparameters from `hypers`, where loops that are written by hand put tensors of their own.

    Attributes:
        hypers: Hyperparameters by name, each ``[*H]``.
        hyper_batch_size: Optimizer steps between outer updates.
    """

    summary: ClassVar[str]
    """What it is, in one line of a table."""
    methods: ClassVar[tuple[str, ...]]
    """Ways to train it that are compared, by name in ``METHODS``."""
    distinct_batches: ClassVar[int] = 10

    def __init__(
        self, net: nn.Module, hypers: dict[str, Tensor], *, batch_size: int, hyper_batch_size: int
    ) -> None:
        super().__init__()
        self.net = net
        self.hypers = hypers
        self.batch_size, self.hyper_batch_size = batch_size, hyper_batch_size

    @property
    def entries(self) -> int:
        """Number m of hyperparameter entries."""
        return sum(hyper.numel() for hyper in self.hypers.values())

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        """Draw the batch of that number: the input of the network and what `criterion` needs."""
        raise NotImplementedError

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Training loss without penalties ``[]``."""
        return F.cross_entropy(outputs, batch[1])

    def validation_criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Outer objective ``[]``."""
        return F.cross_entropy(outputs, batch[1])

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        """Penalties on the weights of `net`, in its order ``[]``."""
        return 0.0

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch) + self.penalty(list(self.net.parameters()))

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.validation_criterion(self.net(batch[0]), batch)

    def batches(self, seed: int) -> list[Batch]:
        """The distinct batches of a stream."""
        generator = torch.Generator().manual_seed(seed)
        return [self.draw(generator, number) for number in range(self.distinct_batches)]

    def endless_batches(self, seed: int, device: torch.device) -> Iterator[Batch]:
        """Stream of batches on a device, for loops that are written by hand."""
        for batch in itertools.cycle(self.batches(seed)):
            yield [tensor.to(device) for tensor in batch]

    def loader(self, seed: int, batches: int) -> DataLoader:
        """Batches for a trainer, as many as it shall take in one epoch."""
        order = [number % self.distinct_batches for number in range(batches)]
        return DataLoader(self.batches(seed), batch_size=None, sampler=order)


class Phone(Task):
    """Phone classification: five linear layers, SGD with momentum; by default 15.7 M weights."""

    summary = "5-layer ReLU network, 15.7 M weights, batch 200, SGD with momentum"
    methods = (
        "rtho", "forward_loop", "forward_passes", "trho_keep", "trho_recompute", "trho_offload",
        "reverse_loop", "higher", "torchopt", "betty", "keep_passes", "recompute_passes",
        "rtho_quarter", "forward_passes_quarter", "trho_quarter", "recompute_passes_quarter",
        "rtho_bfloat16", "idle", "replay",
    )  # fmt: skip

    def __init__(self, smaller: int = 1, width: int = 2000, hyper_batch_size: int = 5) -> None:
        features, width, classes = 1353 // smaller, width // smaller, 483 // smaller
        sizes = [features, *[width] * 4, classes]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(
            nn.Sequential(*layers[:-1]),
            self.make_hypers(),
            batch_size=200 // smaller,
            hyper_batch_size=hyper_batch_size,
        )
        self.features, self.classes = features, classes

    def make_hypers(self) -> dict[str, Tensor]:
        """Make the hyperparameters."""
        return {
            "lr": Hyperparameter(1e-2, Positive()),
            "momentum": Hyperparameter(0.5, Interval(0, 1)),
            "l2": Hyperparameter(1e-5, Positive()),
            "l1": Hyperparameter(1e-6, Positive()),
        }

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        x = torch.randn(self.batch_size, self.features, generator=generator)
        return x, torch.randint(self.classes, (self.batch_size,), generator=generator)

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        squares = sum(w.square().sum() for w in weights)
        smooth_absolutes = sum((w.square() + 1e-6).sqrt().sum() for w in weights[-4:])
        return self.hypers["l2"] * squares + self.hypers["l1"] * smooth_absolutes

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.net.parameters(), lr=self.hypers["lr"], momentum=self.hypers["momentum"]
        )


class Layers(Phone):
    """The phone network with a learning rate and a weight decay for each layer."""

    summary = "the phone network, a learning rate and a weight decay for each layer"
    methods = ("rtho", "forward_loop", "forward_passes")

    def make_hypers(self) -> dict[str, Tensor]:
        rates = {f"lr{i}": Hyperparameter(1e-2, Positive()) for i in range(5)}
        decays = {f"decay{i}": Hyperparameter(1e-4, NonNegative()) for i in range(5)}
        return rates | decays

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        return 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        linears = [layer for layer in self.net.children() if isinstance(layer, nn.Linear)]
        groups = [
            {
                "params": list(layer.parameters()),
                "lr": self.hypers[f"lr{i}"],
                "weight_decay": self.hypers[f"decay{i}"],
            }
            for i, layer in enumerate(linears)
        ]
        return torch.optim.SGD(groups, momentum=0.5)


class Weighted(Phone):
    """The phone network with m weights for the examples, for curves over m and other sizes."""

    summary = "the phone network, each example's loss weighted by one of m hyperparameters"
    methods = ("rtho", "trho_keep", "trho_recompute")

    def __init__(
        self, smaller: int = 1, width: int = 500, entries: int = 4, hyper_batch_size: int = 5
    ) -> None:
        self._entries = entries
        super().__init__(smaller, width, hyper_batch_size)

    def make_hypers(self) -> dict[str, Tensor]:
        return {"weights": Hyperparameter(torch.ones(self._entries), Positive())}

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        weights = self.hypers["weights"]
        return (
            weights[torch.arange(len(losses), device=losses.device) % len(weights)] * losses
        ).mean()

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        return 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=1e-2, momentum=0.5)


class Cnn(Task):
    """Digits by convolutions: 3.3 M weights, Adam."""

    summary = "two convolutions and two linear layers, 3.3 M weights, batch 50, Adam"
    methods = (
        "rtho", "forward_loop", "forward_passes", "trho_keep", "trho_recompute", "reverse_loop",
        "higher", "torchopt", "betty", "keep_passes", "recompute_passes", "rtho_quarter",
        "forward_passes_quarter", "trho_quarter", "recompute_passes_quarter", "idle", "replay",
    )  # fmt: skip

    def __init__(self, smaller: int = 1, hyper_batch_size: int = 10) -> None:
        first, second, hidden = 32 // smaller, 64 // smaller, 1024 // smaller
        net = nn.Sequential(
            nn.Conv2d(1, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(49 * second, hidden), nn.ReLU(), nn.Linear(hidden, 10),
        )  # fmt: skip
        super().__init__(net, self.make_hypers(), batch_size=50, hyper_batch_size=hyper_batch_size)

    def make_hypers(self) -> dict[str, Tensor]:
        """Make the hyperparameters."""
        return {
            "lr": Hyperparameter(1e-4, Positive()),
            "l2": Hyperparameter(1e-5, Positive()),
        }

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        x = torch.randn(self.batch_size, 1, 28, 28, generator=generator)
        return x, torch.randint(10, (self.batch_size,), generator=generator)

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        return self.hypers["l2"] * sum(w.square().sum() for w in weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=self.hypers["lr"])


class Many(Cnn):
    """The cnn with one weight for each of 5,000 training examples."""

    summary = "the cnn, a weight for each of 5,000 examples"
    methods = (
        "trho_keep", "trho_recompute", "reverse_loop", "higher", "torchopt", "keep_passes",
        "recompute_passes",
    )  # fmt: skip
    distinct_batches = 100

    def make_hypers(self) -> dict[str, Tensor]:
        examples = self.distinct_batches * 50
        return {"weights": Hyperparameter(torch.ones(examples), NonNegative())}

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        first = number * self.batch_size
        return *super().draw(generator, number), torch.arange(first, first + self.batch_size)

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        return (self.hypers["weights"][batch[2]] * losses).mean()

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        return 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=1e-4)


class Decoder(nn.Module):
    """A transformer that predicts the next token."""

    def __init__(self, vocabulary: int, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        # No dropout, so that loops by hand, which draw other random numbers, train the same.
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        return self.head(self.norm(x))


class Transformer(Task):
    """A small decoder: 4 layers, width 256, context 128, AdamW."""

    summary = "decoder of 4 layers, width 256, context 128, 3.7 M weights, batch 8, AdamW"
    methods = (
        "rtho", "forward_loop", "forward_passes", "trho_keep", "trho_recompute", "reverse_loop",
        "keep_passes", "recompute_passes",
    )  # fmt: skip

    def __init__(self, smaller: int = 1, hyper_batch_size: int = 10) -> None:
        self.vocabulary, self.context = 1000, 128 // smaller
        hypers: dict[str, Tensor] = {
            "lr": Hyperparameter(3e-4, Positive()),
            "decay": Hyperparameter(1e-2, NonNegative()),
            "smoothing": Hyperparameter(0.1, Interval(0, 1)),
        }
        vocabulary, context = self.vocabulary, self.context
        super().__init__(
            Decoder(vocabulary, 256 // smaller, 4, context),
            hypers,
            batch_size=8,
            hyper_batch_size=hyper_batch_size,
        )

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        shape = (self.batch_size, self.context + 1)
        tokens = torch.randint(self.vocabulary, shape, generator=generator)
        return tokens[:, :-1], tokens[:, 1:]

    def criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        # `cross_entropy` takes `label_smoothing` as a number alone.
        log_probabilities = outputs.log_softmax(-1)
        likelihood = F.nll_loss(log_probabilities.flatten(0, 1), batch[1].flatten())
        smoothing = self.hypers["smoothing"]
        return (1 - smoothing) * likelihood - smoothing * log_probabilities.mean()

    def validation_criterion(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.net.parameters(), lr=self.hypers["lr"], weight_decay=self.hypers["decay"]
        )


class Small(Task):
    """A model of 1,004 weights: what is measured is the overhead."""

    summary = "1,004 weights, batch 20, Adam"
    methods = ("rtho", "trho_recompute", "replay")

    def __init__(self, smaller: int = 1, hyper_batch_size: int = 10) -> None:
        net = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 4))
        hypers: dict[str, Tensor] = {
            "lr": Hyperparameter(1e-3, Positive()),
            "l2": Hyperparameter(1e-4, Positive()),
        }
        super().__init__(net, hypers, batch_size=20, hyper_batch_size=hyper_batch_size)

    def draw(self, generator: torch.Generator, number: int) -> Batch:
        x = torch.randn(self.batch_size, 20, generator=generator)
        return x, torch.randint(4, (self.batch_size,), generator=generator)

    def penalty(self, weights: Sequence[Tensor]) -> Tensor | float:
        return self.hypers["l2"] * sum(w.square().sum() for w in weights)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.net.parameters(), lr=self.hypers["lr"])


WORKLOADS: dict[str, type[Task]] = {
    "phone": Phone,
    "cnn": Cnn,
    "transformer": Transformer,
    "many": Many,
    "layers": Layers,
    "small": Small,
    "weighted": Weighted,
}


def describe(name: str, options: dict[str, Any]) -> str:
    """Name a workload and the options it is made with."""
    return " ".join([name, *(f"{option}={value}" for option, value in options.items())])


def make_task(name: str, **options: Any) -> Task:
    """Make a workload from the same weights each time."""
    torch.manual_seed(0)
    return WORKLOADS[name](**options)
