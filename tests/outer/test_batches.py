"""The stream of validation batches: endless, shuffled by itself, and unnoticed."""

import itertools
import multiprocessing
from collections import Counter

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from lightning_rtho.outer import CyclingBatches, NoBatchError

DATA = list(range(10))


class Untouchable(DataLoader):
    """A loader of the user that must not be iterated."""

    @property
    def _index_sampler(self):  # which every iterator asks a loader for
        raise AssertionError("the user's loader was iterated")


class Reversed(torch.utils.data.Sampler):
    """A custom order."""

    def __iter__(self):
        return iter(reversed(DATA))

    def __len__(self):
        return len(DATA)


class Noisy(Dataset):
    """Data that are augmented by global random numbers."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return torch.rand(())


class Stream(IterableDataset):
    """Data without indices."""

    def __iter__(self):
        return iter(DATA)


def _take(stream, count):
    return [batch.tolist() for batch in itertools.islice(stream, count)]


def test_every_cycle_shows_every_sample_once_in_a_new_order():
    stream = CyclingBatches(Untouchable(DATA, batch_size=5), seed=0)
    cycles = [[i for batch in _take(stream, 2) for i in batch] for _ in range(4)]
    assert all(sorted(cycle) == DATA for cycle in cycles)
    assert len({tuple(cycle) for cycle in cycles}) == 4


def test_the_order_is_that_of_the_seed():
    first, again, other = (
        _take(CyclingBatches(Untouchable(DATA, batch_size=4), seed=seed), 9) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


def test_it_is_its_own_iterator():
    stream = CyclingBatches(DataLoader(DATA), seed=0)
    assert iter(stream) is stream


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, {4: 4, 2: 2}), (True, {4: 6})])
def test_the_last_batch_is_dropped_where_the_loader_drops_it(drop_last, sizes):
    stream = CyclingBatches(Untouchable(DATA, batch_size=4, drop_last=drop_last), seed=0)
    assert Counter(len(batch) for batch in _take(stream, 6)) == sizes


def test_batches_are_collated_as_the_loader_collates_them():
    loader = Untouchable(DATA, batch_size=2, collate_fn=lambda samples: -torch.tensor(samples))
    stream = CyclingBatches(loader, seed=0)
    assert sorted(i for batch in _take(stream, 5) for i in batch) == sorted(-i for i in DATA)


def test_a_sampler_of_the_users_own_keeps_its_order():
    stream = CyclingBatches(Untouchable(DATA, batch_size=5, sampler=Reversed()), seed=0)
    assert _take(stream, 3) == [[9, 8, 7, 6, 5], [4, 3, 2, 1, 0], [9, 8, 7, 6, 5]]


def test_a_batch_sampler_of_the_users_own_keeps_its_batches():
    batches = BatchSampler(SequentialSampler(range(3)), batch_size=2, drop_last=False)
    stream = CyclingBatches(Untouchable(DATA, batch_sampler=batches), seed=0)
    assert _take(stream, 3) == [[0, 1], [2], [0, 1]]


def test_samples_without_batches_are_shown_as_they_are():
    stream = CyclingBatches(Untouchable([torch.tensor(i) for i in DATA], batch_size=None), seed=0)
    assert sorted(_take(stream, 10)) == DATA
    assert len(_take(stream, 10)) == 10


@pytest.mark.parametrize(
    "source",
    [[torch.tensor([0]), torch.tensor([1])], DataLoader(Stream(), batch_size=5)],
    ids=["list", "iterable-dataset"],
)
def test_what_has_no_indices_is_cycled_in_its_own_order(source):
    stream = CyclingBatches(source, seed=0)
    first, second, third = _take(stream, 3)
    assert first == third
    assert first != second


@pytest.mark.parametrize("kind", ["iterable", "sampler"])
def test_a_generator_that_training_draws_from_too_is_left_as_it_was(kind):
    generator = torch.Generator().manual_seed(3)
    if kind == "iterable":
        loader = DataLoader(Stream(), batch_size=5, generator=generator)
    else:
        sampler = SubsetRandomSampler(DATA, generator=generator)
        loader = Untouchable(DATA, batch_size=5, sampler=sampler)
    before = generator.get_state()
    stream = CyclingBatches(loader, seed=0)
    cycles = [_take(stream, 2) for _ in range(3)]
    assert torch.equal(generator.get_state(), before)
    if kind == "sampler":  # in a new order each time
        assert cycles[0] != cycles[1] != cycles[2]


class Negating(DataLoader):
    """Does more to a batch than a loader does."""

    def __iter__(self):
        for batch in super().__iter__():
            yield -batch


def test_a_loader_that_changes_batches_is_iterated_itself():
    assert _take(CyclingBatches(Negating(DATA, batch_size=5), seed=0), 2) == [
        [0, -1, -2, -3, -4],
        [-5, -6, -7, -8, -9],
    ]


class Delegating(DataLoader):
    """Stands before another loader, of which it is no copy."""

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __iter__(self):
        return iter(self.inner)


def test_a_loader_that_stands_before_another_is_iterated_itself():
    stream = CyclingBatches(Delegating(DataLoader([0, 1, 2], batch_size=3)), seed=0)
    assert [next(stream).tolist() for _ in range(2)] == [[0, 1, 2]] * 2


def test_a_sampler_of_a_part_of_the_data_is_kept():
    loader = Untouchable(DATA, batch_size=2, sampler=SequentialSampler(range(4)))
    assert _take(CyclingBatches(loader, seed=0), 3) == [[0, 1], [2, 3], [0, 1]]


LOADERS = {
    "sequential": lambda: DataLoader(DATA, batch_size=4),
    "shuffled": lambda: DataLoader(DATA, batch_size=4, shuffle=True),
    "subset": lambda: DataLoader(DATA, batch_size=4, sampler=SubsetRandomSampler(DATA[:6])),
    "weighted": lambda: DataLoader(
        DATA, batch_size=4, sampler=WeightedRandomSampler([0.1] * 10, 8)
    ),
    "unbatched": lambda: DataLoader(torch.arange(10.0), batch_size=None, shuffle=True),
    "augmented": lambda: DataLoader(Noisy(), batch_size=4),
    "iterable": lambda: DataLoader(Stream(), batch_size=4),
    "with workers": lambda: DataLoader(DATA, batch_size=4, num_workers=2),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_global_random_state_is_left_alone(loader):
    source = LOADERS[loader]()
    state = torch.get_rng_state()
    stream = CyclingBatches(source, seed=0)
    _take(stream, 7)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("taken", [0, 2, 3, 5])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_stream_goes_on_where_the_one_that_was_saved_stood(loader, taken):
    old = CyclingBatches(LOADERS[loader](), seed=0)
    _take(old, taken)
    new = CyclingBatches(LOADERS[loader](), seed=1)
    torch.rand(3)  # nor does it matter what the training run draws in between
    new.load_state_dict(old.state_dict())
    assert _take(new, 7) == _take(old, 7)


class Told(Dataset):
    """Tells where it is read."""

    def __len__(self):
        return len(DATA)

    def __getitem__(self, index):
        return index, get_worker_info() is not None


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"batch_size": 3, "drop_last": True}])
def test_a_worker_reads_ahead_in_the_order_in_which_there_is_none(settings):
    known = set(multiprocessing.active_children())
    stream = CyclingBatches(DataLoader(Told(), num_workers=2, **settings), seed=0)
    alone = CyclingBatches(DataLoader(Told(), **settings), seed=0)
    for _ in range(8):
        (found, in_worker), (expected, in_main) = next(stream), next(alone)
        assert found.tolist() == expected.tolist()
        assert in_worker.all()
        assert not in_main.any()
    assert len(set(multiprocessing.active_children()) - known) == 1
    del stream
    assert set(multiprocessing.active_children()) <= known


@pytest.mark.parametrize("persistent", [False, True])
def test_a_worker_sees_what_a_dataset_has_become_if_the_loaders_own_would(persistent):
    class Staged(Dataset):
        stage = 0

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return self.stage

    data = Staged()
    loader = DataLoader(data, batch_size=2, num_workers=1, persistent_workers=persistent)
    stream = CyclingBatches(loader, seed=0)
    seen = []
    for data.stage in range(3):
        seen.append(next(stream)[0].item())
    assert seen == ([0, 0, 0] if persistent else [0, 1, 2])


def _first_of_daemon(queue):
    queue.put(next(CyclingBatches(DataLoader(DATA, batch_size=4, num_workers=1), seed=0)).tolist())


def test_a_daemon_which_may_have_no_children_reads_itself():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_first_of_daemon, args=(queue,), daemon=True)
    process.start()
    expected = next(CyclingBatches(DataLoader(DATA, batch_size=4), seed=0)).tolist()
    assert queue.get(timeout=60) == expected
    process.join()


def test_random_samplers_of_the_users_own_draw_anew_in_each_cycle():
    stream = CyclingBatches(
        DataLoader(DATA, batch_size=10, sampler=SubsetRandomSampler(DATA)), seed=0
    )
    cycles = []
    for _ in range(4):
        torch.manual_seed(0)  # the training run may not draw a number between two cycles
        cycles += _take(stream, 1)
    assert len({tuple(cycle) for cycle in cycles}) == 4


@pytest.mark.parametrize(
    "source",
    [[], DataLoader([]), DataLoader(DATA, batch_size=11, drop_last=True)],
    ids=["list", "no-data", "batch-too-large"],
)
def test_an_empty_source_is_refused(source):
    with pytest.raises(NoBatchError, match="at least one validation batch"):
        next(CyclingBatches(source, seed=0))
