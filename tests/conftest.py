"""Settings that every test shares."""

import functools
import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from lightning.fabric.utilities import registry


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what needs a device that is not there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """What imports and tests are made of stays to the end: no collection needs to look at it."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Numeric claims are checked in float64 unless a test says otherwise."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True, scope="session")
def _quiet() -> None:
    """The trainer's announcements say nothing about a test."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True, scope="session")
def _installed() -> Iterator[None]:
    """Every trainer asks what is installed for callbacks, which is read from the disk but once."""
    with pytest.MonkeyPatch.context() as patch:
        once = functools.cache(registry.entry_points)
        patch.setattr(registry, "entry_points", once)
        yield
