"""Hypergradients by hand in plain torch: what the package has to be no slower than.

Neither loop moves the hyperparameters; each returns its last hypergradient, which tests compare.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.benchmarks.workloads import Batch, Task

__all__ = ["Problem", "forward_loop", "reverse_loop"]


class Problem:
    """A task laid open: plain leaves for hyperparameters, numbers in the optimizer's groups.

    Args:
        task: The task; the leaves take the place of its hyperparameters.
        device: Where to train it.

    Attributes:
        names: Names of the weights of ``task.net``.
        params: The weights, each ``[*P]``.
        leaves: Hyperparameters, each ``[*H]``, requiring grad.
        optimizer: Torch's own, with numbers for settings.
        settings: One dict a weight: the leaves that stand for settings of its group.
    """

    def __init__(self, task: Task, device: torch.device) -> None:
        task.to(device)
        self.task, self.device = task, device
        named = dict(task.net.named_parameters())
        self.names, self.params = list(named), list(named.values())
        self.optimizer = task.configure_optimizers()
        hypers = list(task.hypers.values())
        self.leaves = [
            torch.tensor(hyper.tolist(), device=device).requires_grad_() for hyper in hypers
        ]
        task.hypers = dict(zip(task.hypers, self.leaves, strict=True))
        by_hyper = dict(zip(map(id, hypers), self.leaves, strict=True))
        by_param: dict[Tensor, dict[str, Tensor]] = {}
        for group in self.optimizer.param_groups:
            found = {k: by_hyper[id(v)] for k, v in group.items() if id(v) in by_hyper}
            group.update({key: leaf.item() for key, leaf in found.items()})
            by_param.update(dict.fromkeys(group["params"], found))
        self.settings = [by_param[param] for param in self.params]
        groups = {p: group for group in self.optimizer.param_groups for p in group["params"]}
        self.groups = [groups[param] for param in self.params]
        self.train = task.endless_batches(1, device)
        self.validation = task.endless_batches(2, device)

    def loss(self, batch: Batch, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Training loss ``[]`` at the task's own weights or at others."""
        with sdpa_kernel(SDPBackend.MATH):  # the one attention that has a second derivative
            outputs = self.outputs(batch, weights)
        return self.task.criterion(outputs, batch) + self.task.penalty(weights or self.params)

    def outer_objective(self, weights: Sequence[Tensor] | None = None) -> Tensor:
        """Outer objective ``[]`` on the next validation batch."""
        batch = next(self.validation)
        return self.task.validation_criterion(self.outputs(batch, weights), batch)

    def outputs(self, batch: Batch, weights: Sequence[Tensor] | None) -> Tensor:
        """What the network makes of a batch."""
        if weights is None:
            return self.task.net(batch[0])
        named = dict(zip(self.names, weights, strict=True))
        return functional_call(self.task.net, named, (batch[0],))


def forward_loop(
    task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
) -> Tensor:
    """Forward-HG: one `create_graph` gradient, a product a tangent, tangents updated in place."""
    problem = Problem(task, device)
    params, leaves, optimizer = problem.params, problem.leaves, problem.optimizer
    entries = [(leaf, i) for leaf in leaves for i in range(leaf.numel())]
    rule = _adam_tangents if isinstance(optimizer, torch.optim.Adam) else _sgd_tangents
    tangents = [[{"param": torch.zeros_like(p)} for p in params] for _ in entries]
    hypergradient = torch.zeros(len(entries))
    for step, batch in enumerate(itertools.islice(problem.train, steps), start=1):
        gradients = torch.autograd.grad(
            problem.loss(batch), [*params, *leaves], create_graph=True, allow_unused=True
        )
        grads, direct = gradients[: len(params)], gradients[len(params) :]
        by_leaf = dict(zip(map(id, leaves), direct, strict=True))
        # Buffers of the update that are the same for all tangents are made once.
        cache: list[dict[str, Tensor]] = [{} for _ in params]
        for (leaf, i), tangent in zip(entries, tangents, strict=True):
            outputs, vectors = [], []
            if step > 1:
                outputs, vectors = list(grads), [t["param"] for t in tangent]
            mixed = by_leaf[id(leaf)]
            if mixed is not None:
                one_hot = torch.zeros(leaf.numel(), device=device)
                one_hot[i] = 1
                outputs, vectors = [*outputs, mixed], [*vectors, one_hot.reshape(leaf.shape)]
            products = (
                torch.autograd.grad(
                    outputs, params, vectors, retain_graph=True, materialize_grads=True
                )
                if outputs
                else [torch.zeros_like(p) for p in params]
            )
            with torch.no_grad():
                for index, param in enumerate(params):
                    rule(
                        tangent[index],
                        products[index],
                        param,
                        grads[index].detach(),
                        optimizer.state[param],
                        problem.groups[index],
                        {name for name, own in problem.settings[index].items() if own is leaf},
                        cache[index],
                    )
            del products
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.detach()
        del gradients, grads, direct, by_leaf, cache, outputs, vectors, mixed
        optimizer.step()
        optimizer.zero_grad()
        if step % task.hyper_batch_size == 0:
            outer = torch.autograd.grad(problem.outer_objective(), params)
            hypergradient = torch.stack([
                sum(torch.sum(g * t["param"]) for g, t in zip(outer, tangent, strict=True))
                for tangent in tangents
            ])
            hypergradient.tolist()  # an outer step would read it
        after_step()
    return hypergradient


def _sgd_tangents(
    tangent: dict[str, Tensor],
    grad_dot: Tensor,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    own: set[str],
    cache: dict[str, Tensor],
) -> None:
    """Push one tangent through v' = mu v + g + rho w, w' = w - eta v', in place."""
    lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
    velocity = state.get("momentum_buffer")
    if decay:
        grad_dot.add_(tangent["param"], alpha=decay)
    if "weight_decay" in own:
        grad_dot.add_(param)
    if velocity is None:
        tangent["velocity"] = grad_dot
    else:
        tangent["velocity"].mul_(momentum).add_(grad_dot)
        if "momentum" in own:
            tangent["velocity"].add_(velocity)
    tangent["param"].add_(tangent["velocity"], alpha=-lr)
    if "lr" in own:
        tangent["param"].sub_(grad)
        if decay:
            tangent["param"].sub_(param, alpha=decay)
        if velocity is not None:
            tangent["param"].sub_(velocity, alpha=momentum)


def _adam_tangents(
    tangent: dict[str, Tensor],
    grad_dot: Tensor,
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    own: set[str],
    cache: dict[str, Tensor],
) -> None:
    """Push one tangent through Adam or, where its decay is decoupled, AdamW, in place."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    if not cache:
        step = state["step"].item() + 1 if state else 1
        mean = grad * (1 - beta1) + (beta1 * state["exp_avg"] if state else 0)
        square = grad.square() * (1 - beta2) + (beta2 * state["exp_avg_sq"] if state else 0)
        scale = (1 - beta2**step) ** 0.5
        rate = 1 / (1 - beta1**step)
        root = square.sqrt_()
        inverse = 1 / (root / scale + group["eps"])
        cache["by_mean"] = -lr * rate * inverse
        slope = mean.mul_(inverse).mul_(rate)  # the direction m^ / (sqrt(v^) + eps)
        cache["direction"] = slope
        by_square = 0.5 * lr / scale * slope * inverse / root
        cache["by_square"] = torch.where(root > 0, by_square, 0)
    if "mean" not in tangent:
        tangent["mean"], tangent["square"] = torch.zeros_like(param), torch.zeros_like(param)
    tangent["mean"].mul_(beta1).add_(grad_dot, alpha=1 - beta1)
    tangent["square"].mul_(beta2).addcmul_(grad_dot, grad, value=2 * (1 - beta2))
    tangent["param"].mul_(1 - lr * decay)
    tangent["param"].addcmul_(tangent["mean"], cache["by_mean"])
    tangent["param"].addcmul_(tangent["square"], cache["by_square"])
    if "lr" in own:
        tangent["param"].sub_(param, alpha=decay).sub_(cache["direction"])
    if "weight_decay" in own:
        tangent["param"].sub_(param, alpha=lr)


def reverse_loop(
    task: Task, device: torch.device, steps: int, after_step: Callable[[], None]
) -> Tensor:
    """Reverse-HG: a window of differentiable updates, and autograd through all of it."""
    problem = Problem(task, device)
    adam = isinstance(problem.optimizer, torch.optim.Adam)
    update = _adam_update if adam else _sgd_update
    settings = [
        {**group, **own} for group, own in zip(problem.groups, problem.settings, strict=True)
    ]
    weights = [param.detach().requires_grad_() for param in problem.params]
    states: list[dict[str, Any]] = [{} for _ in weights]
    hypergradient = torch.zeros(task.entries)
    for step, batch in enumerate(itertools.islice(problem.train, steps), start=1):
        grads = torch.autograd.grad(problem.loss(batch, weights), weights, create_graph=True)
        updated = [
            update(*arguments) for arguments in zip(weights, grads, states, settings, strict=True)
        ]
        weights, states = [new for new, _ in updated], [state for _, state in updated]
        del grads, updated
        if step % task.hyper_batch_size == 0:
            objective = problem.outer_objective(weights)
            parts = torch.autograd.grad(objective, problem.leaves, allow_unused=True)
            hypergradient = torch.cat([part.flatten() for part in parts if part is not None])
            hypergradient.tolist()  # an outer step would read it
            del objective, parts
            weights = [weight.detach().requires_grad_() for weight in weights]
            states = [
                {k: v.detach() if isinstance(v, Tensor) else v for k, v in state.items()}
                for state in states
            ]
        after_step()
    return hypergradient


Update = tuple[Tensor, dict[str, Any]]


def _sgd_update(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Update:
    """v' = mu v + g, w' = w - eta v'."""
    velocity = group["momentum"] * state["velocity"] + grad if state else grad
    return param - group["lr"] * velocity, {"velocity": velocity}


def _adam_update(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> Update:
    """Adam or, where the group decays, AdamW."""
    lr, (beta1, beta2), decay = group["lr"], group["betas"], group["weight_decay"]
    step = state["step"] + 1 if state else 1
    mean = (1 - beta1) * grad + (beta1 * state["mean"] if state else 0)
    square = (1 - beta2) * grad.square() + (beta2 * state["square"] if state else 0)
    root = (square + 1e-30).sqrt() / (1 - beta2**step) ** 0.5  # a slope at zero gradient
    new = param * (1 - lr * decay) - lr / (1 - beta1**step) * mean / (root + group["eps"])
    return new, {"step": step, "mean": mean, "square": square}
