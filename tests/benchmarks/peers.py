"""Other libraries on the same reverse-mode window: SGD with momentum, or Adam, on one group.

Each follows its own documentation; settings that a workload tunes are given to it as tensors. None
of them can tune a decoupled decay: higher has no AdamW, TorchOpt's takes the decay as a number, and
that of Betty divides by the second moment where its root belongs. Betty's Adam gives NaN as soon as
a weight has had no gradient, and that of higher leaves eps out of the correction of the bias.
"""

import importlib.util
import itertools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.loops import Problem
from tests.benchmarks.workloads import Task

__all__ = ["MODULES", "betty", "higher", "torchopt"]

MODULES = {"higher": "higher", "torchopt": "torchopt", "betty": "betty"}
"""Module that each method needs, where it is not always there."""


def is_available(method: str) -> bool:
    """Tell whether what a method needs is installed."""
    return importlib.util.find_spec(MODULES.get(method, "torch")) is not None


def higher(task: Task, device: torch.device, steps: int, after_step: Callable[[], None]) -> Tensor:
    """``higher`` (Grefenstette et al., 2019): a patched copy of network and optimizer a window."""
    import higher

    problem = Problem(task, device)
    (settings,) = {id(own): own for own in problem.settings}.values()
    hypergradient = torch.zeros(task.entries)
    for _ in range(steps // task.hyper_batch_size):
        with higher.innerloop_ctx(
            task.net,
            problem.optimizer,
            override={name: [leaf] for name, leaf in settings.items()},
        ) as (net, optimizer):
            for number in range(1, task.hyper_batch_size + 1):
                batch = next(problem.train)
                loss = task.criterion(net(batch[0]), batch)
                optimizer.step(loss + task.penalty(list(net.parameters())))
                if number == task.hyper_batch_size:
                    batch = next(problem.validation)
                    objective = task.validation_criterion(net(batch[0]), batch)
                    hypergradient = _gradient(objective, problem.leaves)
                    # The next window goes on from here.
                    with torch.no_grad():
                        for param, new in zip(problem.params, net.parameters(), strict=True):
                            param.copy_(new)
                    for param, state in zip(
                        problem.params, optimizer.state[0].values(), strict=True
                    ):
                        problem.optimizer.state[param].update(_detached(state))
                    del objective
                if number < task.hyper_batch_size:
                    after_step()
        del net, optimizer, loss
        after_step()
    return hypergradient


def torchopt(
    task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
) -> Tensor:
    """TorchOpt (Ren et al., 2023): its functional optimizer, differentiated through a window."""
    import torchopt

    problem = Problem(task, device)
    settings = problem.groups[0] | problem.settings[0]
    if isinstance(problem.optimizer, torch.optim.SGD):
        optimizer = torchopt.sgd(settings["lr"], settings["momentum"])
    else:  # a slope where the second moment is zero, as in the loop by hand
        optimizer = torchopt.adam(settings["lr"], settings["betas"], eps_root=1e-30)
    weights = tuple(param.detach().requires_grad_() for param in problem.params)
    state = optimizer.init(weights)
    hypergradient = torch.zeros(task.entries)
    for step, batch in enumerate(itertools.islice(problem.train, steps), start=1):
        grads = torch.autograd.grad(problem.loss(batch, weights), weights, create_graph=True)
        updates, state = optimizer.update(grads, state, params=weights, inplace=False)
        weights = torchopt.apply_updates(weights, updates, inplace=False)
        del grads, updates
        if step % task.hyper_batch_size == 0:
            hypergradient = _gradient(problem.outer_objective(weights), problem.leaves)
            weights = tuple(weight.detach().requires_grad_() for weight in weights)
            torchopt.stop_gradient(state)
        after_step()
    return hypergradient


def betty(task: Task, device: torch.device, steps: int, after_step: Callable[[], None]) -> Tensor:
    """Betty (Choe et al., 2023): an engine with an ``IterativeProblem`` below an outer one."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem, IterativeProblem

    problem = Problem(task, device)
    (settings,) = {id(own): own for own in problem.settings}.values()

    class Outer(ImplicitProblem):
        def training_step(self, batch: list[Tensor]) -> Tensor:
            outputs = self.inner(batch[0])
            return task.validation_criterion(outputs, batch)

        def optimizer_step(self) -> None:
            """Leave the hyperparameters where they are."""

        def zero_grad(self) -> None:
            """Keep the hypergradient, to be returned."""

        def backward(self, loss: Tensor, *args: object, **kwargs: object) -> None:
            self.hypergradient = _gradient(loss, problem.leaves)

    class Inner(IterativeProblem):
        _fp16 = False  # missing in version 0.2.1

        def initialize(self) -> None:
            """Do what its own should: in version 0.2.1 that patches the optimizer twice.

            The update at zero gradient by which it makes buffers is counted as the first step.
            """
            if isinstance(self.optimizer, torch.optim.Adam):
                for param in problem.params:
                    zeros = {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": 0, **zeros}
            super(IterativeProblem, self).initialize()
            self.patch_modules()

        def on_inner_loop_start(self) -> None:
            self.params = tuple(param.detach().requires_grad_() for param in self.params)
            for state in self.optimizer.state:
                state.update(_detached(state))

        def forward(self, x: Tensor) -> Tensor:
            return self.fmodule(self.params, self.buffers, x)

        def training_step(self, batch: list[Tensor]) -> Tensor:
            return task.criterion(self(batch[0]), batch) + task.penalty(self.params)

        def optimizer_step(self) -> None:
            self.optimizer.param_groups[0].update(settings)
            super().optimizer_step()

    class Timed(Engine):
        def train_step(self) -> None:
            super().train_step()
            after_step()

        def do_validation(self) -> bool:
            return False

    holder = nn.Module()  # of something that the outer optimizer can take
    holder.leaves = nn.ParameterList(nn.Parameter(leaf.detach()) for leaf in problem.leaves)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.INFO)  # its engine would set a level again
        outer = Outer(
            "outer",
            Config(first_order=False),
            holder,
            torch.optim.SGD(holder.parameters(), lr=0.0),
            train_data_loader=task.batches(2),
        )
        inner = Inner(
            "inner",
            Config(unroll_steps=task.hyper_batch_size, first_order=False, retain_graph=True),
            task.net,
            problem.optimizer,
            train_data_loader=task.batches(1),
        )
        strategy = "cpu" if device.type == "cpu" else "gpu"
        engine = Timed(
            [outer, inner],
            EngineConfig(train_iters=steps, strategy=strategy),
            {"u2l": {outer: [inner]}, "l2u": {inner: [outer]}},
        )
        engine.run()
    logging.disable(logging.NOTSET)
    return outer.hypergradient


def _detached(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's buffers of one weight, cut from the window that they were made in."""
    return {
        name: value.detach() if isinstance(value, Tensor) else value
        for name, value in state.items()
    }


def _gradient(objective: Tensor, leaves: list[Tensor]) -> Tensor:
    """Derivative of the outer objective by all hyperparameters ``[m]``, read as a step would."""
    parts = torch.autograd.grad(objective, leaves)
    hypergradient = torch.cat([part.flatten() for part in parts])
    hypergradient.tolist()
    return hypergradient
