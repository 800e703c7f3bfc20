"""Schedules as tables: a row for the start, then one for each outer update."""

import csv
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_csv", "table", "write_csv"]

_KINDS = {"values": "hyperparameter", "hypergradients": "hypergradient"}
_ENTRY = re.compile(r"(?P<name>.*?)(?:\[(?P<index>\d+(?:,\d+)*)\])?")


def table(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows, each by column; what is not known at the start is None there.

    Args:
        state: The state of a `Schedule`.

    Returns:
        The rows.

    Example:
        >>> table({"start": {"w": torch.tensor([0.5, 1.0])}, "updates": []})
        [{'step': 0, 'hyperparameter/w[0]': 0.5, 'hyperparameter/w[1]': 1.0}]
    """
    rows = [_row(update) for update in state["updates"]]
    if state["start"]:
        start = {"step": 0} | dict(_entries("hyperparameter", state["start"]))
        columns = rows[0] if rows else start
        rows.insert(0, {column: start.get(column) for column in columns})
    return rows


def write_csv(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """Write the table to a file.

    Args:
        path: The file.
        state: The state of a `Schedule`.
    """
    rows = table(state)
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["step"])
        writer.writeheader()
        writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)


def read_csv(path: str | PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_csv` wrote; tensors are float64, domains unknown.

    Args:
        path: The file.

    Returns:
        The state of a `Schedule`.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    state: dict[str, Any] = {"start": {}, "domains": {}, "updates": []}
    for row in rows:
        update: dict[str, Any] = {"step": int(row.pop("step"))}
        for field, kind in _KINDS.items():
            columns = [column for column in row if column.startswith(f"{kind}/")]
            update[field] = _tensors({c.removeprefix(f"{kind}/"): row.pop(c) for c in columns})
        if update["step"] == 0:
            state["start"] = update["values"]
        else:
            update["outer_objective"] = float(row["outer_objective"] or "nan")
            update["sensitivity"] = float(row["sensitivity"] or "nan")
            update["safeguard"] = row["safeguard"] or None
            update["restored_step"] = int(row["restored_step"]) if row["restored_step"] else None
            state["updates"].append(update)
    return state


def _cell(value: Any) -> str:
    """Write numbers as they read back exactly, text as it is, what is not known as nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    return "" if math.isnan(value) else repr(value)


def _row(update: Mapping[str, Any]) -> dict[str, Any]:
    row = {key: value for key, value in update.items() if key not in _KINDS}
    for field, kind in _KINDS.items():
        row |= dict(_entries(kind, update[field]))
    return row


def _entries(kind: str, values: Mapping[str, Tensor]) -> Iterator[tuple[str, float]]:
    """Yield each entry of each hyperparameter with the name of its column."""
    for name, value in values.items():
        for index in itertools.product(*map(range, value.shape)):
            entry = f"[{','.join(map(str, index))}]" if index else ""
            yield f"{kind}/{name}{entry}", value[index].item()


def _tensors(entries: Mapping[str, str]) -> dict[str, Tensor]:
    """Put entries together again."""
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for key, text in entries.items():
        match = _ENTRY.fullmatch(key)
        assert match is not None
        index = tuple(int(i) for i in (match["index"] or "").split(",") if i)
        found.setdefault(match["name"], {})[index] = float(text or "nan")
    return {
        name: torch.tensor(list(parts.values()), dtype=torch.float64).reshape(
            [last + 1 for last in max(parts)]  # entries stand in the order of their indices
        )
        for name, parts in found.items()
    }
