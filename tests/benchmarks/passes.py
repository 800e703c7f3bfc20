"""The gradients and products that a hypergradient is made of, alone: the floor, measured.

No update, no tangents, no Lightning. A method that takes longer than this has that much to save;
one that takes no longer can be beaten on the user's side alone, by a loss with fewer operations.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tests.benchmarks.loops import Problem
from tests.benchmarks.workloads import Batch, Task

__all__ = ["forward_passes", "reverse_passes"]

_Graphs = tuple[Sequence[Tensor], Sequence[Tensor | None]]


def forward_passes(
    task: Task,
    device: torch.device,
    steps: int,
    after_step: Callable[[], None],
    *,
    fraction: float = 1.0,
) -> None:
    """Compute the gradient of each step, and a product with the Hessian for each entry.

    Products are taken on a `fraction` of a batch's examples, beside the gradient of all.
    """
    problem = Problem(task, device)
    vectors = [torch.randn_like(param) for param in problem.params]
    for step, batch in enumerate(itertools.islice(problem.train, steps), start=1):
        if fraction < 1:
            torch.autograd.grad(problem.loss(batch), problem.params)
        grads, direct = _gradients(problem, _part(batch, fraction))
        for leaf, mixed in zip(problem.leaves, direct, strict=True):
            for entry in range(leaf.numel()):
                outputs, along = list(grads), list(vectors)
                if mixed is not None:
                    one_hot = torch.zeros(leaf.numel(), device=device)
                    one_hot[entry] = 1
                    outputs, along = [*outputs, mixed], [*along, one_hot.reshape(leaf.shape)]
                torch.autograd.grad(outputs, problem.params, along, retain_graph=True)
        del grads, direct, outputs, mixed
        if step % task.hyper_batch_size == 0:
            torch.autograd.grad(problem.outer_objective(), problem.params)
        after_step()


def reverse_passes(
    task: Task,
    device: torch.device,
    steps: int,
    after_step: Callable[[], None],
    *,
    recomputes: bool,
    fraction: float = 1.0,
) -> None:
    """Compute the gradient of each step, and a product for each on the way back through a window.

    The graphs of the gradients are kept or, if it `recomputes`, made again on the way back, from a
    `fraction` of a batch's examples.
    """
    problem = Problem(task, device)
    kept: list[tuple[Batch, _Graphs | None]] = []
    for step, batch in enumerate(itertools.islice(problem.train, steps), start=1):
        if recomputes:
            torch.autograd.grad(problem.loss(batch), problem.params)
        kept.append((batch, None if recomputes else _gradients(problem, batch)))
        if step % task.hyper_batch_size == 0:
            vectors = torch.autograd.grad(problem.outer_objective(), problem.params)
            while kept:
                batch, graphs = kept.pop()
                grads, direct = graphs or _gradients(problem, _part(batch, fraction))
                used = [
                    leaf for leaf, d in zip(problem.leaves, direct, strict=True) if d is not None
                ]
                wanted = [*(problem.params if kept else []), *used]
                if wanted:
                    torch.autograd.grad(grads, wanted, vectors)
                del graphs, grads, direct
        after_step()


def _part(batch: Batch, fraction: float) -> Batch:
    """Return the first examples of a batch."""
    return [tensor[: int(fraction * len(tensor))] for tensor in batch]


def _gradients(problem: Problem, batch: Batch) -> _Graphs:
    """Return gradients by the weights and by the hyperparameters, with their graph."""
    inputs = [*problem.params, *problem.leaves]
    found = torch.autograd.grad(problem.loss(batch), inputs, create_graph=True, allow_unused=True)
    return found[: len(problem.params)], found[len(problem.params) :]
