"""Noticing backward passes that a user has written: they need not be derivatives."""

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from typing import Any, Self

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_rtho.linearization import graph_nodes

__all__ = ["WatchedHooks", "own_functions", "warn_of_own_functions"]

_ADVICE = (
    "Hypergradients take it for the derivative of what runs forward. Use "
    "`lightning_rtho.scale_gradient(x, factor)` to scale or reverse gradients; whether all is well "
    "`hypergradcheck` tells."
)

_TRUSTED = ("torch", "lightning_rtho")
"""Packages whose functions are what they seem, or are refused elsewhere."""


class WatchedHooks(TorchFunctionMode):
    """Tells once of a hook that changes a gradient, where it does so.

    Watched are hooks of tensors that are registered meanwhile, and those of the module's layers.
    Hooks that only look are none of our business.

    Args:
        module: The module.
        report: Called then; by default it warns.
    """

    def __init__(self, module: nn.Module, report: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._module, self._put_back = module, ExitStack()
        self._report = _warn_of_hook if report is None else report
        self._reported = False

    def __enter__(self) -> Self:
        """Stand before the hooks of layers, which a forward pass takes along."""
        for layer in self._module.modules():
            # Private: layers hand out their hooks in no other way.
            for hooks in (layer._backward_hooks, layer._backward_pre_hooks):
                for key, hook in hooks.items():
                    hooks[key] = partial(self._run, hook)
                    self._put_back.callback(hooks.__setitem__, key, hook)
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Let layers have their hooks again."""
        super().__exit__(*exception)
        self._put_back.close()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function; hooks are registered with one that looks at what they return."""
        if func is Tensor.register_hook and len(args) == 2:
            args = (args[0], partial(self._run, args[1]))
        return func(*args, **(kwargs or {}))

    def _run(self, hook: Callable[..., Any], *args: Any) -> Any:
        changed = hook(*args)
        if changed is not None and changed is not args[-1] and not self._reported:
            self._reported = True
            self._report()
        return changed


def _warn_of_hook() -> None:
    rank_zero_warn(f"A hook in `training_step` changes a gradient. {_ADVICE}")


def own_functions(loss: Tensor) -> list[str]:
    """Return the names of autograd functions in the graph of a loss that a user has written.

    Args:
        loss: The loss ``[]``.

    Returns:
        The names, in alphabetical order.
    """
    # Private: a node tells in no other way which function it is of.
    classes = {getattr(type(node), "_forward_cls", None) for node in graph_nodes([loss])}
    return sorted(
        cls.__name__
        for cls in classes
        if cls is not None and cls.__module__.partition(".")[0] not in _TRUSTED
    )


def warn_of_own_functions(loss: Tensor) -> None:
    """Warn of such functions.

    Args:
        loss: The loss ``[]``.
    """
    names = own_functions(loss)
    if names:
        rank_zero_warn(
            f"`training_step` runs the autograd function `{names[0]}`, whose `backward` is its "
            f"author's. {_ADVICE}"
        )
