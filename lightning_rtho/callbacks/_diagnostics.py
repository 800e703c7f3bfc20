"""What can be looked at while a run is followed, beside values and hypergradients."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, final

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rtho.callbacks._metrics import logged_step

__all__ = ["Diagnostic", "Diagnostics", "cosine", "split_tangents", "tangent_norms"]

Diagnostic = Literal["hypergradient_cosine", "tangent_histogram", "tangent_norm"]
"""Names of diagnostics."""


@final
class Diagnostics:
    """Measures at outer updates what was asked for; nothing is changed, and nothing done unasked.

    Args:
        names: What is asked for.
        known: What the method can tell.
        method: Its name.

    Raises:
        TypeError: If `names` is one name rather than several.
        ValueError: If the method cannot tell what is asked for.
    """

    def __init__(self, names: Collection[str], known: Sequence[str], method: str) -> None:
        if isinstance(names, str):
            raise TypeError(
                f"`diagnostics` must be a list of names, got {names!r}. Pass [{names!r}]."
            )
        for name in names:
            if name not in known:
                advice = " `RTHO` alone carries tangents." if name.startswith("tangent") else ""
                raise ValueError(
                    f"`diagnostics` of {method} must be among {', '.join(known)}, got {name!r}."
                    f"{advice}"
                )
        self._names = frozenset(names)

    def __bool__(self) -> bool:
        """Tell whether anything is asked for."""
        return bool(self._names)

    def start(self, trainer: Trainer) -> None:
        """Warn where histograms are asked for that no logger takes.

        Args:
            trainer: The trainer, about to train.
        """
        if "tangent_histogram" in self._names and not _histogram_writers(trainer):
            rank_zero_warn(
                "`diagnostics` asks for 'tangent_histogram', but no logger of the trainer takes "
                "histograms. Use `Trainer(logger=TensorBoardLogger(...))`; this is said once."
            )

    def scalars(
        self,
        hypergradients: Mapping[str, Tensor],
        last: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor | None],
    ) -> dict[str, float]:
        """Measure what is a number.

        Args:
            hypergradients: dE/dlambda by the names of the hyperparameters, each ``[*H]``.
            last: Those of the last update; empty if there was none.
            tangents: dw/dlambda by the names of the weights, each ``[m, *P]``; None is zero.

        Returns:
            The numbers, under the names by which they are logged.
        """
        found = {}
        if "hypergradient_cosine" in self._names and last:
            found["hypergradient_cosine"] = cosine([*hypergradients.values()], [*last.values()])
        if "tangent_norm" in self._names:
            norms = tangent_norms(tangents, _sizes(hypergradients))
            found |= {f"tangent_norm/{name}": norm for name, norm in norms.items()}
        return found

    def write_histograms(
        self,
        trainer: Trainer,
        hypergradients: Mapping[str, Tensor],
        tangents: Mapping[str, Tensor | None],
    ) -> None:
        """Hand histograms of dw/dlambda in each layer to the loggers that take them.

        Args:
            trainer: The trainer.
            hypergradients: As :meth:`scalars`.
            tangents: As :meth:`scalars`.
        """
        if "tangent_histogram" not in self._names or not trainer.is_global_zero:
            return
        for write in _histogram_writers(trainer):
            for hyper, weight, part in split_tangents(tangents, _sizes(hypergradients)):
                finite = part[part.isfinite()].cpu().double()
                if finite.numel() > 0:
                    write(f"tangent_histogram/{hyper}/{weight}", finite, logged_step(trainer))


def cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """Return the cosine of the angle between two vectors, each given in parts.

    Args:
        first: Its parts, each ``[*H]``.
        second: Its parts, of the same shapes.

    Returns:
        <a, b> / (||a|| ||b||); NaN where one is zero.

    Example:
        >>> cosine([torch.tensor([3.0, 0.0])], [torch.tensor([1.0, 1.0])])
        0.7071...
    """
    a, b = (
        torch.cat([part.flatten().cpu().double() for part in parts]) for parts in (first, second)
    )
    return float(a @ b / (a.norm() * b.norm()))


def tangent_norms(
    tangents: Mapping[str, Tensor | None], sizes: Mapping[str, int]
) -> dict[str, float]:
    """Return ||dw/dlambda|| over all weights and the entries of each hyperparameter.

    Args:
        tangents: dw/dlambda by the names of the weights, each ``[m, *P]``; None is zero.
        sizes: Entries of each hyperparameter, by its name, m together.

    Returns:
        The norms by the names of the hyperparameters.

    Example:
        >>> tangent_norms({"weight": torch.tensor([[3.0, 4.0], [0.0, 1.0]])}, {"lr": 1, "l2": 1})
        {'lr': 5.0, 'l2': 1.0}
    """
    squares = dict.fromkeys(sizes, 0.0)
    for hyper, _, part in split_tangents(tangents, sizes):
        exact = torch.promote_types(part.dtype, torch.float32)
        squares[hyper] += part.norm(dtype=exact).item() ** 2
    return {hyper: square**0.5 for hyper, square in squares.items()}


def split_tangents(
    tangents: Mapping[str, Tensor | None], sizes: Mapping[str, int]
) -> Iterator[tuple[str, str, Tensor]]:
    """Split dw/dlambda by hyperparameters.

    Args:
        tangents: As :func:`tangent_norms`.
        sizes: As :func:`tangent_norms`.

    Yields:
        Names of hyperparameter and weight, and the derivative of this by that ``[h, *P]``.
    """
    for weight, tangent in tangents.items():
        if tangent is not None:
            parts = tangent.split([*sizes.values()])
            yield from ((hyper, weight, part) for hyper, part in zip(sizes, parts, strict=True))


def _sizes(values: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: value.numel() for name, value in values.items()}


def _histogram_writers(trainer: Trainer) -> list[Callable[..., Any]]:
    """Return the functions by which loggers take histograms, as TensorBoard's does."""
    experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
    writers = [getattr(experiment, "add_histogram", None) for experiment in experiments]
    return [writer for writer in writers if writer is not None]
