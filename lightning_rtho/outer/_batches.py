"""An endless stream of validation batches that touches nobody else's state."""

import multiprocessing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
)

__all__ = ["CyclingBatches", "NoBatchError"]


class NoBatchError(ValueError):
    """A loader gave no batch where there must be one."""


class CyclingBatches:
    """Batches of a loader, cycled without end, shuffled anew each cycle by an own generator.

    A ``DataLoader`` is never iterated itself, but a new one over the same data, or a copy: its
    workers and global random state stay as they are. Where it has workers, the new one has one,
    which reads ahead; the order is the same. What a dataset draws at random in a worker is other
    after a resume.

    Args:
        source: A ``DataLoader``, or any iterable that can be iterated again.
        seed: Seed of the order; the same in all processes.
        rank: Number of this process among those that share the data.
        world_size: Number of those processes; each sees a disjoint part.

    Raises:
        NoBatchError: By :meth:`__next__`, if the source gives no batch.

    Example:
        >>> stream = CyclingBatches(DataLoader([0, 1, 2], batch_size=3), seed=0)
        >>> next(stream).sort().values, next(stream).sort().values
        (tensor([0, 1, 2]), tensor([0, 1, 2]))
    """

    def __init__(
        self, source: Iterable[Any], seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._source = _own_loader(source, self._generator, rank, world_size)
        self._iterator: Iterator[Any] = iter(())
        self._order = self._generator.get_state()
        self._taken = 0
        self._noise = torch.get_rng_state()
        # Of the user's own samplers and loaders, which may be those of the training data, too.
        self._others = {g: g.get_state() for g in _generators_of(source)}

    def __iter__(self) -> Iterator[Any]:
        """Return itself."""
        return self

    def __next__(self) -> Any:
        """Return the next batch, beginning a new cycle where one ends."""
        with self._own_random_state():
            for batch in self._iterator:
                self._taken += 1
                return batch
            self._begin_cycle()
            for batch in self._iterator:
                self._taken += 1
                return batch
        raise NoBatchError(
            "`dataloader` must give at least one validation batch each time, got an empty one. "
            "Check its dataset, `batch_size` and `drop_last`; a generator can be read only once."
        )

    def _begin_cycle(self) -> None:
        self._order, self._taken = self._generator.get_state(), 0
        seed = torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        torch.default_generator.manual_seed(int(seed))
        if getattr(self._source, "num_workers", 0) > 0:  # else a loader draws this where it begins
            torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        self._iterator = iter(self._source)

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Let what draws from torch's global generator, or one of the user's, draw from another."""
        present = {generator: generator.get_state() for generator in self._others}
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._noise)
            for generator, state in self._others.items():
                generator.set_state(state)
            try:
                yield
            finally:
                self._noise = torch.get_rng_state()
                for generator, state in present.items():
                    self._others[generator] = generator.get_state()
                    generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: the order of this cycle and the batches taken of it."""
        return {"order": self._order, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where another stream over the same data stood.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self._generator.set_state(state["order"])
        with self._own_random_state():
            self._begin_cycle()
        for _ in range(state["taken"]):
            next(self)


class _Shard(Sampler[int]):
    """Every n-th index of another sampler, as many in each process."""

    def __init__(self, sampler: Sampler[int], length: int, rank: int, world_size: int) -> None:
        self._sampler, self._rank, self._world_size = sampler, rank, world_size
        self._length = length // world_size

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        return islice(islice(self._sampler, self._rank, None, self._world_size), self._length)


def _generators_of(source: Any) -> set[torch.Generator]:
    """Return the generators that a loader and its samplers draw from, but for the global one."""
    batches = getattr(source, "batch_sampler", None)
    holders = (source, getattr(source, "sampler", None), batches, getattr(batches, "sampler", None))
    found = {getattr(holder, "generator", None) for holder in holders}
    return {g for g in found if isinstance(g, torch.Generator) and g is not torch.default_generator}


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    """Copy a loader without what it is iterated by."""
    twin: DataLoader[Any] = object.__new__(type(loader))  # a class may look up what a copy lacks
    # Private: workers that persist, with a place of their own.
    started = {"_iterator": None} if "_iterator" in vars(loader) else {}
    vars(twin).update(vars(loader) | started)
    return twin


def _own_loader(
    source: Iterable[Any], generator: torch.Generator, rank: int, world_size: int
) -> Iterable[Any]:
    """Make a loader over the same data, shuffled by `generator` where the order is free."""
    if not isinstance(source, DataLoader):
        return source
    # A class of the user's may do more to a batch than it was told to. Private, but overridden.
    kind = type(source)
    is_own = (kind.__iter__, kind._get_iterator) != (DataLoader.__iter__, DataLoader._get_iterator)
    if is_own or isinstance(source.dataset, IterableDataset):
        return _twin(source)
    order: dict[str, Any]
    if (
        source.batch_size is None
        or not isinstance(source.sampler, (SequentialSampler, RandomSampler))
        or source.sampler.data_source is not source.dataset
        or len(source.sampler) == 0  # `RandomSampler` refuses an empty dataset in its own words
    ):
        order = (
            {"batch_sampler": source.batch_sampler}
            if source.batch_sampler is not None
            else {"batch_size": None, "sampler": source.sampler}
        )
    else:
        shuffled = RandomSampler(source.dataset, generator=generator)  # type: ignore[arg-type]
        order = {
            "batch_size": source.batch_size,
            "drop_last": source.drop_last,
            "sampler": _Shard(shuffled, len(source.sampler), rank, world_size),
        }
    workers: dict[str, Any] = {"generator": generator}
    if source.num_workers > 0 and not multiprocessing.current_process().daemon:
        # Its seed is the global generator's, which each cycle sets: it draws one when it starts.
        workers = {
            "num_workers": 1,
            # Else it is made anew each cycle, and sees what the dataset has become by then.
            "persistent_workers": source.persistent_workers,
            "worker_init_fn": source.worker_init_fn,
            "multiprocessing_context": source.multiprocessing_context,
            "timeout": source.timeout,
        }
    return DataLoader(source.dataset, collate_fn=source.collate_fn, **order, **workers)
