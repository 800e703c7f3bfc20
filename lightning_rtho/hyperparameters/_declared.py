"""The hyperparameters that a module declares as attributes."""

import dataclasses
from argparse import Namespace
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from lightning_rtho.hyperparameters._hyperparameter import Hyperparameter

__all__ = ["declared_hyperparameters", "load_hyperparameters"]


def declared_hyperparameters(module: nn.Module) -> dict[str, Hyperparameter]:
    """Find every `Hyperparameter` that the module or a submodule holds as an attribute.

    Lists, tuples, dicts, dataclasses and namespaces are entered, unless their name begins with an
    underscore. One that stands in several places is named after the first. Last come those that
    stand only in what Lightning's ``save_hyperparameters`` has kept, as ``hparams.lr``.

    Args:
        module: The module.

    Returns:
        Hyperparameters by dotted name, as ``named_parameters`` would name them.

    Example:
        >>> from lightning_rtho import Hyperparameter, Real
        >>> module = nn.Linear(1, 1)
        >>> module.rates = [Hyperparameter(1.0, Real()), Hyperparameter(2.0, Real())]
        >>> list(declared_hyperparameters(module))
        ['rates.0', 'rates.1']
    """
    attributes = [
        (prefix, {k: v for k, v in vars(submodule).items() if _is_public(k, v)})
        for prefix, submodule in module.named_modules()
    ]
    arguments = [
        (prefix, {"hparams": vars(submodule).get("_hparams")})
        for prefix, submodule in module.named_modules()
    ]
    found: dict[str, Hyperparameter] = {}
    for prefix, tree in (*attributes, *arguments):
        for name, hyperparameter in _walk(tree, prefix):
            if not any(hyperparameter is known for known in found.values()):
                found[name] = hyperparameter
    return found


def _is_public(name: str, value: Any) -> bool:
    return isinstance(value, Hyperparameter) or not name.startswith("_")


def load_hyperparameters(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Give the hyperparameters that a module declares the values that they have in a checkpoint.

    With a callback that tunes them a run does so by itself. Without one, call this from the
    module's ``on_load_checkpoint``: the tuned settings of an optimizer are part of its state, but
    a hyperparameter of the loss is the module's own attribute, of which Lightning keeps nothing.

    Args:
        module: The module; of what it does not declare nothing is taken.
        checkpoint: What Lightning has read from the file; one that was written without a
            hypergradient callback changes nothing.

    Example:
        >>> import torch
        >>> from lightning_rtho import Hyperparameter, Positive
        >>> module = nn.Linear(1, 1)
        >>> module.l2 = Hyperparameter(0.1, Positive())
        >>> tuned = {"hyperparameters": {"l2": torch.tensor(0.2, dtype=torch.float64)}}
        >>> load_hyperparameters(module, {"callbacks": {"RTHO": tuned}})
        >>> module.l2.item()
        0.2
    """
    declared = declared_hyperparameters(module)
    for state in checkpoint.get("callbacks", {}).values():
        values = state.get("hyperparameters", {}) if isinstance(state, Mapping) else {}
        for name in declared.keys() & values.keys():
            declared[name].assign(values[name])


def _walk(
    tree: Any, name: str, around: tuple[Any, ...] = ()
) -> Iterator[tuple[str, Hyperparameter]]:
    """Yield the hyperparameters in nested containers, `around` it those that hold it."""
    if isinstance(tree, Hyperparameter):
        yield name, tree
    elif not any(tree is outer for outer in around):
        for key, item in _items(tree):
            yield from _walk(item, f"{name}.{key}" if name else str(key), (*around, tree))


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a container holds, with its name there."""
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, (list, tuple)):
        yield from enumerate(tree)
    elif isinstance(tree, (SimpleNamespace, Namespace)):
        yield from vars(tree).items()
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        yield from ((name, getattr(tree, name)) for name in names if hasattr(tree, name))
