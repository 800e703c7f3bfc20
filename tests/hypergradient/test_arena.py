import torch

from lightning_rtho.hypergradient._arena import Arena, Arenas

CPU = torch.device("cpu")


def test_copies_hold_their_values_and_no_graph_whatever_their_kinds():
    originals = [
        torch.arange(3, dtype=torch.int64),
        torch.randn(5, 2, requires_grad=True),
        torch.randn(4, 3).T,
        torch.randn(2, 2, dtype=torch.bfloat16),
        torch.tensor(2.0),
        torch.eye(2).to_sparse(),
        torch.zeros(0),
    ]
    arena = Arena(CPU, Arena.size_of(originals))
    copies = [arena.copy(original) for original in originals]
    for copy, original in zip(copies, originals, strict=True):
        assert copy.dtype == original.dtype
        assert copy.shape == original.shape
        assert torch.equal(copy.to_dense(), original.to_dense())
        assert not copy.requires_grad
    kept = [copy.clone() for copy in copies]
    with torch.no_grad():
        for original in originals:
            original.mul_(0)
    assert all(torch.equal(a.to_dense(), b.to_dense()) for a, b in zip(copies, kept, strict=True))


def test_what_does_not_fit_is_copied_elsewhere():
    arena = Arena(CPU, 64)
    first = arena.copy(torch.ones(16, dtype=torch.float32))
    second = arena.copy(torch.full([16], 2.0, dtype=torch.float32))
    assert first.tolist() == [1.0] * 16
    assert second.tolist() == [2.0] * 16


def test_arenas_are_used_again_where_they_are_large_enough():
    arenas = Arenas()
    small, large = arenas.take(CPU, 64), arenas.take(CPU, 128)
    where = large.copy(torch.ones(32, dtype=torch.float32)).data_ptr()
    arenas.give_back(large)
    arenas.give_back(small)
    again = arenas.take(CPU, 128)
    assert again.copy(torch.zeros(32, dtype=torch.float32)).data_ptr() == where
    assert len(arenas.take(CPU, 64)) == 64
