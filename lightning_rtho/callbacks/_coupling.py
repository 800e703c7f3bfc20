"""Which hyperparameters act together in an optimizer."""

from collections import Counter
from collections.abc import Sequence

from lightning_rtho.hyperparameters import Hyperparameter, Interval, NonNegative, Positive
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import Coordinates

__all__ = ["decoupled_coordinates", "learning_rates"]


def learning_rates(
    hypers: Sequence[Hyperparameter], optimizers: Sequence[DifferentiableOptimizer]
) -> list[int]:
    """Return the positions of the hyperparameters that act as learning rates.

    Args:
        hypers: The hyperparameters, each ``[*H]``.
        optimizers: Optimizers that some of them act in.

    Returns:
        The positions, in order.
    """
    rates = {id(rate) for o in optimizers for rate in o.acting_as("lr").values()}
    return [position for position, hyper in enumerate(hypers) if id(hyper) in rates]


def decoupled_coordinates(
    hypers: Sequence[Hyperparameter], optimizers: Sequence[DifferentiableOptimizer]
) -> Coordinates:
    """Return raw coordinates in which learning rate and momentum do not get in each other's way.

    A rate is coupled to the ``momentum`` of its parameter groups, if that is one hyperparameter
    that belongs to no other rate, and if the rate cannot leave its domain by that. Momentum and
    Adam's beta1, which does not change the length of a lasting step, move less far than the others.

    Args:
        hypers: The hyperparameters, each ``[*H]``.
        optimizers: Optimizers that some of them act in.

    Returns:
        The coordinates.
    """
    positions = {id(hyper): position for position, hyper in enumerate(hypers)}
    pairs: set[tuple[int, int]] = set()
    slow: set[int] = set()
    for optimizer in optimizers:
        rates, momenta = optimizer.acting_as("lr"), optimizer.acting_as("momentum")
        for hyper in (*momenta.values(), *optimizer.acting_as("beta1").values()):
            slow |= {positions[id(hyper)]} if id(hyper) in positions else set()
        for group in rates.keys() & momenta.keys():
            rate, momentum = rates[group], momenta[group]
            if {id(rate), id(momentum)} <= positions.keys() and _can_be_coupled(rate, momentum):
                pairs.add((positions[id(rate)], positions[id(momentum)]))
    uses = Counter(position for pair in pairs for position in pair)
    couplings = sorted(pair for pair in pairs if all(uses[position] == 1 for position in pair))
    return Coordinates(hypers, couplings, slow)


def _can_be_coupled(rate: Hyperparameter, momentum: Hyperparameter) -> bool:
    """Tell whether a rate stays in its domain, whatever it and its momentum are moved to."""
    within = momentum.domain
    below_one = isinstance(within, Interval) and within.low >= 0 and within.high <= 1
    return below_one and isinstance(rate.domain, Positive | NonNegative)
