"""Schedules as JSON files."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["read_json", "write_json"]

_FORMAT = 1


def write_json(path: str | PathLike[str], state: Mapping[str, Any]) -> None:
    """Write the state of a schedule; Python prints each number so that it reads back exactly.

    Args:
        path: The file.
        state: The state of a `Schedule`.
    """
    content = {"format": _FORMAT, **_encode(state)}
    Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_json(path: str | PathLike[str]) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Args:
        path: The file.

    Returns:
        The state of a `Schedule`.

    Raises:
        ValueError: If the file is of another format.
    """
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    if content.pop("format") != _FORMAT:
        raise ValueError(f"its `format` is not {_FORMAT}")
    state: dict[str, Any] = _decode(content)
    return state


def _encode(tree: Any) -> Any:
    """Replace tensors by what they hold and their dtype."""
    if isinstance(tree, Tensor):
        return {"dtype": str(tree.dtype).removeprefix("torch."), "data": tree.tolist()}
    if isinstance(tree, Mapping):
        return {key: _encode(item) for key, item in tree.items()}
    return [_encode(item) for item in tree] if isinstance(tree, list) else tree


def _decode(tree: Any) -> Any:
    """Undo :func:`_encode`."""
    if isinstance(tree, dict):
        if tree.keys() == {"dtype", "data"} and isinstance(tree["dtype"], str):
            return torch.tensor(tree["data"], dtype=getattr(torch, tree["dtype"]))
        return {key: _decode(item) for key, item in tree.items()}
    return [_decode(item) for item in tree] if isinstance(tree, list) else tree
