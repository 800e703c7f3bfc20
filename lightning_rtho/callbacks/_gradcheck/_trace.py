"""What the steps of a module do that may keep hypergradients from being right."""

import os
import re
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_rtho.callbacks._detached import DetachedWeights
from lightning_rtho.callbacks._own_backward import own_functions
from lightning_rtho.hyperparameters import Hyperparameter, declared_hyperparameters
from lightning_rtho.linearization import graph_nodes
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["StepTrace"]

_LIGHTNING = tuple(f"{path}{os.sep}" for path in lightning.__path__)
_LIBRARIES = (
    *(f"{path}{os.sep}" for path in (*torch.__path__, Path(__file__).parents[2])),
    "<frozen ",
)
_STEPS = ("training_step", "validation_step", "outer_step")
_KINKED = re.compile(
    "(Abs|Amax|Amin|Clamp|Floor|Ceil|Round|Sign|HuberLoss|SmoothL1Loss|Relu|LeakyRelu|Rrelu|"
    "Hard(tanh|swish|sigmoid|shrink)|Softshrink|Threshold|Max|Min|Maximum|Minimum|Sort|Topk|"
    "(Adaptive)?MaxPool.*|PreluKernel)Backward.*"
)
_TAKES_OUT = frozenset({
    Tensor.__float__,
    Tensor.__int__,
    Tensor.item,
    Tensor.numpy,
    Tensor.tolist,
})
_DETACHES = frozenset({Tensor.data.__get__, Tensor.detach})  # type: ignore[attr-defined]


class StepTrace(Callback):
    """Watches the steps of a followed run.

    Attributes:
        detached: Where values enter a loss that depend on weights or hyperparameters, but do not
            show it.
        taken: Where numbers are taken out of the graph of values, which may be to look at them.
        functions: Custom autograd functions in the graph of a loss.
        kinks: Operations there that are not smooth everywhere.
        moved: Whether weights changed otherwise than by the optimizer.
    """

    def __init__(self) -> None:
        self.detached: dict[str, None] = {}
        self.taken: dict[str, None] = {}
        self.functions: dict[str, None] = {}
        self.kinks: dict[str, None] = {}
        self.moved = False
        self._after: list[Tensor] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand between the trainer and the steps."""
        for name in _STEPS:
            if hasattr(pl_module, name):
                setattr(pl_module, name, self._watched(pl_module, name))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the weights between updates."""
        for optimizer in trainer.optimizers:
            inner = optimizer.optimizer if isinstance(optimizer, DifferentiableOptimizer) else None
            if inner is not None:
                inner.register_step_pre_hook(lambda *_: self._compare(pl_module))
                inner.register_step_post_hook(lambda *_: self._take_down(pl_module))

    def _take_down(self, module: LightningModule) -> None:
        self._after = [param.detach().clone() for param in module.parameters()]

    def _compare(self, module: LightningModule) -> None:
        pairs = zip(module.parameters(), self._after, strict=False)
        self.moved |= not all(torch.equal(now, then) for now, then in pairs)

    def _watched(self, module: LightningModule, name: str) -> Callable[..., Any]:
        step = getattr(module, name)
        sources: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
        sources += declared_hyperparameters(module).values()

        def report(places: dict[str, None], line: str | None) -> None:
            if line is not None:
                places[f"`{name}`, {line}"] = None

        def report_taken(x: Tensor) -> None:
            report(self.detached if isinstance(x, Hyperparameter) else self.taken, _user_line())

        watch = DetachedWeights(sources, _user_line)  # values may be carried from step to step

        @wraps(step)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with watch:
                with _TakenOut(report_taken):
                    output = step(*args, **kwargs)
                loss = output.get("loss") if isinstance(output, dict) else output
                if isinstance(loss, Tensor):
                    for line in watch.entries_of(loss):
                        report(self.detached, line)
                    self._read_graph(loss)
            return output

        return watched

    def _read_graph(self, loss: Tensor) -> None:
        """Name the operations in the graph of a loss that matter here."""
        nodes = [*graph_nodes([loss])]
        self.functions |= dict.fromkeys(own_functions(nodes))
        for node in nodes:
            kind = type(node).__name__
            if _KINKED.fullmatch(kind):
                self.kinks[kind.split("Backward")[0]] = None


class _TakenOut(TorchFunctionMode):
    """Reports where numbers are taken out of the graph, and hyperparameters in any way.

    A hyperparameter that is detached is a Python number from then on, which nothing can follow.
    """

    def __init__(self, report: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._report = report

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call a torch function."""
        out = func in _TAKES_OUT or (func in _DETACHES and isinstance(args[0], Hyperparameter))
        if out and args[0].requires_grad:
            self._report(args[0])
        return func(*args, **(kwargs or {}))


def _user_line() -> str | None:
    """Return the innermost line that is the user's own; None if Lightning runs there, as `log`."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(_LIGHTNING):
            return None
        if not frame.filename.startswith(_LIBRARIES):
            place = f"{Path(frame.filename).name}:{frame.lineno}"
            return f"{place}: `{frame.line}`" if frame.line else place
    return None
