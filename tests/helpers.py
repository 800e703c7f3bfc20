"""Small training problems, a plain loop that a method follows, and slow, obvious references.

The references share no code with the package: the update formulas are written out once more, in
differentiable torch operations, and the whole training run is differentiated by autograd.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rtho import Hyperparameter, Real
from lightning_rtho.dynamics import rule_class_for
from lightning_rtho.hypergradient import (
    AbstractHypergradient,
    ForwardHypergradient,
    KeepGraph,
    Offload,
    OptimizerStep,
    Recompute,
    ReverseHypergradient,
)
from lightning_rtho.linearization import ClipByNorm, GradientClip, RunningStatistics, TracedLoss
from lightning_rtho.optim import DifferentiableOptimizer
from lightning_rtho.outer import outer_gradient

Weights = Sequence[Tensor]
Lambdas = Mapping[str, Tensor]
MakeMethod = Callable[[Sequence[Tensor], Sequence[Tensor]], AbstractHypergradient]

METHODS: dict[str, MakeMethod] = {
    "forward": ForwardHypergradient,
    "recompute": lambda params, hypers: ReverseHypergradient(params, hypers, Recompute()),
    "keep-graph": lambda params, hypers: ReverseHypergradient(params, hypers, KeepGraph()),
    "offload": lambda params, hypers: ReverseHypergradient(params, hypers, Offload("cpu")),
}

# Problems


@dataclass(frozen=True)
class Problem:
    """A model with training and validation data, as pure functions of its weights."""

    predict: Callable[[Weights, Tensor], Tensor]
    shapes: Sequence[tuple[int, ...]]
    dead_input: bool = False

    @property
    def start(self) -> list[Tensor]:
        """Weights that training starts from."""
        generator = torch.Generator().manual_seed(2)
        return [0.7 * _normal(generator, *shape) for shape in self.shapes]

    @property
    def loss_hypers(self) -> dict[str, Tensor]:
        """Hyperparameters of the loss; an L2 penalty would give a dead input a gradient."""
        weights = {"example": torch.tensor([0.7, 1.3, 1.0, 0.4], dtype=torch.float64)}
        penalty = {} if self.dead_input else {"l2": torch.tensor(0.03, dtype=torch.float64)}
        return weights | penalty

    def inner(self, weights: Weights, lambdas: Lambdas, step: int) -> Tensor:
        """Training loss on the batch of a step: a weight an example, and an L2 penalty."""
        errors = (self.predict(weights, self._x(step)) - self._y(step)) ** 2
        loss = (lambdas["example"] * errors).mean() if "example" in lambdas else errors.mean()
        if "l2" in lambdas:
            loss = loss + lambdas["l2"] * sum(w.square().sum() for w in weights)
        return loss

    def outer(self, weights: Weights) -> Tensor:
        """Validation loss."""
        return (self.predict(weights, self._x(100)) - self._y(100)).square().mean()

    def _x(self, step: int) -> Tensor:
        x = _normal(torch.Generator().manual_seed(1000 + step), 4, 3)
        return x * torch.tensor([0.0, 1.0, 1.0]) if self.dead_input else x

    def _y(self, step: int) -> Tensor:
        return _normal(torch.Generator().manual_seed(2000 + step), 4)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _line(weights: Weights, x: Tensor) -> Tensor:
    slope, intercept = weights
    return x @ slope + intercept


def _network(weights: Weights, x: Tensor) -> Tensor:
    first, bias, last = weights
    return torch.tanh(x @ first + bias) @ last


PROBLEMS = {
    "quadratic": Problem(_line, [(3,), ()]),  # a scalar parameter is among the weights
    "network": Problem(_network, [(3, 3), (3,), (3,)]),
    "dead-input": Problem(_network, [(3, 3), (3,), (3,)], dead_input=True),
}

# Textbook updates: (w, g, s) -> (w', s'), with the buffers s under torch's names

State = dict[str, Any]


def _root(x: Tensor) -> Tensor:
    """Square root that is constant, not infinitely steep, where nothing ever moved."""
    return x.clamp(min=1e-300).sqrt()


def sgd(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    first = "momentum_buffer" not in s
    v = g if first else momentum * s["momentum_buffer"] + (1 - dampening) * g
    return w - lr * (g + momentum * v if nesterov else v), {"momentum_buffer": v}


def _decayed(w: Tensor, g: Tensor, lr: Any, weight_decay: Any, decoupled: bool) -> Weights:
    return (w - lr * weight_decay * w, g) if decoupled else (w, g + weight_decay * w)


def adam(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any = 0.0,
    amsgrad: bool = False,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    w, g = _decayed(w, g, lr, weight_decay, decoupled_weight_decay)
    t = s.get("step", 0) + 1
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    state = {"step": t, "exp_avg": m, "exp_avg_sq": v}
    if amsgrad:
        largest = s.get("max_exp_avg_sq", torch.zeros_like(v))
        state["max_exp_avg_sq"] = v = torch.where(v > largest, v, largest)
    m_hat, v_hat = m / (1 - beta1**t), v / (1 - beta2**t)
    return w - lr * m_hat / (_root(v_hat) + eps), state


def nadam(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    momentum_decay: Any,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    w, g = _decayed(w, g, lr, weight_decay, decoupled_weight_decay)
    t = s.get("step", 0) + 1
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    mu, mu_next = (beta1 * (1 - 0.96 ** (k * momentum_decay) / 2) for k in (t, t + 1))
    product = s.get("mu_product", 1.0) * mu
    m_hat = mu_next * m / (1 - product * mu_next) + (1 - mu) * g / (1 - product)
    w = w - lr * m_hat / (_root(v / (1 - beta2**t)) + eps)
    return w, {"step": t, "exp_avg": m, "exp_avg_sq": v, "mu_product": product}


def radam(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any = 0.0,
    decoupled_weight_decay: bool = False,
) -> tuple[Tensor, State]:
    w, g = _decayed(w, g, lr, weight_decay, decoupled_weight_decay)
    t = s.get("step", 0) + 1
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    v = beta2 * s.get("exp_avg_sq", 0.0) + (1 - beta2) * g**2
    long = 2 / (1 - beta2) - 1
    length = long - 2 * t * beta2**t / (1 - beta2**t)
    step = m / (1 - beta1**t)
    if length > 5:
        r = (length - 4) * (length - 2) * long / ((long - 4) * (long - 2) * length)
        step = step * r**0.5 * (1 - beta2**t) ** 0.5 / (_root(v) + eps)
    return w - lr * step, {"step": t, "exp_avg": m, "exp_avg_sq": v}


def rmsprop(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    alpha: Any,
    eps: Any,
    weight_decay: Any = 0.0,
    momentum: Any = 0.0,
    centered: bool = False,
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    v = alpha * s.get("square_avg", 0.0) + (1 - alpha) * g**2
    mean = alpha * s.get("grad_avg", 0.0) + (1 - alpha) * g
    b = g / (_root(v - mean**2 if centered else v) + eps)
    b = b + momentum * s.get("momentum_buffer", 0.0)
    return w - lr * b, {"square_avg": v, "grad_avg": mean, "momentum_buffer": b}


def adagrad(
    w: Tensor, g: Tensor, s: State, *, lr: Any, lr_decay: Any, eps: Any, weight_decay: Any = 0.0
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    t, total = s.get("step", 0) + 1, s.get("sum", 0.0) + g**2
    rate = lr / (1 + (t - 1) * lr_decay)
    return w - rate * g / (_root(total) + eps), {"step": t, "sum": total}


def adadelta(
    w: Tensor, g: Tensor, s: State, *, lr: Any, rho: Any, eps: Any, weight_decay: Any = 0.0
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    v = rho * s.get("square_avg", 0.0) + (1 - rho) * g**2
    u = s.get("acc_delta", torch.zeros_like(g))
    d = g * ((u + eps) / (v + eps)) ** 0.5
    return w - lr * d, {"square_avg": v, "acc_delta": rho * u + (1 - rho) * d**2}


def adamax(
    w: Tensor,
    g: Tensor,
    s: State,
    *,
    lr: Any,
    beta1: Any,
    beta2: Any,
    eps: Any,
    weight_decay: Any = 0.0,
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    t = s.get("step", 0) + 1
    m = beta1 * s.get("exp_avg", 0.0) + (1 - beta1) * g
    old, new = beta2 * s.get("exp_inf", torch.zeros_like(g)), g.abs() + eps
    u = torch.where(old > new, old, new)
    return w - lr / (1 - beta1**t) * m / u, {"step": t, "exp_avg": m, "exp_inf": u}


def asgd(
    w: Tensor, g: Tensor, s: State, *, lr: Any, lambd: Any, alpha: Any, weight_decay: Any = 0.0
) -> tuple[Tensor, State]:
    g = g + weight_decay * w
    t, eta = s.get("step", 0) + 1, s.get("eta", lr)
    w = w - lambd * eta * w - eta * g
    return w, {"step": t, "eta": lr / (1 + lambd * lr * t) ** alpha}


@dataclass(frozen=True)
class Case:
    """A torch optimizer, its textbook update, and settings of which every one is tuned."""

    make: type[torch.optim.Optimizer]
    update: Callable[..., tuple[Tensor, State]]
    settings: dict[str, float]
    options: dict[str, bool] = field(default_factory=dict)

    def tuned(self, problem: Problem) -> dict[str, float]:
        """The settings, without the decay that would give a dead input a gradient."""
        decoupled = self.make is torch.optim.AdamW or "decoupled_weight_decay" in self.options
        spared = problem.dead_input and not decoupled
        return {k: v for k, v in self.settings.items() if not (spared and k == "weight_decay")}

    def optimizer(self, params: Iterable[Tensor], settings: Lambdas) -> torch.optim.Optimizer:
        """Make the torch optimizer."""
        keywords: dict[str, Any] = dict(settings)
        if "beta1" in keywords:
            keywords["betas"] = (keywords.pop("beta1"), keywords.pop("beta2"))
        return self.make(params, **{"weight_decay": 0.0, **keywords, **self.options})

    def textbook(self, settings: Lambdas) -> Callable[..., tuple[Tensor, State]]:
        """The update as a map (w, g, s) -> (w', s') at given settings."""
        options = {k: v for k, v in self.options.items() if k != "maximize"}
        if self.make is torch.optim.AdamW:
            options["decoupled_weight_decay"] = True
        sign = -1 if self.options.get("maximize") else 1
        return lambda w, g, s: self.update(w, sign * g, s, **settings, **options)


_ADAM = {"lr": 0.05, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3, "weight_decay": 0.02}
_RMSPROP = {"lr": 0.05, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.02}
_DECOUPLED = {"decoupled_weight_decay": True}
_ASCENT = {"maximize": True}

CASES = {
    "sgd": Case(torch.optim.SGD, sgd, {"lr": 0.1, "weight_decay": 0.02}),
    "sgd-momentum": Case(
        torch.optim.SGD,
        sgd,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.02},
    ),
    "sgd-nesterov": Case(
        torch.optim.SGD,
        sgd,
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.02},
        {"nesterov": True},
    ),
    "sgd-momentum-from-0": Case(
        torch.optim.SGD, sgd, {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.02}
    ),
    "sgd-maximize": Case(
        torch.optim.SGD, sgd, {"lr": 0.02, "momentum": 0.8, "weight_decay": 0.02}, _ASCENT
    ),
    "adam": Case(torch.optim.Adam, adam, _ADAM),
    "adam-small-eps": Case(torch.optim.Adam, adam, _ADAM | {"eps": 1e-8}),
    "adam-amsgrad": Case(torch.optim.Adam, adam, _ADAM, {"amsgrad": True}),
    "adam-maximize": Case(torch.optim.Adam, adam, _ADAM, _ASCENT),
    "adamw": Case(torch.optim.AdamW, adam, _ADAM),
    "rmsprop": Case(torch.optim.RMSprop, rmsprop, _RMSPROP),
    "rmsprop-centered-momentum": Case(
        torch.optim.RMSprop, rmsprop, _RMSPROP | {"momentum": 0.7}, {"centered": True}
    ),
    "rmsprop-momentum-from-0": Case(torch.optim.RMSprop, rmsprop, _RMSPROP | {"momentum": 0.0}),
    "rmsprop-maximize": Case(torch.optim.RMSprop, rmsprop, _RMSPROP, _ASCENT),
    "adagrad": Case(
        torch.optim.Adagrad,
        adagrad,
        {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3, "weight_decay": 0.02},
    ),
    "adagrad-maximize": Case(
        torch.optim.Adagrad, adagrad, {"lr": 0.1, "lr_decay": 0.1, "eps": 1e-3}, _ASCENT
    ),
    "adadelta": Case(
        torch.optim.Adadelta,
        adadelta,
        {"lr": 1.0, "rho": 0.8, "eps": 1e-3, "weight_decay": 0.02},
    ),
    "adamax": Case(torch.optim.Adamax, adamax, _ADAM),
    "nadam": Case(torch.optim.NAdam, nadam, _ADAM | {"momentum_decay": 0.1}),
    "nadam-decoupled": Case(torch.optim.NAdam, nadam, _ADAM | {"momentum_decay": 0.1}, _DECOUPLED),
    "radam": Case(torch.optim.RAdam, radam, _ADAM),
    "radam-decoupled": Case(torch.optim.RAdam, radam, _ADAM, _DECOUPLED),
    "asgd": Case(
        torch.optim.ASGD,
        asgd,
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.75, "weight_decay": 0.02},
    ),
}

# The unrolled reference

Loss = Callable[[Weights], Tensor]
Update = Callable[[Tensor, Tensor, State], tuple[Tensor, State]]


def unroll(
    weights: Sequence[Tensor],
    updates: Sequence[Update],
    steps: Iterable[Sequence[Loss]],
    states: Sequence[State] | None = None,
    clip: Callable[[list[Tensor]], list[Tensor]] = lambda grads: grads,
) -> list[Tensor]:
    """Train by differentiable operations alone; return the last weights with their graph.

    Args:
        weights: Start, each ``[*P]``.
        updates: Textbook update of each weight.
        steps: Losses of the micro-batches of each step.
        states: Buffers at the start, of each weight.
        clip: What is done to the gradients that are there.
    """
    current = [w.detach().clone().requires_grad_(w.requires_grad) for w in weights]
    buffers = [dict(state) for state in states] if states else [{} for _ in weights]
    trained = [i for i, w in enumerate(current) if w.requires_grad]
    for losses in steps:
        inputs = [current[i] for i in trained]
        total = torch.stack([loss(current) for loss in losses]).sum()
        found = torch.autograd.grad(total, inputs, create_graph=True, allow_unused=True)
        pairs = [(i, g) for i, g in zip(trained, found, strict=True) if g is not None]
        for (i, _), grad in zip(pairs, clip([g for _, g in pairs]), strict=True):
            current[i], buffers[i] = updates[i](current[i], grad, buffers[i])
    return current


def torch_states(optimizer: torch.optim.Optimizer, params: Iterable[Tensor]) -> list[State]:
    """Copy the buffers of a torch optimizer, for a reference to go on from."""
    return [
        {
            name: int(value) if name == "step" else torch.as_tensor(value).detach().clone()
            for name, value in optimizer.state[param].items()
            if value is not None
        }
        for param in params
    ]


def derivative(value: Tensor, lambdas: Lambdas) -> Tensor:
    """Return d value / d lambda for all hyperparameters in a row ``[m]``."""
    found = torch.autograd.grad(value, list(lambdas.values()), materialize_grads=True)
    return torch.cat([part.flatten() for part in found])


def leaves(lambdas: Mapping[str, Any]) -> dict[str, Tensor]:
    """Plain float64 tensors that require grad, for the references."""
    return {
        name: torch.as_tensor(value, dtype=torch.float64).clone().requires_grad_()
        for name, value in lambdas.items()
    }


def hyperparameters(lambdas: Mapping[str, Any]) -> dict[str, Hyperparameter]:
    """The same values as hyperparameters of the package; domains matter to the outer step only."""
    return {name: Hyperparameter(value, Real()) for name, value in lambdas.items()}


# The plain loop


class Run:
    """Plain training with a torch optimizer, each step of which a method follows.

    Args:
        optimizer: A torch optimizer, with hyperparameters among its settings.
        hypers: All hyperparameters by name.
        make_method: Makes the method.
        clip: Clipping, done by torch's own functions.
        module: Module whose running statistics are followed.
        bystanders: Weights in the loss that the optimizer does not train.
        scale: Factor on the losses that is taken off the gradients again before the step.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        hypers: Mapping[str, Hyperparameter],
        make_method: MakeMethod,
        *,
        clip: GradientClip | None = None,
        module: nn.Module | None = None,
        bystanders: Sequence[Tensor] = (),
        scale: float = 1.0,
    ) -> None:
        self.scale = scale
        self.optimizer = DifferentiableOptimizer(optimizer)
        self.hypers = list(hypers.values())
        self.params = [*self.optimizer.params, *bystanders]
        self.method = make_method(self.params, self.hypers)
        self.clip = clip
        self.module = module or nn.Module()
        self.statistics = RunningStatistics(self.module)
        self.columns, entry = {}, 0
        for hyper in self.hypers:
            self.columns[id(hyper)] = entry
            entry += hyper.numel()

    def plain_step(self, *losses: Callable[[], Tensor]) -> None:
        """Make a step that the method does not see."""
        self.optimizer.zero_grad()
        for loss in losses:
            loss().backward()
        self._clip()
        self.optimizer.before_update = None
        self.optimizer.step()

    def step(
        self,
        *losses: Callable[[], Tensor],
        replays: Sequence[Callable[[], Tensor]] | None = None,
        edit: Callable[[], None] = lambda: None,
        skip: bool = False,
    ) -> None:
        """Make a step that the method follows.

        Args:
            losses: One a micro-batch.
            replays: What replays compute instead.
            edit: Called between backward and the optimizer's step.
            skip: Leave the step out once its gradient is there.
        """
        for hyper in self.hypers:
            hyper.requires_grad_()
        self.optimizer.zero_grad()
        for loss, again in zip(losses, replays or losses, strict=True):
            self.method.start()
            replay = self._replay(again)
            traced = self._trace(loss)
            self._backward(traced.value, self.method.record(traced, replay))
        for param in self.params:
            if param.grad is not None:
                param.grad /= self.scale
        raw = {p: p.grad.clone() for p in self.params if p.grad is not None}
        self._clip()
        edit()
        if skip:
            self.method.advance(OptimizerStep([], []))
            return

        def announce() -> None:
            transitions = self.optimizer.transitions(self.columns)
            seen = [self.params[t.index] for t in transitions]
            grads = [p.grad if self.clip is None else raw[p] for p in seen]
            self.method.advance(OptimizerStep(transitions, grads, self.clip))
            self.optimizer.carry_derivative_buffers(transitions)

        self.optimizer.before_update = announce
        self.optimizer.step()

    def hypergradient(self, outer: Callable[[], Tensor], *, running: bool = False) -> Tensor:
        """Return dE/dlambda ``[m]`` at the present weights."""
        context = self.statistics.differentiable() if running else nullcontext([])
        with context as statistics:
            gradient = outer_gradient([outer], self.params, self.hypers, statistics)
        return self.method.hypergradient(gradient)

    def _trace(self, loss: Callable[[], Tensor]) -> TracedLoss:
        self.statistics.start()
        try:
            value = loss()
        finally:
            updates = self.statistics.collect()
        return TracedLoss(self.scale * value, updates, self.scale)

    def _replay(self, loss: Callable[[], Tensor]) -> Callable[[], TracedLoss]:
        """A replay that finds the module's buffers as they are now, and leaves them alone."""
        past = {name: buffer.clone() for name, buffer in self.module.named_buffers()}

        def put(buffers: Mapping[str, Tensor]) -> None:
            for path, buffer in buffers.items():
                owner, _, name = path.rpartition(".")
                self.module.get_submodule(owner)._buffers[name] = buffer

        def replay() -> TracedLoss:
            present = dict(self.module.named_buffers())
            put({path: buffer.clone() for path, buffer in past.items()})
            traced = self._trace(loss)
            put(present)
            return traced

        replay.is_sample = False
        return replay

    def _backward(self, loss: Tensor, gradients: list[Tensor | None] | None) -> None:
        """Give the parameters their gradients; a graph that is kept must not be freed."""
        if gradients is None:
            loss.backward()
        else:
            pairs = [(p, g) for p, g in zip(self.params, gradients, strict=True) if g is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
        for hyper in self.hypers:
            hyper.grad = None

    def _clip(self) -> None:
        if self.clip is None:
            return
        by_norm = isinstance(self.clip, ClipByNorm)
        torch_clip = nn.utils.clip_grad_norm_ if by_norm else nn.utils.clip_grad_value_
        torch_clip(self.optimizer.params, self.clip.limit)


def watch_graph(value: Tensor) -> Callable[[], bool]:
    """Return a function that tells whether any node of the graph of a value is still alive."""
    token = type("Token", (), {})()
    nodes = [value.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and not hasattr(node, "variable"):  # a leaf's node lives with the leaf
            node.metadata["token"] = token
            nodes += [following for following, _ in node.next_functions]
    reference = weakref.ref(token)
    return lambda: reference() is not None


# Both, for a row of each table

STEPS = 4
WARM_STEPS = 3


def steps_for(case: str) -> int:
    """RAdam passes from its one branch to the other at the sixth step."""
    return 7 if case.startswith("radam") else STEPS


def _start(case: Case, problem: Problem) -> tuple[dict[str, Any], dict[str, Any]]:
    return case.tuned(problem), problem.loss_hypers


@cache
def measured(case_name: str, problem_name: str, warm: bool, method: str) -> Tensor:
    """Hypergradient ``[m]`` of a short run by a method of the package."""
    case, problem = CASES[case_name], PROBLEMS[problem_name]
    settings, in_loss = _start(case, problem)
    hypers = hyperparameters(settings | in_loss)
    params = [w.requires_grad_() for w in problem.start]
    optimizer = case.optimizer(params, {name: hypers[name] for name in settings})
    run = Run(optimizer, hypers, METHODS[method])
    lambdas = {name: hypers[name] for name in in_loss}
    first = WARM_STEPS if warm else 0
    for step in range(first):
        run.plain_step(partial(problem.inner, params, lambdas, step))
    for step in range(first, first + steps_for(case_name)):
        run.step(partial(problem.inner, params, lambdas, step))
    return run.hypergradient(lambda: problem.outer(params))


@cache
def unrolled(case_name: str, problem_name: str, warm: bool) -> Tensor:
    """The same ``[m]`` by autograd through the textbook formulas."""
    case, problem = CASES[case_name], PROBLEMS[problem_name]
    settings, in_loss = _start(case, problem)
    params = [w.requires_grad_() for w in problem.start]
    optimizer = case.optimizer(params, settings)
    first = WARM_STEPS if warm else 0
    for step in range(first):
        optimizer.zero_grad()
        problem.inner(params, in_loss, step).backward()
        optimizer.step()
    lambdas = leaves(settings | in_loss)
    update = case.textbook({name: lambdas[name] for name in settings})
    losses = [
        [partial(problem.inner, lambdas={name: lambdas[name] for name in in_loss}, step=step)]
        for step in range(first, first + steps_for(case_name))
    ]
    states = torch_states(optimizer, params) if warm else None
    weights = unroll(params, [update] * len(params), losses, states)
    return derivative(problem.outer(weights), lambdas)


def settings_of(optimizer_class: type[torch.optim.Optimizer]) -> set[str]:
    """All settings that the package can tune in an optimizer."""
    return set(rule_class_for(optimizer_class([torch.zeros(1)])).domains)
