"""The data of the examples, as Lightning trains on them: digits, MNIST and frames of speech.

The digits come with scikit-learn. MNIST comes from an archive with the arrays `x_train`, `y_train`,
`x_test` and `y_test`, or from OpenML by scikit-learn; the speech from an archive alone.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset


def split_digits(seed: int) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return 600 images to train on, 600 to validate on, 597 to test on."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, validation, test = (
        TensorDataset(images[part], labels[part])
        for part in (order[:600], order[600:1200], order[1200:])
    )
    return train, validation, test


def digit_loaders(seed: int = 0) -> tuple[DataLoader, DataLoader, TensorDataset]:
    """Return batches of digits to train on and to validate on, and the test images."""
    train, validation, test = split_digits(seed)
    return DataLoader(train, 50, shuffle=True), DataLoader(validation, 200), test


@torch.no_grad()
def error_in_percent(net: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return 100 * (net(images).argmax(dim=1) != labels).float().mean().item()


class Examples(Dataset):
    """Inputs and labels, handed out a batch at a time."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Return a batch."""
        rows = torch.tensor(indices)
        return [self.inputs_of(rows), self.labels[rows]]

    def inputs_of(self, rows: Tensor) -> Tensor:
        """Return the inputs of some examples."""
        return self.inputs[rows]


class Frames(Examples):
    """Frames of speech, each between the five before and the five after it in its utterance."""

    def __init__(
        self, frames: Tensor, labels: Tensor, rows: Tensor, first: Tensor, last: Tensor
    ) -> None:
        super().__init__(frames, labels[rows])
        self.rows, self.first, self.last = rows, first[rows, None], last[rows, None]

    def inputs_of(self, rows: Tensor) -> Tensor:
        """Return windows ``[len(rows), 11 * 123]``."""
        window = self.rows[rows, None] + torch.arange(-5, 6)
        window = window.maximum(self.first[rows]).minimum(self.last[rows])
        return self.inputs[window].flatten(1)


Split = tuple[Examples, Examples, Examples]


def batches_of(data: Examples, size: int, *, shuffle: bool = False) -> DataLoader:
    return DataLoader(data, batch_size=size, shuffle=shuffle, collate_fn=_as_it_is)


def _as_it_is(batch: list[Tensor]) -> list[Tensor]:
    return batch


def load_mnist(
    data: Path | None, seed: int, *, train_size: int = 5000, validation_size: int = 5000
) -> Split:
    """Return images to train on, images to validate on and the 10,000 test images."""
    images, labels = _read_mnist(data)
    order = torch.randperm(60_000, generator=torch.Generator().manual_seed(seed))
    parts = (
        order[:train_size],
        order[train_size : train_size + validation_size],
        torch.arange(60_000, 70_000),
    )
    train, validation, test = (
        Examples(
            torch.tensor(images[part], dtype=torch.float32)[:, None] / 255,
            torch.tensor(labels[part], dtype=torch.int64),
        )
        for part in parts
    )
    return train, validation, test


def _read_mnist(data: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Return 70,000 images and labels, the test images last."""
    if data is None:
        from sklearn.datasets import fetch_openml

        found = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
        return found.data.reshape(-1, 28, 28), found.target.astype(np.int64)
    with np.load(data) as arrays:
        images = np.concatenate([arrays["x_train"], arrays["x_test"]])
        return images, np.concatenate([arrays["y_train"], arrays["y_test"]])


def load_speech(data: Path | None, seed: int, *, neighbours: bool = False) -> Split:
    """Return the frames of 2,400 utterances to train on, of 300 to validate and to test on.

    Labels are states ``[n]``, or ``[n, 3]`` with the phones to the left and to the right.
    """
    if data is None:
        raise SystemExit("The speech has to be at hand: pass `--data spoken_digits.npz`.")
    with np.load(data) as arrays:
        frames = torch.tensor((arrays["x"].astype(np.float32) - arrays["mean"]) / arrays["std"])
        names = ["y_state", "left_phone", "right_phone"] if neighbours else ["y_state"]
        labels = [torch.tensor(arrays[name], dtype=torch.int64) for name in names]
        utterance = torch.tensor(arrays["frame_utt"], dtype=torch.int64)
        offset = torch.tensor(arrays["utt_offset"], dtype=torch.int64)
        part = torch.tensor(arrays["utt_split"])[utterance]
    first, last = offset[utterance], offset[utterance + 1] - 1
    target = torch.stack(labels, dim=1) if neighbours else labels[0]
    train, validation, test = (
        Frames(frames, target, (part == code).nonzero().squeeze(1), first, last)
        for code in (0, 1, 2)
    )
    return train, validation, test
