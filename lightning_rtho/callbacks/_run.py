"""One fit as the callback follows it: the objects involved and where they stand."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_rtho.callbacks._kernels import (
    twice_differentiable_kernels,
    warn_of_eager_steps,
)
from lightning_rtho.callbacks._replay import TrainingStepReplay, loss_scale
from lightning_rtho.hypergradient import AbstractHypergradient, OptimizerStep, Recollection
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.linearization import (
    ClipByNorm,
    ClipByValue,
    GradientClip,
    RunningStatistics,
    TracedLoss,
)
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["FollowedRun"]


class FollowedRun:
    """Feeds each training step of a fit to a hypergradient method.

    Args:
        trainer: The trainer, about to train.
        module: The module.
        optimizer: Its optimizer.
        tuned: Hyperparameters by name, each ``[*H]``.
        make_method: Makes the method from weights and hyperparameters.

    Attributes:
        method: The method.
        steps: Optimizer steps fed to it.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizer: DifferentiableOptimizer,
        tuned: Mapping[str, Hyperparameter],
        make_method: Callable[[Sequence[Tensor], Sequence[Tensor]], AbstractHypergradient],
    ) -> None:
        self._trainer, self._module, self._optimizer = trainer, module, optimizer
        self._tuned = tuned
        self._columns = _columns(tuned)
        self.method = make_method(_params(module, optimizer), list(tuned.values()))
        self.steps = self._skipped_steps = 0
        self._recorded = False
        self._statistics = RunningStatistics(module)
        self._clip = _clip(trainer)
        self._raw_grads: dict[Tensor, Tensor] = {}
        self._following = self._resting = self._warned_of_freezing = False
        self._live: set[Tensor] = set()
        self._kernels = ExitStack()
        self._replay: TrainingStepReplay | None = None
        acting = {id(hyper) for hyper in optimizer.hyperparameters}
        self._unseen = {name: hyper for name, hyper in tuned.items() if id(hyper) not in acting}
        optimizer.before_update = self._before_update
        warn_of_eager_steps(module)

    def before_batch(self, batch: Any, batch_idx: int, *, follow: bool) -> None:
        """Take down what the coming training step depends on, if it is followed."""
        self._kernels.close()
        if self._following and not follow:
            self.method.reset()  # the run is not followed any more
        follow = follow and not self._resting
        self._following, self._replay = follow, None
        self._optimizer.follow_schedulers([
            config.scheduler for config in self._trainer.lr_scheduler_configs
        ])
        for hyper in self._tuned.values():
            hyper.requires_grad_(follow)
        if follow:
            self._take_in_parameters()
            self.method.start()
            if self.method.needs_replay:
                self._replay = TrainingStepReplay(
                    self._trainer, self._module, batch, batch_idx, self._statistics
                )
            else:
                self._kernels.enter_context(twice_differentiable_kernels(self._module))
            self._statistics.start()

    def _take_in_parameters(self) -> None:
        """Take in parameters that the optimizer has been given since."""
        known = set(self.method.params)
        added = [param for param in self._optimizer.params if param not in known]
        if added:
            self.method.extend(added)

    def _rest_if_weights_were_frozen(self) -> None:
        """Begin anew after this step if it no longer trains weights that depend on the past."""
        live = {param for param in self.method.params if param.requires_grad}
        if not self._live <= live:
            self._following, self._resting = False, True
            if not self._warned_of_freezing:
                self._warned_of_freezing = True
                rank_zero_warn(
                    f"Weights were frozen at step {self._trainer.global_step}: hypergradients "
                    "count the run after it alone; this is said once."
                )
        self._live = live

    def before_backward(self, loss: Tensor) -> None:
        """Hand the loss to the method; where that gives the gradient, backward just uses it."""
        self._kernels.close()
        if self._following:
            self._rest_if_weights_were_frozen()
        if not self._following:
            return
        if self._replay is not None:
            self._replay.keep_changed_buffers()
        self._look_for_unseen(loss)
        scale = loss_scale(self._trainer)
        traced = TracedLoss(loss, self._statistics.collect(), scale)
        gradients = self.method.record(traced, self._replay)
        self._recorded = True
        if gradients is not None:
            pairs = [
                (param, gradient)
                for param, gradient in zip(self.method.params, gradients, strict=True)
                if gradient is not None
            ]
            self._module.backward = partial(_accumulate, pairs)  # type: ignore[method-assign]

    def _look_for_unseen(self, loss: Tensor) -> None:
        """Strike off the hyperparameters on which the loss depends."""
        if self._unseen and loss.requires_grad:
            found = torch.autograd.grad(
                loss, list(self._unseen.values()), retain_graph=True, allow_unused=True
            )
            self._unseen = {
                name: hyper
                for (name, hyper), gradient in zip(self._unseen.items(), found, strict=True)
                if gradient is None
            }

    def begin_step(self) -> int:
        """Tell the method if the last step, of which it has seen the losses, was not made.

        A gradient scaler skips the step of an overflown gradient.

        Returns:
            How many steps have been skipped if the last was; else 0.
        """
        if not self._recorded:
            return 0
        self.method.advance(OptimizerStep([], []))
        self._recorded = False
        self._skipped_steps += 1
        return self._skipped_steps

    def after_backward(self) -> None:
        """Give backward back to the module."""
        vars(self._module).pop("backward", None)
        for hyper in self._tuned.values():
            hyper.grad = None

    def before_clipping(self) -> None:
        """Take down the gradients that are about to be clipped."""
        if self._following and self._clip is not None:
            self._raw_grads = {
                param: param.grad.detach().clone()
                for param in self.method.params
                if param.grad is not None
            }

    def _before_update(self) -> None:
        """Hand the optimizer's coming step to the method."""
        if self._resting:  # its backward pass may have needed what the method holds
            self._resting = False
            self.method.reset()
        if not self._following:
            return
        if self._unseen:
            name = next(iter(self._unseen))
            raise MisconfigurationException(
                f"`{name}` is declared as a hyperparameter but used nowhere: neither the optimizer "
                "nor the loss of the first training step depends on it. Use it there, or name the "
                "hyperparameters to tune, as in `RTHO(['lr'])`."
            )
        overwritten = self._optimizer.overwritten_setting()
        if overwritten is not None:
            raise MisconfigurationException(
                f"`{overwritten}` is tuned, but something other than the callback has changed it "
                "in the optimizer. Shape a learning rate by a scheduler such as LambdaLR."
            )
        transitions = self._optimizer.transitions(self._columns)
        trained = self._optimizer.params
        raw = [self._raw_grads.get(trained[t.index], t.grad) for t in transitions]
        positions = {param: i for i, param in enumerate(self.method.params)}
        followed = [replace(t, index=positions[trained[t.index]]) for t in transitions]
        self.method.advance(OptimizerStep(followed, raw, self._clip))
        self._optimizer.carry_derivative_buffers(transitions)
        self.steps += bool(transitions)
        self._recorded, self._raw_grads = False, {}

    def recollection(self) -> Recollection:
        """Return what this run knows of the steps that a checkpoint holds."""
        return Recollection(
            self._optimizer.rule_class,
            self._clip,
            partial(
                TrainingStepReplay.from_state_dict, self._trainer, self._module, self._statistics
            ),
        )

    def end(self) -> None:
        """Let go of everything."""
        self.after_backward()
        self._kernels.close()
        self._statistics.collect()
        self.method.reset()
        self._optimizer.before_update = None
        for hyper in self._tuned.values():
            hyper.requires_grad_(False)


def _params(module: LightningModule, optimizer: DifferentiableOptimizer) -> list[Tensor]:
    """Return the optimizer's parameters, then those that it leaves alone but backward does not."""
    trained = optimizer.params
    known = set(trained)
    bystanders = [p for p in module.parameters() if p.requires_grad and p not in known]
    for param in (*trained, *bystanders):
        if param.is_complex():
            raise MisconfigurationException(
                f"A parameter of shape {tuple(param.shape)} is complex ({param.dtype}), for which "
                "there are no update rules. Train its real and imaginary parts as two parameters."
            )
        # Private: torch tells in no other way that a tensor has hooks.
        if getattr(param, "_backward_hooks", None):
            raise MisconfigurationException(
                f"A parameter of shape {tuple(param.shape)} has a hook that may change its "
                "gradient (`register_hook`), which cannot be followed. Remove the hook, or write "
                "its effect into the loss."
            )
    return [*trained, *bystanders]


def _columns(tuned: Mapping[str, Hyperparameter]) -> dict[int, int]:
    """Return the first entry of each hyperparameter in the vector of all, by its ``id``."""
    columns, entry = {}, 0
    for hyper in tuned.values():
        columns[id(hyper)] = entry
        entry += hyper.numel()
    return columns


def _accumulate(
    pairs: Sequence[tuple[Tensor, Tensor]], loss: Tensor, *args: Any, **kwargs: Any
) -> None:
    """Stand in for ``LightningModule.backward`` where the gradients are known already."""
    if pairs:
        params, gradients = zip(*pairs, strict=True)
        torch.autograd.backward(params, gradients)


def _clip(trainer: Trainer) -> GradientClip | None:
    """Return the clipping that the trainer was set to."""
    limit = trainer.gradient_clip_val
    if not limit:
        return None
    return ClipByValue(limit) if trainer.gradient_clip_algorithm == "value" else ClipByNorm(limit)
