"""What forward and reverse mode have in common: they follow a training run step by step."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_rtho._numerics import HOST, are_finite, sent_to
from lightning_rtho.dynamics import Transition, UpdateRule
from lightning_rtho.linearization import GradientClip, TracedLoss

__all__ = [
    "AbstractHypergradient",
    "Fault",
    "GradientMismatchError",
    "OptimizerStep",
    "OuterGradient",
    "Recollection",
    "Replay",
    "add",
]


class Replay(Protocol):
    """Computes the loss of a micro-batch again, at the weights that stand in the parameters now.

    Attributes:
        is_sample: Whether it computes an estimate of the loss, on some of the examples. Then
            products are taken with its Hessian, and the optimizer's gradient is another one.
    """

    is_sample: bool

    def __call__(self) -> TracedLoss:
        """Compute the loss."""

    def state_dict(self) -> dict[str, Any] | None:
        """Return what the loss depends on, in plain values; None if that cannot be had."""


@dataclass(frozen=True)
class Recollection:
    """What is not in a checkpoint but in the resumed run, to read a window of steps by.

    Attributes:
        rule_class: Update rule of the optimizer.
        make_replay: Makes a replay of what its ``state_dict`` returned.
    """

    rule_class: type[UpdateRule]
    make_replay: Callable[[dict[str, Any]], Replay]


class GradientMismatchError(RuntimeError):
    """The optimizer saw another gradient than that of the traced loss: nothing can be followed."""


@dataclass(frozen=True)
class OptimizerStep:
    """One step of the optimizer, about to be made.

    Attributes:
        transitions: One for each parameter that has a gradient; none where the step is skipped.
        raw_grads: Their gradients before clipping, each ``[*P]``.
        clip: The clipping between raw gradients and those in `transitions`.
        number: How many steps the run has made before.
        is_traced: Whether the gradients are the very tensors that
            :meth:`AbstractHypergradient.record` returned, and stay what they are, or are equal to
            them, as a boolean ``[]`` that the host need not know yet; False if someone has written
            to them; None if they are others, which may be equal.
        precision: The coarsest dtype that its losses were computed in, where that is not that of
            the gradients.
    """

    transitions: Sequence[Transition]
    raw_grads: Sequence[Tensor]
    clip: GradientClip | None = None
    number: int = 0
    is_traced: bool | Tensor | None = None
    precision: torch.dtype | None = None


class Fault(NamedTuple):
    """A step whose derivative is not finite.

    Attributes:
        step: The step's number.
        cause: What was not finite.
    """

    step: int
    cause: str


@dataclass
class OuterGradient:
    """Outer objective E and its partial derivatives at the present weights.

    Attributes:
        value: E ``[]``.
        params: dE/dw, each ``[*P]``; None is zero.
        hypers: The direct part dE/dlambda at fixed weights, each ``[*H]``; None is zero.
        statistics: dE/dr by the running statistics of the module, each ``[*B]``; None is zero.
    """

    value: Tensor
    params: Sequence[Tensor | None]
    hypers: Sequence[Tensor | None]
    statistics: Sequence[Tensor | None] = ()

    def release_params(self) -> list[Tensor | None]:
        """Return dE/dw and let go of it, so that it need not outlive its use."""
        params, self.params = list(self.params), ()
        return params

    @functools.cached_property  # since the derivatives by the weights may be released
    def is_finite(self) -> bool:
        """Whether the value and its derivatives by weights and hyperparameters are finite."""
        parts = [part for part in (self.value, *self.params, *self.hypers) if part is not None]
        return bool(are_finite(parts))


class AbstractHypergradient(ABC):
    """Follows a training run and gives dE/dlambda along it.

    Call :meth:`record` for each micro-batch's loss, :meth:`advance` before each optimizer step,
    and :meth:`hypergradient` after any step.

    Args:
        params: All weights that the loss may depend on and that move, each ``[*P]``; transitions
            name them by their positions here.
        hypers: The hyperparameters, natural values, each ``[*H]``; those that may act in the loss
            require grad. Together they have m entries.

    Attributes:
        keeps_history: Whether a hypergradient looks behind the last one.
        needs_replay: Whether losses are computed again.
    """

    keeps_history: ClassVar[bool]
    needs_replay: bool

    def __init__(self, params: Sequence[Tensor], hypers: Sequence[Tensor]) -> None:
        self.params = list(params)
        self.hypers = list(hypers)
        self.sizes = [hyper.numel() for hyper in hypers]

    @property
    def entries(self) -> int:
        """Number m of hyperparameter entries."""
        return sum(self.sizes)

    def extend(self, params: Sequence[Tensor]) -> None:
        """Take in parameters that the optimizer trains from now on.

        Args:
            params: The parameters, each ``[*P]``; until now they were constant.
        """
        self.params += params

    @abstractmethod
    def forget_gradients(self, indices: Iterable[int]) -> None:
        """Begin the gradients of some parameters anew, since the run has cleared them.

        An optimizer step clears those that it uses.

        Args:
            indices: Positions of the parameters.
        """

    @abstractmethod
    def start(self, buffers: Iterable[Tensor] = ()) -> None:
        """Prepare for the forward pass of a training step.

        Args:
            buffers: What forward passes may overwrite, each ``[*B]``.
        """

    @abstractmethod
    def record(self, loss: TracedLoss, replay: Replay | None) -> list[Tensor | None] | None:
        """Take in the loss of one micro-batch, before its backward pass.

        Args:
            loss: The loss with its graph, scaled as it enters the optimizer's gradient.
            replay: Computes it again; may be None unless :attr:`needs_replay`.

        Returns:
            The gradients by the parameters, scaled as the loss is, where they were computed on
            the way, each ``[*P]`` or None; None where they were not.
        """

    @abstractmethod
    def settle(self) -> None:
        """Take from the losses so far what would be lost if anything but weights moved now.

        For a batch that ends without an optimizer step.
        """

    @abstractmethod
    def advance(self, step: OptimizerStep) -> None:
        """Take in an optimizer step, before it is made.

        Args:
            step: The step; its tensors are read now and may change afterwards.
        """

    @abstractmethod
    def hypergradient(self, outer: OuterGradient) -> Tensor:
        """Return the total derivative of the outer objective by all hyperparameters.

        Args:
            outer: Derivatives of the outer objective at the weights after the last step; those by
                the weights may be released.

        Returns:
            dE/dlambda with respect to natural values ``[m]``, float64.

        Raises:
            GradientMismatchError: If a step's gradient was not that of its recorded losses.
        """

    @abstractmethod
    def transport(self, old: Tensor, new: Tensor) -> None:
        """Take the history along to other values of the hyperparameters.

        Args:
            old: Jacobian of natural by raw values before they moved ``[m, m]``.
            new: The same where they are now ``[m, m]``.
        """

    def weight_tangents(self) -> list[Tensor | None]:
        """Return dw/dlambda of all parameters, each ``[m, *P]``; None is zero, or not known."""
        return [None] * len(self.params)

    def sensitivity(self, slopes: Tensor) -> float:
        """Return how strongly the weights depend on the hyperparameters, in lengths of the weights.

        Args:
            slopes: dlambda/du, natural values by the coordinate u in which a change counts ``[m]``.

        Returns:
            The largest ||dw/du|| / ||w|| of the m entries; NaN where it is not known.
        """
        return math.nan

    @abstractmethod
    def reset(self) -> None:
        """Forget the run so far: the present state no longer depends on the hyperparameters."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what is known of the run so far, in tensors, numbers, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any], recollection: Recollection) -> None:
        """Go on from where another one of the same kind stood.

        Args:
            state: What :meth:`state_dict` returned.
            recollection: What belongs to the state but is not in it.
        """

    @abstractmethod
    def take_faults(self) -> list[Fault]:
        """Return the steps since the last call whose derivative is not finite.

        Returns:
            The steps, from first to last.
        """

    def _flat(self, parts: Sequence[Tensor | None], device: torch.device = HOST) -> Tensor:
        """Join one tensor a hyperparameter, each ``[*H]`` or None, to ``[m]``, float64."""
        return torch.cat([
            torch.zeros(size, dtype=torch.float64, device=device)
            if part is None
            else sent_to(device, part.detach().flatten(), torch.float64)
            for part, size in zip(parts, self.sizes, strict=True)
        ])


def add(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    """Sum of two tensors of one shape, in which None is zero."""
    if total is None or part is None:
        return part if total is None else total
    return total + part
