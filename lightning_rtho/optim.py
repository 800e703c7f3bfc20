"""A torch optimizer that knows its own update rule."""

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics import (
    Transition,
    UpdateRule,
    get_setting,
    read_hypers,
    read_state,
    rule_class_for,
    set_setting,
)
from lightning_rtho.hyperparameters import Hyperparameter, NonNegative
from lightning_rtho.schedulers import (
    check_schedulers,
    cycled_settings,
    rescale,
    separate_rates,
)

__all__ = ["DifferentiableOptimizer", "adopt_settings"]


@dataclass
class _Site:
    """One place in the optimizer's groups where a hyperparameter acts.

    Attributes:
        group: Number of the group.
        setting: The setting.
        hyperparameter: The hyperparameter.
        written: Its value when it was last written there.
        found: What stood there at first; of a schedule its base.
    """

    group: int
    setting: str
    hyperparameter: Hyperparameter
    written: float = math.nan
    found: float = math.nan


class DifferentiableOptimizer(Optimizer):
    """The user's own torch optimizer, which also tells what each of its steps is about to do.

    Every update is made by the optimizer it wraps, whose groups, state and ``state_dict`` are its
    own; ``isinstance(opt, torch.optim.Adam)`` still holds. Hyperparameters found in the groups are
    replaced there by the numbers they are, so that torch takes the very path it takes for numbers.

    Args:
        optimizer: A torch optimizer with a known update rule.
        schedulers: Schedulers of its learning rate; a tuned rate is the base that they shape.
        tuned: The hyperparameters that will be moved; None for all. Others become the numbers that
            they are.

    Raises:
        TypeError: If there is no rule for its class.
        ValueError: If a hyperparameter is among the weights, is no scalar, or stands where the
            rule has no real-valued setting.

    Example:
        >>> from lightning_rtho import Hyperparameter, Positive
        >>> lr = Hyperparameter(0.1, Positive())
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> optimizer = DifferentiableOptimizer(torch.optim.Adam([weight], lr=lr))
        >>> isinstance(optimizer, torch.optim.Adam), optimizer.hyperparameters == [lr]
        (True, True)
    """

    def __new__(
        cls,
        optimizer: Optimizer,
        schedulers: Sequence[Any] = (),
        tuned: Sequence[Hyperparameter] | None = None,
    ) -> "DifferentiableOptimizer":
        """Make an object that is also an instance of the wrapped optimizer's class."""
        name = f"Differentiable{type(optimizer).__name__}"
        combined = type(name, (DifferentiableOptimizer, type(optimizer)), {})
        return object.__new__(combined)

    def __init__(
        self,
        optimizer: Optimizer,
        schedulers: Sequence[Any] = (),
        tuned: Sequence[Hyperparameter] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self._schedulers = tuple(schedulers)
        self._tuned = tuned
        self.rule_class: type[UpdateRule] = rule_class_for(optimizer)
        self.before_update: Callable[[], None] | None = None
        self.after_update: Callable[[], None] | None = None
        self._sites: list[_Site] = []
        self._known_groups = 0
        self._derivative_buffers: dict[Tensor, State] = {}
        self._take_in_groups()
        if not self._schedulers:
            self.write_hyperparameters()

    def _take_in_groups(self) -> None:
        """Put the numbers that hyperparameters are in their place in groups that are new."""
        if len(self.param_groups) == self._known_groups:
            return
        found = _find_sites(self.optimizer, self.rule_class, first=self._known_groups)
        self._known_groups = len(self.param_groups)
        for site in found:  # a scheduler may have set them
            group = self.param_groups[site.group]
            set_setting(group, site.setting, float(get_setting(group, site.setting)))
        rates = [id(site.hyperparameter) for site in found if site.setting == "lr"]
        if len(set(rates)) < len(rates):
            separate_rates(self._schedulers, self.param_groups)
        for site in found:
            site.hyperparameter.restore()
        found = [site for site in found if self._is_tuned(site.hyperparameter)]
        self._sites += found
        self._check_schedule()
        for site in found:
            site.written, site.found = site.hyperparameter.item(), self._standing(site)

    def _is_tuned(self, hyperparameter: Hyperparameter) -> bool:
        return self._tuned is None or any(hyperparameter is one for one in self._tuned)

    @property
    def hyperparameters(self) -> list[Hyperparameter]:
        """The tuned hyperparameters that act in the optimizer, each once."""
        return [*{id(site.hyperparameter): site.hyperparameter for site in self._sites}.values()]

    @property
    def tuned_settings(self) -> set[str]:
        """The settings, in any group, in whose place a hyperparameter stands."""
        return {site.setting for site in self._sites}

    def acting_as(self, setting: str) -> dict[int, Hyperparameter]:
        """Return the hyperparameters that stand in the place of a setting.

        Args:
            setting: The setting, such as ``"lr"``.

        Returns:
            One for each group that has one there, by the group's number.
        """
        return {s.group: s.hyperparameter for s in self._sites if s.setting == setting}

    @property
    def params(self) -> list[Tensor]:
        """All parameters, in the order of the groups, each ``[*P]``."""
        return [param for group in self.param_groups for param in group["params"]]

    def state_size(self) -> int:
        """Return how many bytes the trained weights and their state take after an update."""
        cpu, size = torch.device("cpu"), 0
        for number, group in enumerate(self.param_groups):
            tuned = {site.setting for site in self._sites if site.group == number}
            rule = self.rule_class.from_group(group, tuned)
            hyper = read_hypers(self.rule_class, group, cpu)
            for param in (p for p in group["params"] if p.requires_grad):
                # Rules are elementwise: one weight tells what is kept of all.
                state = {
                    name: (value.flatten()[:1] if value.dim() else value).to(cpu)
                    for name, value in read_state(self.rule_class, self.optimizer, param).items()
                }
                kept = rule(state, torch.zeros_like(state["param"]), hyper).values()
                size += sum(
                    value.element_size() * (param.numel() if value.dim() else 1) for value in kept
                )
        return size

    def _changed_value(self, site: _Site) -> float:
        """Return what a hyperparameter is now by the number that stands in one of its places."""
        now = self._standing(site)
        if now == site.found:
            return site.written
        is_base = self._is_scheduled(site) and site.found
        return site.written * now / site.found if is_base else now

    def _standing(self, site: _Site) -> float:
        """Return the number that stands in a place; of a schedule its base."""
        group = self.param_groups[site.group]
        present = get_setting(group, site.setting)
        return float(group.get("initial_lr", present) if self._is_scheduled(site) else present)

    def _is_scheduled(self, site: _Site) -> bool:
        """Tell whether a hyperparameter is the base of a schedule, not what stands there."""
        return site.setting == "lr" and bool(self._schedulers)

    def write_hyperparameters(self) -> None:
        """Write the present value of every hyperparameter to where it acts in the groups.

        A learning rate under a schedule takes the whole schedule with it.
        """
        ratios = [1.0] * len(self.param_groups)
        for site in self._sites:
            value = site.hyperparameter.item()
            if self._is_scheduled(site):
                ratios[site.group] = value / (site.written or 1.0)
            else:
                set_setting(self.param_groups[site.group], site.setting, value)
            site.written = value
        if any(ratio != 1 for ratio in ratios):
            rescale(self._schedulers, self.param_groups, ratios)

    def follow_schedulers(self, schedulers: Sequence[Any]) -> None:
        """Go on under other schedulers, as stochastic weight averaging brings in its own.

        Args:
            schedulers: The schedulers of the learning rate from now on.
        """
        if tuple(schedulers) != self._schedulers:
            self._schedulers = tuple(schedulers)
            self._check_schedule()

    @property
    def is_held_down(self) -> bool:
        """Whether schedules hold a tuned learning rate below half of what they lead it up to."""
        groups = [self.param_groups[site.group] for site in self._sites if self._is_scheduled(site)]
        return any(
            float(group["lr"])
            < max(float(group.get(top, 0)) for top in ("initial_lr", "max_lr")) / 2
            for group in groups
        )

    def overwritten_setting(self) -> str | None:
        """Return a tuned setting that someone else has written to, if there is one."""
        for site in self._sites:
            present = get_setting(self.param_groups[site.group], site.setting)
            if not self._is_scheduled(site) and present != site.written:
                return site.setting
        return None

    def _check_schedule(self) -> None:
        """Check that schedulers and tuned settings get along."""
        rates = [site.hyperparameter for site in self._sites if site.setting == "lr"]
        if rates and self._schedulers:
            for rate in rates:
                if rate.item() == 0 or isinstance(rate.domain, NonNegative):
                    raise ValueError(
                        "`lr` cannot be tuned from 0, or to it, under a scheduler, which scales "
                        f"it, got {rate!r}. Give it the domain `Positive()`."
                    )
            all_groups = len(rates) == len(self.param_groups)
            one_rate = all_groups and all(rate is rates[0] for rate in rates)
            check_schedulers(self._schedulers, one_rate)
        cycled = sorted(self.tuned_settings & cycled_settings(self._schedulers))
        if cycled:
            raise ValueError(
                f"`{cycled[0]}` cannot be tuned while a scheduler cycles it. Set "
                "`cycle_momentum=False` in the scheduler."
            )

    def transitions(self, columns: Mapping[int, int]) -> list[Transition]:
        """Describe the update that :meth:`step` would make with the present gradients.

        Args:
            columns: Entry of each tuned hyperparameter in the vector of all, by its ``id``.

        Returns:
            One transition for each parameter that has a gradient.
        """
        self._take_in_groups()  # which the wrapped optimizer may have been given itself
        found, first = [], 0
        for number, group in enumerate(self.param_groups):
            tuned = {
                site.setting: columns[id(site.hyperparameter)]
                for site in self._sites
                if site.group == number and id(site.hyperparameter) in columns
            }
            rule = self.rule_class.from_group(group, tuned)
            slopes = self._slopes(number)
            hypers: dict[torch.device, Hypers] = {}
            for index, param in enumerate(group["params"], start=first):
                if param.grad is None:
                    continue
                if param.device not in hypers:
                    hypers[param.device] = read_hypers(self.rule_class, group, param.device)
                _match_layout(self.state.get(param, {}), param.grad)
                state = read_state(self.rule_class, self.optimizer, param)
                found.append(
                    Transition(
                        index,
                        rule,
                        {**self.derivative_buffers(param), **state},
                        param.grad.to_dense(),
                        hypers[param.device],
                        tuned,
                        slopes,
                        _cohort(number, state, self.state.get(param, {}).get("step")),
                    )
                )
            first += len(group["params"])
        return found

    def _slopes(self, number: int) -> dict[str, float]:
        """Derivatives of a group's settings by the hyperparameters that stand in their place."""
        for site in self._sites:
            if site.group == number and self._is_scheduled(site):
                return {"lr": self.param_groups[number]["lr"] / (site.written or 1.0)}
        return {}

    def carry_derivative_buffers(self, transitions: Sequence[Transition]) -> None:
        """Carry the buffers that only the derivative needs through the coming update.

        At momentum 0 torch keeps no velocity, yet the derivative by momentum needs one. As soon as
        momentum has left 0, torch is handed what the velocity would have been.

        Args:
            transitions: What :meth:`transitions` returned.
        """
        params = self.params
        groups = [group for group in self.param_groups for _ in group["params"]]
        for transition in transitions:
            param = params[transition.index]
            group, tuned = groups[transition.index], transition.columns
            unkept = self.rule_class.unkept_buffers(group, tuned)
            if unkept:
                new_state = transition.rule(transition.state, transition.grad, transition.hyper)
                self._derivative_buffers[param] = {
                    name: new_state[name].clone() for name in unkept if name in new_state
                }
            elif param in self._derivative_buffers:
                self.state[param].update(self._derivative_buffers.pop(param))

    def derivative_buffers(self, param: Tensor) -> State:
        """Return what is kept of a weight for the derivative alone.

        Args:
            param: The weight ``[*P]``.

        Returns:
            Buffers ``[*P]`` by name; none where torch keeps all itself.
        """
        return self._derivative_buffers.get(param, {})

    def set_derivative_buffers(self, param: Tensor, buffers: State) -> None:
        """Go on with buffers that :meth:`derivative_buffers` returned.

        Args:
            param: The weight ``[*P]``.
            buffers: The buffers ``[*P]``, on any device.
        """
        self._derivative_buffers.pop(param, None)
        if buffers:
            self._derivative_buffers[param] = {k: v.to(param.device) for k, v in buffers.items()}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Let the wrapped optimizer step.

        ``before_update`` is called between gradient and update, ``after_update`` after it.

        Args:
            closure: Computes the loss and its gradients.

        Returns:
            What the wrapped optimizer returns.
        """
        if closure is None:
            self._announce(self.before_update)
            result = self.optimizer.step()
        else:

            def announcing_closure() -> Any:
                loss = closure()
                self._announce(self.before_update)
                return loss

            result = self.optimizer.step(announcing_closure)
        self._announce(self.after_update)
        return result

    def _announce(self, listener: Callable[[], None] | None) -> None:
        if listener is not None:
            with torch.no_grad():
                listener()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the wrapped optimizer's state."""
        self.optimizer.load_state_dict(state_dict)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, in which hyperparameters may stand, to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)
        self._take_in_groups()

    def __getattr__(self, name: str) -> Any:
        """Find everything else on the wrapped optimizer."""
        if name == "optimizer":  # not set yet, or not any more, as in unpickling
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __repr__(self) -> str:
        """Show the wrapped optimizer."""
        return f"Differentiable{self.optimizer!r}"

    def __reduce__(self) -> Any:
        """Copy and pickle the wrapped optimizer, and what stands in its groups."""
        kept = ("_schedulers", "_tuned", "_sites", "_known_groups", "_derivative_buffers")
        state = {name: self.__dict__[name] for name in kept}
        return DifferentiableOptimizer, (self.optimizer,), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take back what :meth:`__reduce__` kept; torch's own would add hooks that never run."""
        self.__dict__.update(state)


def adopt_settings(optimizers: Sequence[DifferentiableOptimizer]) -> None:
    """Take over settings that have been changed since, as by a checkpoint that was loaded.

    Under a schedule a rate moves as its base has. What lies outside of the domain, or differs
    between the places of one hyperparameter, is not taken over.

    Args:
        optimizers: All optimizers, since they may share a hyperparameter.
    """
    for hyper in {id(h): h for own in optimizers for h in own.hyperparameters}.values():
        places = [
            (own, site) for own in optimizers for site in own._sites if site.hyperparameter is hyper
        ]
        values = {own._changed_value(site) for own, site in places}
        value = torch.full_like(hyper.plain, min(values))
        is_new = len(values) == 1 and not torch.equal(value, hyper.plain)
        if is_new and bool(hyper.domain.contains(value)):
            hyper.assign(value)
            for _, site in places:
                site.written = hyper.item()


def _find_sites(optimizer: Optimizer, rule_class: type[UpdateRule], first: int = 0) -> list[_Site]:
    """Find where hyperparameters stand in the optimizer's groups, from a first one on."""
    sites = []
    for number, group in enumerate(optimizer.param_groups[first:], start=first):
        for param in group["params"]:
            if isinstance(param, Hyperparameter):
                raise ValueError(
                    f"`params` must hold weights, got {param!r} in group {number}. A "
                    "hyperparameter is no weight: leave it out of what the optimizer trains."
                )
        for key, value in group.items():
            if key == "params":
                continue
            items = (
                zip(("beta1", "beta2"), value, strict=True) if key == "betas" else [(key, value)]
            )
            for setting, item in items:
                if not isinstance(item, Hyperparameter):
                    continue
                if setting not in rule_class.domains:
                    raise ValueError(
                        f"`{setting}` of {type(optimizer).__name__} cannot be a hyperparameter, "
                        f"got {item!r}. It can be any of {', '.join(rule_class.domains)}."
                    )
                if item.numel() != 1:
                    raise ValueError(
                        f"`{setting}` of group {number} must be a scalar, got a hyperparameter of "
                        f"shape {tuple(item.shape)}. Use one parameter group an entry."
                    )
                sites.append(_Site(number, setting, item))
    return sites


def _match_layout(buffers: MutableMapping[str, Any], grad: Tensor) -> None:
    """Make buffers of sparse gradients dense before a dense one comes: torch cannot add it."""
    if not grad.is_sparse:
        dense = {k: v.to_dense() for k, v in buffers.items() if getattr(v, "is_sparse", False)}
        buffers.update(dense)


def _cohort(group: int, state: State, step: Tensor | float | None) -> tuple[int, float] | None:
    """Tell which parameters are at the same step, where that costs no synchronisation."""
    shape = state["param"].shape
    if any(value.shape != shape for name, value in state.items() if name != "step"):
        return None  # other scalar buffers may hold other histories
    if not isinstance(step, Tensor):
        return group, step or 0.0
    return (group, step.item()) if step.device.type == "cpu" else None
