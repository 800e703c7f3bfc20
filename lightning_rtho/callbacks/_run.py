"""One fit as the callback follows it: the objects involved and where they stand."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torch.optim import Optimizer

from lightning_rtho.callbacks._attributes import PlainAttributes
from lightning_rtho.callbacks._batches import BatchCopies, cloned
from lightning_rtho.callbacks._buffers import BufferCopies
from lightning_rtho.callbacks._bystanders import MovingBystanders
from lightning_rtho.callbacks._checks import refusals_explained
from lightning_rtho.callbacks._clipping import NotedClipping
from lightning_rtho.callbacks._curvature import CurvatureSample
from lightning_rtho.callbacks._detached import DetachedWeights
from lightning_rtho.callbacks._hand_over import GradientHandOver
from lightning_rtho.callbacks._kernels import (
    repeatable_kernels,
    runs_compiled,
    twice_differentiable_kernels,
    warn_of_eager_steps,
)
from lightning_rtho.callbacks._loss_scale import loss_scale
from lightning_rtho.callbacks._manual import ManualStep
from lightning_rtho.callbacks._own_backward import FunctionCheck
from lightning_rtho.callbacks._replay import TrainingStepReplay, noted_beginning
from lightning_rtho.callbacks._snapshot import read_derivative_buffers, write_derivative_buffers
from lightning_rtho.callbacks._transfer import live_transfers
from lightning_rtho.callbacks._unused import UnusedHyperparameters
from lightning_rtho.dynamics import Transition
from lightning_rtho.hypergradient import AbstractHypergradient, OptimizerStep, Recollection
from lightning_rtho.hyperparameters import Hyperparameter
from lightning_rtho.linearization import (
    BackwardHooks,
    GradientClip,
    RunningStatistics,
    StatisticUpdate,
    TracedLoss,
    graph_nodes,
    rounds_otherwise,
)
from lightning_rtho.optim import DifferentiableOptimizer

__all__ = ["FollowedRun", "schedulers_of"]


class FollowedRun:
    """Feeds each training step of a fit to a hypergradient method.

    Args:
        trainer: The trainer, about to train.
        module: The module.
        optimizers: Its optimizers; more than one only where it calls them by hand.
        tuned: Hyperparameters by name, each ``[*H]``.
        make_method: Makes the method from weights and hyperparameters.
        sample: Draws the examples that Hessian products are taken on; None for all.

    Attributes:
        method: The method.
        steps: Optimizer steps fed to it.
        detached: Watches for values that depend on the weights without a graph; None before the
            first step that is followed.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        optimizers: Sequence[DifferentiableOptimizer],
        tuned: Mapping[str, Hyperparameter],
        make_method: Callable[[Sequence[Tensor], Sequence[Tensor]], AbstractHypergradient],
        sample: CurvatureSample | None = None,
    ) -> None:
        self._sample = sample
        self._trainer, self._module, self._optimizers = trainer, module, optimizers
        self._tuned = tuned
        self._columns = _columns(tuned)
        self.method = make_method(_params(module, optimizers), list(tuned.values()))
        if self.method.needs_replay:
            _refuse_own_batches(module)
        self._hooks = BackwardHooks(module, self.method.params)
        self.steps = self._skipped_steps = 0
        self._trained_count = len(self.trained)
        self._recorded = self._is_advancing = False
        self._statistics = RunningStatistics(module)
        self._buffers, self._attributes = BufferCopies(module), PlainAttributes(module)
        # Processes rest together or not at all.
        self._batch_copies = BatchCopies(clones=trainer.world_size > 1)
        self._bystanders = MovingBystanders(module, self.trained)
        self._clipping = NotedClipping(module)
        self._hand_over = GradientHandOver(module)
        self._manual = None if module.automatic_optimization else ManualStep(module)
        self._following = self._resting = self._warned_of_resting = self._has_stepped = False
        self._live: set[Tensor] = set()
        self._batches = 0
        self.detached: DetachedWeights | None = None
        self._has_warned_of_detached = False
        self._check_functions = FunctionCheck("`training_step`")
        self._detached_watch, self._transfer_context = ExitStack(), ExitStack()
        self._forward_context, self._hook_watch = ExitStack(), ExitStack()
        self._replay: TrainingStepReplay | None = None
        self._unused = UnusedHyperparameters(module, tuned, optimizers)
        for optimizer in optimizers:
            optimizer.before_update = partial(self._before_update, optimizer)
            optimizer.after_update = self._after_update
        warn_of_eager_steps(module)

    @property
    def trained(self) -> list[Tensor]:
        """The weights that the optimizers have now."""
        return [param for optimizer in self._optimizers for param in optimizer.params]

    def _make_live(self, is_live: bool) -> None:
        """Let what is computed from hyperparameters have a graph, or none."""
        for hyper in self._tuned.values():
            hyper.make_live(is_live)

    @contextmanager
    def hyperparameters_at_rest(self) -> Iterator[None]:
        """Let hyperparameters be numbers meanwhile, as they are in workers that make batches."""
        live = [hyper for hyper in self._tuned.values() if hyper.requires_grad]
        self._make_live(False)
        try:
            yield
        finally:
            for hyper in live:
                hyper.make_live(True)

    def begin(self, follows: Callable[[], bool]) -> None:
        """Make ready for the first batch; `follows` tells whether a coming step is followed."""

        def awaits_followed_step() -> bool:  # and is not in the midst of one
            return follows() and not any(hyper.requires_grad for hyper in self._tuned.values())

        live = live_transfers(self._trainer, awaits_followed_step, self._make_live)
        self._transfer_context.enter_context(live)

    def await_batch(self) -> None:
        """End a training step, if there was one, and let hyperparameters be numbers.

        What other hooks make of them might outlast the next step, and with it its graph.
        """
        self._close()
        self._make_live(False)

    def before_batch(self, batch_idx: int, *, follow: bool) -> None:
        """Make ready for the coming training step, if it is followed."""
        if self._following and not follow:
            self._begin_anew()  # the run is not followed any more
        follow = follow and not self._resting
        if not self._recorded:  # of a step that begins
            self._hooks.have_changed = False
        self._following, self._replay, self._has_stepped = follow, None, False
        for optimizer in self._optimizers:
            optimizer.follow_schedulers(schedulers_of(self._trainer, optimizer.optimizer))
        self._make_live(follow)
        if follow:
            self._take_in_parameters()
            self.method.start(self._module.buffers())
            if self.method.needs_replay:
                if self._bystanders.have_set_out():  # steps so far stand for other weights
                    self.method.reset()
                note = partial(self._note_beginning, batch_idx)
                self._forward_context.enter_context(noted_beginning(self._module, note))
                kernels = repeatable_kernels(self._module, is_coarse=self._is_coarse)
                self._forward_context.enter_context(kernels)
            else:
                self._forward_context.enter_context(twice_differentiable_kernels(self._module))
            self._hook_watch.enter_context(self._hooks.watched(self.method.params))
            # Where losses are computed again, their statistics are, too.
            self._statistics.start(traced=not self.method.needs_replay)
            if self._manual is not None:
                self._manual.start()
                self._clipping.start()
            self._batches += 1
            if self.detached is None:
                moving = [param for param in self.trained if param.requires_grad]
                self.detached = DetachedWeights(moving)
            if _is_looked_at(self._batches) and self._can_watch():
                # Nor can compiled functions, of which nobody knows, be watched.
                self._detached_watch.enter_context(torch.compiler.set_stance("force_eager"))
                self._detached_watch.enter_context(self.detached)

    @property
    def _precision(self) -> torch.dtype | None:
        """What training steps are computed in, if that is below float32."""
        name = str(self._trainer.precision)
        if name.startswith(("32", "64")):
            return None
        return torch.float16 if name.startswith("16") else torch.bfloat16

    @property
    def _is_coarse(self) -> bool:
        return self._precision is not None

    def _can_watch(self) -> bool:
        """Tell whether to look for detached values; what is compiled would be compiled again."""
        is_replayed = self.method.needs_replay
        return not self._has_warned_of_detached and not (
            is_replayed and runs_compiled(self._module, is_coarse=self._is_coarse)
        )

    def _note_beginning(self, batch_idx: int, batch: Any) -> None:
        """Take down what the training step depends on, as it begins."""
        self._replay = self._prepare_replay(batch, batch_idx)

    def _prepare_replay(self, batch: Any, batch_idx: int) -> TrainingStepReplay:
        """Make ready to compute the loss again: the whole in the first step, then of a sample."""
        replay = partial(
            TrainingStepReplay.of_present,
            self._trainer,
            self._module,
            batch_idx=batch_idx,
            statistics=self._statistics,
            buffers=self._buffers,
            attributes=self._attributes,
            bystanders=self._bystanders.copy(self._trainer.global_step),
        )
        if self._sample is not None and self._sample.is_checked:
            drawn = self._sample.draw(batch, self._trainer.global_step, batch_idx)
            return replay(batch=drawn, is_sample=True)
        if self._sample is not None:
            self._sample.check(
                batch,
                self._module,
                lambda part: replay(batch=cloned(part))().value,  # a step may write to it
            )
        # Whole, if it is the first of a sample's, so that edited gradients are found out, too.
        return replay(batch=self._batch_copies.take(batch))

    def _take_in_parameters(self) -> None:
        """Take in parameters that the optimizer has been given since."""
        known = set(self.method.params)
        added = [param for param in self.trained if param not in known]
        if added:
            self.method.extend(added)
        if len(self.trained) > self._trained_count:
            self._trained_count = len(self.trained)
            self._bystanders.forget(self.trained)

    def _rest_if_weights_were_frozen(self) -> None:
        """Begin anew after this step if it no longer trains weights that depend on the past."""
        live = {param for param in self.method.params if param.requires_grad}
        if not self._live <= live and self._manual is not None:
            raise MisconfigurationException(
                "Weights were frozen for a backward pass that others take part in, so the way "
                "their history takes through it would be lost. Freeze them by "
                "`self.toggle_optimizer(...)`, or not at all."
            )
        if not self._live <= live:
            self._rest("Weights were frozen")
        self._live = live

    def _take_statistics(self) -> tuple[StatisticUpdate, ...]:
        """Return what forward passes did to running statistics, if that can be followed."""
        updates = self._statistics.collect()
        layer = self._statistics.unwatched
        if layer is not None:
            names = {part: name for name, part in self._module.named_modules()}
            raise MisconfigurationException(
                f"`{names[layer]}` averages its running statistics by itself, so that they cannot "
                "be followed. Derive it from one of torch's layers of batch normalization, and let "
                "its `forward` call `torch.nn.functional.batch_norm`, or leave them out."
            )
        if self._statistics.reads_past and self._manual is not None:
            raise MisconfigurationException(
                "Batch normalization that has trained runs in evaluation mode in a training step, "
                "whose dependence on the running statistics cannot be followed in manual "
                "optimization. Keep it in one mode."
            )
        if self._statistics.reads_past:
            self._rest("Batch normalization that has trained was in evaluation mode")
        return updates

    def _rest(self, why: str) -> None:
        """Do not follow the run up to its next update, after which it begins anew."""
        self._following, self._resting = False, True
        if not self._warned_of_resting:
            self._warned_of_resting = True
            rank_zero_warn(
                f"{why} at step {self._trainer.global_step}: hypergradients count the run after it "
                "alone; this is said once."
            )

    def _begin_anew(self) -> None:
        """Forget that the present state has a past."""
        self.method.reset()
        self._statistics.forget()

    def before_backward(self, loss: Tensor) -> None:
        """Hand the loss to the method; where that gives the gradient, backward just uses it."""
        self._warn_of_detached(loss)
        if self._manual is None:
            self._detached_watch.close()
            self._forward_context.close()
        if not self._following:
            return
        if loss.numel() != 1:
            raise MisconfigurationException(
                f"A loss must be a scalar, got one of shape {tuple(loss.shape)}: "
                "`manual_backward(loss, gradient=...)` is not followed. Multiply the loss by that "
                "gradient and sum it up before."
            )
        self._rest_if_weights_were_frozen()
        if self._replay is not None and self._batch_copies.are_spoilt():
            self._rest("`training_step` wrote to its batch")
        updates = self._take_statistics()
        if not self._following:  # it rests
            return
        self._unused.look_into(loss)
        nodes = [*graph_nodes([loss])]
        self._check_functions(nodes)
        if self._manual is not None:
            self._manual.check_order(loss)
            self.method.forget_gradients(
                i for i, param in enumerate(self.method.params) if param.grad is None
            )
        scale = loss_scale(self._trainer)
        is_shared = self._manual is not None  # as by a generator and its critic
        traced = TracedLoss(loss, updates, scale, is_shared)
        gradients = self.method.record(traced, self._replay)
        self._recorded = True
        if self._manual is not None:
            self._statistics.start()
        if gradients is not None:
            pairs = [
                (param, gradient)
                for param, gradient in zip(self.method.params, gradients, strict=True)
                if gradient is not None
                and (self._manual is None or self._manual.takes_gradient(param))
            ]
            may_share = self._may_share_gradients(scale)
            others = partial(self._others_waiting, nodes)
            self._hand_over.give(pairs, may_share=may_share, others=others)

    def _warn_of_detached(self, loss: Tensor) -> None:
        """Say that the derivative of a loss is not all that its graph shows."""
        if self._has_warned_of_detached or self.detached is None:
            return
        if self.detached.entries_of(loss):
            self._has_warned_of_detached = True
            rank_zero_warn(
                "`training_step` uses values that depend on the weights but were detached "
                "(`detach`, `torch.no_grad` or frozen weights). Hypergradients take them for "
                "constants, which they are not. Use `lightning_rtho.stop_gradient(x)` for "
                "`x.detach()` within a step if they shall be exact; what is carried from one step "
                "to the next, as in a buffer, cannot be followed."
            )

    def _may_share_gradients(self, scale: float) -> bool:
        """Tell whether nothing is known that adds to the gradients of a loss or changes them."""
        return (
            self._manual is None
            and not self._trainer.gradient_clip_val
            and self._trainer.world_size == 1
            and self._trainer.accumulate_grad_batches == 1
            and scale == 1
            and not any(is_overridden(hook, self._module) for hook in _MAY_CHANGE_GRADIENTS)
        )

    def _others_waiting(self, nodes: Sequence[Any]) -> list[Tensor] | None:
        """Return leaves of a graph that get a gradient beside weights; None if ours will do."""
        hypers = (leaf for hyper in self._tuned.values() for leaf in hyper.leaves)
        known = {id(tensor) for tensor in (*self.method.params, *hypers)}
        leaves = (getattr(node, "variable", None) for node in nodes)
        others = [leaf for leaf in leaves if leaf is not None and id(leaf) not in known]
        is_asked = bool(others) or self._hooks.are_waiting or rounds_otherwise(nodes)
        return others if is_asked else None

    def take_back_skipped_step(self) -> int:
        """Tell the method if the last step, of which it has seen the losses, was not made.

        A gradient scaler skips the step of an overflown gradient.

        Returns:
            How many steps have been skipped if the last was; else 0.
        """
        if not self._recorded:
            return 0
        self.method.advance(OptimizerStep([], []))
        self._hand_over.skip_step()
        self._recorded = False
        self._skipped_steps += 1
        return self._skipped_steps

    def after_backward(self) -> None:
        """Give backward back to the module."""
        self._hand_over.end_backward()
        for hyper in self._tuned.values():
            for leaf in hyper.leaves:
                leaf.grad = None

    def before_clipping(self) -> None:
        """Take down how gradients will be clipped."""
        if self._following:
            self._clipping.start()

    def after_batch(self) -> None:
        """End what lasts as long as a training step, which may have returned no loss."""
        self._close()
        if self._following:  # or rests from here on, but for the coming update
            self._make_live(True)
            self._record_statistics()
        self._stop_standing_in()
        if self._following:
            with refusals_explained():
                self.method.settle()

    def check_hyperparameters(self) -> None:
        """Refuse one that has acted nowhere so far; warn of one that was written over."""
        self._unused.refuse()
        self._unused.warn_of_replaced()

    def _before_update(self, optimizer: DifferentiableOptimizer) -> None:
        """Hand an optimizer's coming step to the method."""
        self._detached_watch.close()
        if self._resting:  # its backward pass may have needed what the method holds
            self._resting = self._recorded = False
            self._begin_anew()
        if not self._following:
            return
        self._refuse_edits(optimizer)
        clip, raw_grads = self._clipping.take(optimizer)
        if self._manual is None:
            self._clipping.stop()
        else:
            self._manual.note_update(optimizer.params)
            self._record_statistics()  # before their weights move
            self._statistics.start()
        transitions = optimizer.transitions(self._columns)
        step = self._step(optimizer.params, transitions, clip, raw_grads)
        self._is_advancing = True
        # In manual optimization this stands amid a step whose compiled parts run eagerly; those
        # of the update's derivative shall not.
        stance = nullcontext() if self._manual is None else torch.compiler.set_stance("default")
        with refusals_explained(), stance:
            self.method.advance(step)
        if self._manual is None:
            self.method.forget_gradients(range(len(self.method.params)))
        optimizer.carry_derivative_buffers(transitions)
        self.steps += bool(transitions)
        self._recorded = False

    def _refuse_edits(self, optimizer: DifferentiableOptimizer) -> None:
        """Refuse a second step, and what someone else has written to gradients or settings."""
        if self._has_stepped and self._manual is None:
            raise MisconfigurationException(
                "The optimizer is stepped more than once a batch, as by `optimizer_step`, which is "
                "followed in manual optimization alone. Step once, or set "
                "`automatic_optimization = False`."
            )
        if self._hooks.have_changed:
            raise MisconfigurationException(
                "A hook changes a gradient (`register_hook`, `register_full_backward_hook`), which "
                "cannot be followed. Scale or reverse gradients by "
                "`lightning_rtho.scale_gradient(x, factor)`, clip them by "
                "`Trainer(gradient_clip_val=...)`, or write the hook's effect into the loss."
            )
        overwritten = optimizer.overwritten_setting()
        if overwritten is not None:
            raise MisconfigurationException(
                f"`{overwritten}` is tuned, but something other than the callback has changed it "
                "in the optimizer. Shape a learning rate by a scheduler such as LambdaLR."
            )

    def _step(
        self,
        trained: Sequence[Tensor],
        transitions: Sequence[Transition],
        clip: GradientClip | None,
        raw_grads: Mapping[Tensor, Tensor],
    ) -> OptimizerStep:
        """Return an optimizer's step with the weights numbered as the method knows them."""
        moved = [trained[transition.index] for transition in transitions]
        positions = {param: i for i, param in enumerate(self.method.params)}
        pairs = list(zip(transitions, moved, strict=True))
        return OptimizerStep(
            [replace(transition, index=positions[param]) for transition, param in pairs],
            [raw_grads.get(param, transition.grad) for transition, param in pairs],
            clip,
            self._trainer.global_step,
            is_traced=self._hand_over.are_traced(moved),
            precision=self._precision,
        )

    def _after_update(self) -> None:
        """Note that the step that the method knows has been made."""
        self._is_advancing, self._has_stepped = False, True
        self._hand_over.after_update()
        if self.steps == 1 and self.detached is not None:
            self.detached.forget()  # what came of the first weights depends on no hyperparameter
        if self._manual is None:  # hooks of others may come before ours
            self._make_live(False)

    def _close(self) -> None:
        """End what lasts as long as a training step, or as its forward pass."""
        self._detached_watch.close()
        self._forward_context.close()
        self._hook_watch.close()

    def _stop_standing_in(self) -> None:
        """Give the module its methods back."""
        self._clipping.stop()
        if self._manual is not None:
            self._manual.stop()

    def _record_statistics(self) -> None:
        """Record forward passes that no backward pass has followed."""
        updates = self._take_statistics()
        if updates and self.method.needs_replay:
            self._rest("A training step with batch normalization had no loss")
        elif updates and self._following:
            nothing = torch.zeros((), requires_grad=True)
            self.method.record(TracedLoss(nothing, updates), None)

    @property
    def parameter_names(self) -> list[str]:
        """Names of the parameters, in the order in which the method knows them."""
        names: dict[Tensor, str] = {param: name for name, param in self._module.named_parameters()}
        return [names.get(param, f"{i}") for i, param in enumerate(self.method.params)]

    def _order_parameters(self, names: Sequence[str]) -> None:
        """Let a method that has seen no step know the parameters in the order of another run."""
        params = dict(zip(self.parameter_names, self.method.params, strict=True))
        if params.keys() != set(names):
            raise MisconfigurationException(
                f"The checkpoint was written by a run that trained {sorted(names)}, but this one "
                f"trains {sorted(params)}. Resume with the same parameters in the optimizer."
            )
        self.method.params = [params[name] for name in names]

    def state_dict(self) -> dict[str, Any] | None:
        """Return where the run stands, uncopied; None in the midst of a step."""
        if self._is_advancing:
            return None
        return {
            "steps": self.steps,
            "parameters": self.parameter_names,
            "derivative_buffers": read_derivative_buffers(self.method.params, self._optimizers),
            "method": self.method.state_dict(),
            "sample": None if self._sample is None else self._sample.state_dict(),
            "clones_batches": self._batch_copies.clones,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run stood, which trained the same parameters in any order."""
        self.steps = state["steps"]
        self._order_parameters(state["parameters"])
        buffers = state["derivative_buffers"]
        write_derivative_buffers(buffers, self.method.params, self._optimizers)
        self.method.load_state_dict(state["method"], self._recollection())
        self._batch_copies.clones |= state["clones_batches"]
        if self._sample is not None and state["sample"] is not None:
            self._sample.load_state_dict(state["sample"])

    def _recollection(self) -> Recollection:
        """Return what this run knows of the steps that a checkpoint holds."""
        return Recollection(
            self._optimizers[0].rule_class,
            partial(
                TrainingStepReplay.from_state_dict,
                self._trainer,
                self._module,
                self._statistics,
                self._buffers.take(),
            ),
        )

    def end(self) -> None:
        """Let go of everything."""
        self.after_backward()
        self._close()
        self._transfer_context.close()
        self._statistics.collect()
        self._hooks.end(self.method.params)
        self.method.reset()
        self._stop_standing_in()
        for optimizer in self._optimizers:
            optimizer.before_update = optimizer.after_update = None
        self._make_live(False)
        for hyper in self._tuned.values():
            hyper.place(hyper.device)  # without a twin


_MAY_CHANGE_GRADIENTS = (
    "configure_gradient_clipping",
    "on_before_optimizer_step",
    "optimizer_zero_grad",
)
"""Methods of a module in which gradients may be written to."""


_LOOKS = 20
"""Batches from the first on that are looked at; each takes some microseconds more an operation."""


def _is_looked_at(number: int) -> bool:
    """Tell whether to look at a batch, counted from 1, for what hides dependences."""
    # The first, in which most of what a step does now and then will have been done once, and ever
    # fewer later, in no period: by chance, the same in every run and process.
    return number <= _LOOKS or random.Random(number).random() < 2 / number


def schedulers_of(trainer: Trainer, optimizer: Optimizer) -> list[Any]:
    """Return the schedulers of an optimizer.

    Args:
        trainer: The trainer.
        optimizer: One of its optimizers, or what it wraps.

    Returns:
        The schedulers.
    """
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    if len(trainer.optimizers) == 1:
        return schedulers
    return [s for s in schedulers if getattr(s.optimizer, "optimizer", s.optimizer) is optimizer]


def _params(module: LightningModule, optimizers: Sequence[DifferentiableOptimizer]) -> list[Tensor]:
    """Return the optimizers' parameters, then those they leave alone but backward does not."""
    trained = [param for optimizer in optimizers for param in optimizer.params]
    known = set(trained)
    if len(known) < len(trained):
        raise MisconfigurationException(
            "A weight is trained by two optimizers, which cannot be followed: each keeps a state "
            "of its own for it. Give each weight to one optimizer."
        )
    bystanders = [p for p in module.parameters() if p.requires_grad and p not in known]
    for param in (*trained, *bystanders):
        if param.is_complex():
            raise MisconfigurationException(
                f"A parameter of shape {tuple(param.shape)} is complex ({param.dtype}), for which "
                "there are no update rules. Train its real and imaginary parts as two parameters."
            )
    return [*trained, *bystanders]


def _refuse_own_batches(module: LightningModule) -> None:
    """Refuse a training step that cannot be made again."""
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            "`training_step` takes its batches from `dataloader_iter`, so that it cannot be made "
            "again. Let it take a batch, or use `RTHO` or `TRHO(tape=KeepGraph())`."
        )


def _columns(tuned: Mapping[str, Hyperparameter]) -> dict[int, int]:
    """Return the first entry of each hyperparameter in the vector of all, by its ``id``."""
    columns, entry = {}, 0
    for hyper in tuned.values():
        columns[id(hyper)] = entry
        entry += hyper.numel()
    return columns
