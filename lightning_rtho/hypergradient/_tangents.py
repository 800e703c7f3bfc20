"""Z: tangents of the training state, one for every hyperparameter entry."""

from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_rtho._numerics import sent_to
from lightning_rtho._types import StateTangent
from lightning_rtho.dynamics import Transition
from lightning_rtho.linearization import StatisticUpdate, is_large

__all__ = ["Tangents", "combined"]


@final
class Tangents:
    """Z, the derivative of weights, optimizer state and running statistics by the hyperparameters.

    It is read and written by columns, a range of the hyperparameter entries: all of them, or one at
    a time.

    Args:
        params: All parameters of the optimizer, each ``[*P]``.
        entries: Number m of hyperparameter entries.
        dtype: What it is kept in; None for what the weights are. What is read comes in the dtype of
            the weights.

    Attributes:
        states: Of each parameter's state; tensors that are missing are zero.
        statistics: Of running statistics, by their positions, each ``[m, *B]``; those that are
            missing are zero.

    Example:
        >>> z = Tangents([torch.zeros(2)], 1)
        >>> z.write(0, range(1), {"param": torch.tensor([[3.0, 4.0]])})
        >>> z.lengths(like=torch.zeros(1))
        tensor([5.])
    """

    def __init__(
        self, params: Sequence[Tensor], entries: int, dtype: torch.dtype | None = None
    ) -> None:
        self._params = list(params)
        self._entries = entries
        self._dtype = dtype
        self.clear()

    def clear(self) -> None:
        """Z = 0: nothing depends on the hyperparameters."""
        self.states: list[StateTangent] = [{} for _ in self._params]
        self.statistics: dict[int, Tensor] = {}

    def extend(self, params: Sequence[Tensor]) -> None:
        """Take in parameters that have been constant until now.

        Args:
            params: The parameters, each ``[*P]``.
        """
        self._params += params
        self.states += [{} for _ in params]

    def state_dict(self) -> dict[str, Any]:
        """Return Z, uncopied."""
        return {"tangents": self.states, "statistic_tangents": self.statistics}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over another Z.

        Args:
            state: What :meth:`state_dict` returned, on any device and in any precision.
        """
        self.states = [
            {name: self._kept(value.to(param.device)) for name, value in tangent.items()}
            for tangent, param in zip(state["tangents"], self._params, strict=True)
        ]
        device = self._params[0].device
        self.statistics = {
            buffer: value.to(device) for buffer, value in state["statistic_tangents"].items()
        }

    def of_weights(self) -> list[Tensor | None]:
        """Return dw/dlambda of all parameters, each ``[m, *P]``, as it is kept; None is zero."""
        return [tangent.get("param") for tangent in self.states]

    def along(self, entry: int) -> list[Tensor | None]:
        """Return one column of the weights' part, each ``[*P]``; None is zero.

        Args:
            entry: The hyperparameter entry.
        """
        return [
            _aligned(tangent["param"][entry].to(param.dtype)) if tangent else None
            for tangent, param in zip(self.states, self._params, strict=True)
        ]

    def of_state(self, transition: Transition, columns: range) -> StateTangent:
        """Return columns of a parameter's part, each tensor ``[len(columns), ...]``.

        Args:
            transition: The coming update of the parameter.
            columns: The hyperparameter entries.
        """
        known = self.states[transition.index]
        return {
            name: known[name][columns.start : columns.stop].to(value.dtype)
            if name in known
            else value.new_zeros(len(columns), *value.shape)
            for name, value in transition.state.items()
        }

    def write(self, index: int, columns: range, new: StateTangent) -> None:
        """Write columns of a parameter's part.

        Args:
            index: Position of the parameter.
            columns: The hyperparameter entries.
            new: What to write, each tensor ``[len(columns), ...]``; it may be kept, or have been
                written where it belongs.
        """
        if len(columns) == self._entries:
            self.states[index] = {name: self._kept(value) for name, value in new.items()}
            return
        whole = self.states[index]
        for name, value in new.items():
            if name not in whole:
                whole[name] = self._kept(value[:0]).new_zeros(self._entries, *value.shape[1:])
            part = whole[name][columns.start : columns.stop]
            if part.data_ptr() != value.data_ptr():  # unless it was written in place
                part.copy_(value)

    def _kept(self, tangent: Tensor) -> Tensor:
        """Return a tangent as it is kept; counts ``[m]`` stay as they are."""
        return tangent if self._dtype is None or tangent.dim() < 2 else tangent.to(self._dtype)

    def advance_statistic(
        self, update: StatisticUpdate, columns: range, new: Tensor | None
    ) -> None:
        """Push columns through a running average: r_dot <- (1 - f) r_dot + f s_dot.

        Args:
            update: The average's update.
            columns: The hyperparameter entries.
            new: s_dot ``[len(columns), *B]``; None is zero.
        """
        whole = self.statistics.get(update.buffer)
        if whole is None:
            if new is None:
                return
            whole = new.new_zeros(self._entries, *new.shape[1:])
            self.statistics[update.buffer] = whole
        part = whole[columns.start : columns.stop]
        part *= 1 - update.factor
        if new is not None:
            part += update.factor * new

    def discount(self, factor: float) -> None:
        """Weaken the history: Z <- factor Z.

        Args:
            factor: What is left of it; 0 makes Z empty, so that there are no products with zeros.
        """
        if factor == 0:
            self.clear()
            return
        for tangent in self.states:
            for name, part in tangent.items():  # in place or not, as below
                tangent[name] = part.mul_(factor) if is_large(part[0]) else factor * part
        self.statistics = {buffer: factor * value for buffer, value in self.statistics.items()}

    def combine(self, change: Tensor) -> None:
        """Take other combinations of the columns: Z <- change Z.

        Args:
            change: A regular matrix ``[m, m]``.
        """
        for tangent in self.states:
            for name, part in tangent.items():
                # In place where it is advanced so; what is small may be expanded from few numbers.
                if is_large(part[0]):
                    _combine_rows(change, part)
                else:
                    tangent[name] = combined(change, part)
        for buffer, part in self.statistics.items():
            self.statistics[buffer] = combined(change, part)

    def pulled_back(
        self,
        params: Sequence[Tensor | None],
        statistics: Sequence[Tensor | None],
        chunks: Iterable[range],
    ) -> Tensor:
        """Return alpha Z for a cotangent alpha of the training state ``[m]``, float64.

        Args:
            params: Its part of the weights, each ``[*P]``; None is zero.
            statistics: Its part of the running statistics, each ``[*B]``; None is zero.
            chunks: The columns, as many at a time as shall be read.
        """
        total = torch.zeros(self._entries, dtype=torch.float64)
        tangents = [*self.of_weights(), *(self.statistics.get(i) for i in range(len(statistics)))]
        for tangent, cotangent in zip(tangents, [*params, *statistics], strict=True):
            if tangent is not None and cotangent is not None:
                exact = torch.promote_types(cotangent.dtype, torch.float32)
                vector = cotangent.flatten().to(exact)
                for columns in chunks:
                    part = tangent[columns.start : columns.stop].reshape(len(columns), -1)
                    products = part.to(exact) @ vector
                    total[columns.start : columns.stop] += products.to(total)
        return total

    def lengths(self, like: Tensor) -> Tensor:
        """Return ||dw/dlambda_k|| of every entry k ``[m]``; of the dtype and device of `like`."""
        lengths = [
            tangent.reshape(self._entries, -1).norm(
                dim=1, dtype=torch.promote_types(tangent.dtype, torch.float32)
            )
            for tangent in self.of_weights()
            if tangent is not None
        ]
        if not lengths:
            return torch.zeros(self._entries).to(like)
        joined: Tensor = torch.stack(lengths).norm(dim=0).to(like)
        return joined


def _aligned(row: Tensor) -> Tensor:
    """Copy a row that begins within a pair of numbers, so that it can be viewed as complex."""
    return row.clone() if row.storage_offset() % 2 else row


def combined(weights: Tensor, rows: Tensor) -> Tensor:
    """Combine tangents.

    Args:
        weights: Of each tangent in each combination ``[k, m]``.
        rows: The tangents ``[m, ...]``.

    Returns:
        ``weights @ rows`` ``[k, ...]``, in the dtype of the tangents.
    """
    exact = torch.promote_types(rows.dtype, torch.float32)
    there = sent_to(rows.device, weights, exact)
    result: Tensor = torch.tensordot(there, rows.to(exact), dims=1)
    return result.to(rows)


def _combine_rows(weights: Tensor, rows: Tensor) -> None:
    """Overwrite large rows ``[m, ...]`` by ``weights @ rows``; many weights are those of I."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    lines = [{i: w for i, w in enumerate(line) if w != 0} for line in weights.tolist()]
    found = {}  # of several rows, or of another, while all are what they were
    for row, line in enumerate(lines):
        if line.keys() != {row}:
            (first, weight), *others = line.items()  # regular, so there is one
            found[row] = weight * rows[first].to(exact)
            for other, weight in others:
                found[row].add_(rows[other], alpha=weight)
    for row, line in enumerate(lines):
        if row in found:
            rows[row].copy_(found[row])
        elif line[row] != 1:
            rows[row].mul_(line[row])
