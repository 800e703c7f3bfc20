"""What may have made hypergradients differ from finite differences, in words."""

from collections.abc import Iterator

from lightning_rtho.callbacks._gradcheck._trace import StepTrace

__all__ = ["likely_causes"]


def likely_causes(
    trace: StepTrace, kinked: bool, replayed: bool, objectives: tuple[float, float]
) -> list[str]:
    """Name what may have made hypergradients differ.

    Args:
        trace: What was seen in the run that was followed.
        kinked: Whether finite differences depend on their step size or side.
        replayed: Whether the runs that were followed are those without a hypergradient.
        objectives: Outer objective of two runs that should be the same.

    Returns:
        The causes, the surest first.
    """
    once, again = objectives
    if once != again:
        return [
            "random numbers that no seed fixes: two runs with equal hyperparameters end at "
            f"{once!r} and {again!r}, so finite differences mean nothing. Draw from the global "
            "generators of torch, numpy or Python."
        ]
    causes = list(_seen(trace, replayed))
    if kinked or (trace.kinks and not causes):
        kinks = f": {', '.join(trace.kinks)}" if trace.kinks else ""
        causes.append(
            "a run that is not smooth here, so that finite differences depend on the step or the "
            f"side{kinks}. Check with smooth operations, such as tanh for ReLU, or elsewhere."
        )
    if trace.taken:
        causes.append(
            "a number that is taken out of a graph (`item`, `float`), if it is put back into a "
            f"loss: {'; '.join(trace.taken)}."
        )
    return causes or [
        "not known: neither a `detach`, a custom autograd function, a hook, a change behind the "
        "optimizer's back, randomness nor a kink was seen."
    ]


def _seen(trace: StepTrace, replayed: bool) -> Iterator[str]:
    """Yield what makes hypergradients wrong, wherever they are taken."""
    if not replayed:
        yield (
            "random numbers (or another state) that are not replayed: where `TRHO` runs a step a "
            "second time, it is another step. Draw from the global generators of torch, numpy or "
            "Python, and keep state in buffers."
        )
    if trace.moved:
        yield (
            "weights that change otherwise than by the optimizer, as by clamping them after a "
            "step. The change counts as constant; put it into the loss or the forward pass."
        )
    if trace.detached:
        yield (
            "a `detach`, `torch.no_grad` or `item`, behind which the loss depends on weights or "
            f"hyperparameters unseen: {'; '.join(trace.detached)}. Use "
            "`lightning_rtho.stop_gradient(x)` for `x.detach()`."
        )
    if trace.functions:
        yield (
            f"a custom autograd function: {', '.join(trace.functions)}. Its backward pass must be "
            "the derivative of its forward pass, and differentiable itself. "
            "`lightning_rtho.scale_gradient(x, factor)` scales or reverses gradients."
        )
