"""The global random state as plain values, which a checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection

__all__ = ["read_random_state", "write_random_state"]


def read_random_state() -> dict[str, Any]:
    """Read the random state of torch on the CPU, CUDA and MPS, of numpy and of Python.

    Returns:
        Tensors, numbers and lists.
    """
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "mps": [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else [],
        "python": [version, list(words), gauss],
        # Of any of its generators; they take lists for the arrays that they give.
        "numpy": apply_to_collection(
            np.random.get_state(legacy=False), np.ndarray, np.ndarray.tolist
        ),
    }


def write_random_state(state: dict[str, Any]) -> None:
    """Write what :func:`read_random_state` read.

    Args:
        state: The state.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        # A checkpoint may come from a machine with more devices.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if state["mps"] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"][0])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
