"""Which hyperparameters a callback tunes."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.optim import Optimizer

from lightning_rtho.dynamics import get_setting, rule_class_for, set_setting
from lightning_rtho.hyperparameters import Domain, Hyperparameter, declared_hyperparameters

__all__ = ["Selection", "select_hyperparameters", "warn_of_vanished"]

Selection = Sequence[str] | Mapping[str, Domain] | None
"""What the user asked for: names, names with domains, or all that the module declares."""


def select_hyperparameters(
    selection: Selection, module: LightningModule, optimizers: Sequence[Optimizer]
) -> dict[str, Hyperparameter]:
    """Find the hyperparameters to tune and place those of the optimizer in its groups.

    A name is one that the module declares, or else a key of the optimizer's parameter groups. What
    has a shape is moved to where the module is.

    Args:
        selection: Names, names with domains, or None for all that the module declares.
        module: The module.
        optimizers: Its torch optimizers; of several, the settings cannot be named.

    Returns:
        Hyperparameters by name; ``lr/pg1``, ``lr/pg2``, ... where there are several groups.

    Raises:
        MisconfigurationException: If there is nothing to tune, or nobody knows what a copy is of.
        ValueError: If a name is neither, if it could be a setting of several optimizers, or if
            its start value is outside its domain.
    """
    declared = declared_hyperparameters(module)
    _reunite(declared, optimizers)
    if selection is not None and not selection:
        raise MisconfigurationException(
            f"`hyperparameters` must name at least one, got {selection!r}. Leave it out to tune "
            "all that the module declares."
        )
    if selection is None and not declared:
        raise MisconfigurationException(
            f"`{type(module).__name__}` declares no hyperparameters. Declare one, as in "
            "`self.lr = Hyperparameter(1e-3, Positive())`, or name settings of its optimizer, as "
            "in `RTHO(['lr'])`. (`Tuner.lr_find` puts a number in the place of one.)"
        )
    if selection is None:
        _warn_of_undeclared(declared, optimizers)
    found = declared if selection is None else _chosen(selection, declared, optimizers)
    for hyper in found.values():
        hyper.place(module.device)
    return found


def warn_of_vanished(names: Collection[str]) -> None:
    """Warn of hyperparameters in whose place something else stands by now.

    Args:
        names: Those that the module has declared, and declares no more.
    """
    for name in sorted(names):
        rank_zero_warn(
            f"`{name}` was declared as a hyperparameter, but something else stands in its place "
            "by now, as `LearningRateFinder` puts a number there, so it is not tuned. Where it is "
            f"a setting of the optimizer, name it beside the others, as in `RTHO([{name!r}])`."
        )


def _warn_of_undeclared(
    declared: Mapping[str, Hyperparameter], optimizers: Sequence[Optimizer]
) -> None:
    """Warn of hyperparameters of the optimizers that the module does not declare."""
    for _, name, present in _undeclared(declared, optimizers):
        rank_zero_warn(
            f"The optimizer's `{name}` is {present!r}, which the module does not declare, so it is "
            "not tuned. If it shall be, make it an attribute of the module, as in "
            f"`self.{name} = Hyperparameter(...)`."
        )


def _undeclared(
    declared: Mapping[str, Hyperparameter], optimizers: Sequence[Optimizer]
) -> Iterator[tuple[dict[str, Any], str, Hyperparameter]]:
    """Yield hyperparameters that the module does not declare: their group, setting, and value."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name in rule_class_for(optimizer).domains:
                present = get_setting(group, name)
                is_known = any(present is hyper for hyper in declared.values())
                if isinstance(present, Hyperparameter) and not is_known:
                    yield group, name, present


def _chosen(
    selection: Sequence[str] | Mapping[str, Domain],
    declared: Mapping[str, Hyperparameter],
    optimizers: Sequence[Optimizer],
) -> dict[str, Hyperparameter]:
    """Return the hyperparameters that are named, those of the optimizer placed in its groups."""
    found: dict[str, Hyperparameter] = {}
    domains = selection if isinstance(selection, Mapping) else dict.fromkeys(selection)
    for name, domain in domains.items():
        if name not in declared:
            if len(optimizers) > 1:
                raise ValueError(
                    f"`hyperparameters` names {name!r}, which the module does not declare, and "
                    f"there are {len(optimizers)} optimizers that it could be a setting of. "
                    "Declare a `Hyperparameter` and hand it to the one you mean."
                )
            found.update(_place(name, domain, optimizers[0], declared))
        elif domain is None or domain == declared[name].domain:
            found[name] = declared[name]
        else:
            raise ValueError(
                f"`hyperparameters` gives {name!r} the domain {domain}, but the module declares it "
                f"with {declared[name].domain}. Give its name alone."
            )
    return found


def _reunite(declared: Mapping[str, Hyperparameter], optimizers: Sequence[Optimizer]) -> None:
    """Put declared hyperparameters in the place of copies that a loaded state has put there.

    So `BatchSizeFinder` leaves optimizers, which loads their state before the fit begins.

    Raises:
        MisconfigurationException: If nobody knows what a copy is of.
    """
    for group, name, present in _undeclared(declared, optimizers):
        if not present.is_copy:
            continue
        originals = [
            hyper
            for hyper in declared.values()
            if hyper.domain == present.domain and torch.equal(hyper.plain, present.plain)
        ]
        if len(originals) != 1:
            raise MisconfigurationException(
                f"The optimizer has loaded a state, in which `{name}` is a copy of a "
                f"hyperparameter, and it cannot be told of which. Give {present!r} and others like "
                "it start values of their own, or run what loads the state, as `BatchSizeFinder`, "
                "in a fit of its own."
            )
        set_setting(group, name, originals[0])


def _place(
    name: str,
    domain: Domain | None,
    optimizer: Optimizer,
    declared: Mapping[str, Hyperparameter],
) -> dict[str, Hyperparameter]:
    """Turn one setting of every parameter group into a hyperparameter."""
    rule_class = rule_class_for(optimizer)
    if name not in rule_class.domains:
        known = ", ".join(dict.fromkeys([*declared, *rule_class.domains]))
        raise ValueError(
            f"`hyperparameters` names {name!r}, which is neither declared by the module nor a "
            f"real-valued setting of {type(optimizer).__name__}. Known: {known}."
        )
    placed = {}
    for number, group in enumerate(optimizer.param_groups, start=1):
        full_name = name if len(optimizer.param_groups) == 1 else f"{name}/pg{number}"
        present = get_setting(group, name)
        if isinstance(present, Hyperparameter):
            own = next((n for n, hyper in declared.items() if hyper is present), "its attribute")
            raise ValueError(
                f"`hyperparameters` names {name!r}, but the module has already put {present!r} "
                f"there. Name that one: {own}."
            )
        # Under a schedule the base is tuned; the rate of the day stays where it stands.
        base = group.get("initial_lr", present) if name == "lr" else present
        try:
            hyper = Hyperparameter(float(base), domain or rule_class.domains[name])
        except ValueError as error:
            raise ValueError(f"`hyperparameters` names {name!r}: {error}") from None
        hyper.plain.fill_(float(present))
        placed[full_name] = hyper
        set_setting(group, name, hyper)
    return placed
