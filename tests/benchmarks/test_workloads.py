"""Every workload runs, and every method gives the hypergradient that the others give."""

import pytest
import torch

from tests.benchmarks.floor import floor
from tests.benchmarks.methods import METHODS, available_methods
from tests.benchmarks.workloads import WORKLOADS, make_task

CPU = torch.device("cpu")
WITHOUT_HYPERGRADIENT = (
    "idle", "replay", "forward_passes", "keep_passes", "recompute_passes",
    "forward_passes_quarter", "recompute_passes_quarter",
)  # fmt: skip
BELOW_THE_FLOOR = ("rtho_quarter", "trho_quarter", "rtho_bfloat16")
"""Methods that give an estimate; tests of their own hold it against the exact one."""
OTHER_ADAM = [("cnn", "higher"), ("many", "higher")]
"""Peers whose eps stands elsewhere than that of torch, which decides where gradients are tiny."""


@pytest.fixture(autouse=True)
def _float32() -> None:
    """As the benchmarks run; the next test sets its own."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_all_methods_give_the_same_hypergradient(workload: str) -> None:
    results = {}
    for method in available_methods(WORKLOADS[workload], CPU):
        calls = []
        task = make_task(workload, smaller=8, hyper_batch_size=3)
        results[method] = METHODS[method](task, CPU, 3, lambda calls=calls: calls.append(1))
        assert len(calls) == 3
    reference = results.pop("rtho" if "rtho" in results else "trho_recompute")
    assert reference is not None
    assert reference.any()
    for method, result in results.items():
        if (workload, method) in OTHER_ADAM:
            assert result.isfinite().all()
        elif method not in (*WITHOUT_HYPERGRADIENT, *BELOW_THE_FLOOR):
            # float32, whose rounding Adam's quotient enlarges
            torch.testing.assert_close(
                result.double(), reference, rtol=1e-2, atol=1e-3 * reference.abs().max().item(),
                msg=lambda text, method=method: f"{method}: {text}",
            )  # fmt: skip


def test_the_floor_is_that_of_counted_passes() -> None:
    assert floor("rtho", entries=4, hyper_batch_size=5) == 9
    assert floor("trho_keep", entries=4, hyper_batch_size=5) == pytest.approx(2.6)
    assert floor("trho_recompute", entries=4, hyper_batch_size=5) == pytest.approx(3.6)
    assert floor("rtho_quarter", entries=4, hyper_batch_size=5) == 3.25
    assert floor("trho_quarter", entries=4, hyper_batch_size=5) == pytest.approx(1.65)
