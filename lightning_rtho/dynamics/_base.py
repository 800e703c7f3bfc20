"""The contract of an update rule: one optimizer step of one parameter, as a pure map."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from lightning_rtho._types import Hypers, State
from lightning_rtho.hyperparameters import Domain

__all__ = ["UpdateRule"]


@dataclass(frozen=True)
class UpdateRule(ABC):
    r"""Update rule Phi of an optimizer family: s' = Phi(s, g, h), elementwise in the parameter.

    A subclass is a frozen dataclass. Its fields are the discrete options of a parameter group
    (``nesterov``, ``maximize``), read from the group by name; its real-valued settings arrive as
    tensors, so that they can be differentiated. It only ever gives derivatives: the update itself
    is made by the torch optimizer, whose arithmetic the rule has to equal.

    Attributes:
        domains: Natural domain of every real-valued setting, by its key in a parameter group; the
            two entries of ``betas`` are called ``beta1`` and ``beta2``.
        buffers: Names of the optimizer's state tensors that belong to Phi, as torch calls them.

    Example:
        >>> import torch
        >>> from lightning_rtho import Positive, UpdateRule
        >>> @dataclass(frozen=True)
        ... class SignDescentRule(UpdateRule):
        ...     domains = {"lr": Positive()}
        ...     def update(self, state, grad, hyper):
        ...         return {"param": state["param"] - hyper["lr"] * grad.sign()}
        >>> state = {"param": torch.zeros(2)}
        >>> SignDescentRule()(state, torch.ones(2), {"lr": torch.tensor(0.1)})
        {'param': tensor([-0.1000, -0.1000])}
    """

    domains: ClassVar[Mapping[str, Domain]]
    buffers: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def from_group(cls, group: Mapping[str, Any], tuned: Collection[str]) -> Self:
        """Read the discrete options of a parameter group.

        Args:
            group: One of the optimizer's ``param_groups``.
            tuned: The settings of this group that are hyperparameters.

        Returns:
            The rule of this group.
        """
        return cls(**{field.name: group[field.name] for field in fields(cls)})

    @classmethod
    def unkept_buffers(cls, group: Mapping[str, Any], tuned: Collection[str]) -> tuple[str, ...]:
        """Name the buffers that the rule has, but torch keeps at other settings only.

        Args:
            group: One of the optimizer's ``param_groups``.
            tuned: The settings of this group that are hyperparameters.

        Returns:
            Names among :attr:`buffers`.
        """
        return ()

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """Return the buffers that torch would create before the first update.

        Args:
            param: The parameter ``[*P]``.
            hyper: Natural settings, each ``[]``.

        Returns:
            Buffers by name, ``[*P]`` or ``[]``.
        """
        return {}

    @abstractmethod
    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """Return the state after one update.

        Args:
            state: ``"param"`` and the buffers, ``[*P]`` or ``[]``.
            grad: Gradient as the optimizer sees it, after clipping ``[*P]``.
            hyper: Natural settings, each ``[]``.

        Returns:
            The new state: ``"param"`` and every buffer.
        """

    def __call__(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """Return the state after one update; buffers missing from `state` are initialized."""
        if len(state) == 1:
            state = {**self.init(state["param"], hyper), **state}
        param, new_state = state["param"], self.update(state, grad, hyper)
        # Only a scalar parameter takes the float64 of the settings; it gets its own dtype back.
        return {
            name: value if value.dim() < param.dim() else value.to(param.dtype)
            for name, value in new_state.items()
        }

    def ascent(self, grad: Tensor) -> Tensor:
        """Turn the gradient of an objective to be maximized into one to be minimized."""
        return -grad if getattr(self, "maximize", False) else grad
