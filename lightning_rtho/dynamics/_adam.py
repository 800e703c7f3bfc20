"""Adam, AdamW and NAdam, RAdam: running averages of the gradient and of its square."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_rtho._numerics import sqrt_zero_slope
from lightning_rtho._types import Hypers, State
from lightning_rtho.dynamics._base import UpdateRule
from lightning_rtho.hyperparameters import Interval, NonNegative, Positive

__all__ = ["AdamRule", "NAdamRule", "RAdamRule"]

_DOMAINS = {
    "lr": Positive(),
    "beta1": Interval(0, 1),
    "beta2": Interval(0, 1),
    "eps": Positive(),
    "weight_decay": NonNegative(),
}


def _zero_moments(param: Tensor) -> State:
    """Step count 0 and zero running averages."""
    return {
        "step": param.new_zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(param),
        "exp_avg_sq": torch.zeros_like(param),
    }


def _decay(param: Tensor, grad: Tensor, hyper: Hypers, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Apply weight decay: w <- (1 - eta rho) w if decoupled, else g <- g + rho w."""
    if decoupled:
        return param * (1 - hyper["lr"] * hyper["weight_decay"]), grad
    return param, grad + hyper["weight_decay"] * param


def _moments(state: State, grad: Tensor, hyper: Hypers) -> tuple[Tensor, Tensor]:
    """Running averages m' = b1 m + (1 - b1) g and v' = b2 v + (1 - b2) g^2."""
    mean = state["exp_avg"] + (1 - hyper["beta1"]) * (grad - state["exp_avg"])
    square = hyper["beta2"] * state["exp_avg_sq"] + (1 - hyper["beta2"]) * grad * grad
    return mean, square


@final
@dataclass(frozen=True)
class AdamRule(UpdateRule):
    r"""Rule of ``torch.optim.Adam`` and ``AdamW``: w' = w - eta m^ / (sqrt(v^) + eps).

    m^ = m' / (1 - b1^t) and v^ = v' / (1 - b2^t) are the bias-corrected running averages. Where
    every gradient so far was zero, the derivative of the quotient is m^_dot / eps.

    Attributes:
        amsgrad: Divide by the largest second moment so far.
        maximize: Ascend the objective.
        decoupled_weight_decay: Decay the weights rather than the gradient.

    References:
        Kingma and Ba (2015); Loshchilov and Hutter (2019); Reddi et al. (2018).
    """

    domains = _DOMAINS
    buffers = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        largest = {"max_exp_avg_sq": torch.zeros_like(param)} if self.amsgrad else {}
        return {**_zero_moments(param), **largest}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        param, grad = _decay(state["param"], self.ascent(grad), hyper, self.decoupled_weight_decay)
        mean, square = _moments(state, grad, hyper)
        new_state = {"step": step, "exp_avg": mean, "exp_avg_sq": square}
        if self.amsgrad:
            square = torch.maximum(state["max_exp_avg_sq"], square)
            new_state["max_exp_avg_sq"] = square
        step_size = hyper["lr"] / (1 - hyper["beta1"] ** step)
        scale = (1 - hyper["beta2"] ** step).sqrt()
        denominator = sqrt_zero_slope(square) / scale + hyper["eps"]
        return {"param": param - step_size * mean / denominator, **new_state}


@final
@dataclass(frozen=True)
class NAdamRule(UpdateRule):
    r"""Rule of ``torch.optim.NAdam``: Adam with Nesterov's momentum on a schedule mu_t.

    mu_t = b1 (1 - 0.96^(t psi) / 2), where psi is ``momentum_decay``.

    Attributes:
        maximize: Ascend the objective.
        decoupled_weight_decay: Decay the weights rather than the gradient.

    References:
        Dozat (2016), in the form of ``torch.optim.NAdam``.
    """

    domains = {**_DOMAINS, "momentum_decay": NonNegative()}
    buffers = ("step", "mu_product", "exp_avg", "exp_avg_sq")

    maximize: bool = False
    decoupled_weight_decay: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return {**_zero_moments(param), "mu_product": torch.ones_like(hyper["beta1"])}

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        param, grad = _decay(state["param"], self.ascent(grad), hyper, self.decoupled_weight_decay)

        def momentum(at: Tensor) -> Tensor:
            return hyper["beta1"] * (1 - 0.5 * 0.96 ** (at * hyper["momentum_decay"]))

        mu, mu_next = momentum(step), momentum(step + 1)
        mu_product = state["mu_product"] * mu
        mean, square = _moments(state, grad, hyper)
        denominator = sqrt_zero_slope(square / (1 - hyper["beta2"] ** step)) + hyper["eps"]
        from_grad = hyper["lr"] * (1 - mu) / (1 - mu_product)
        from_mean = hyper["lr"] * mu_next / (1 - mu_product * mu_next)
        return {
            "param": param - from_grad * grad / denominator - from_mean * mean / denominator,
            "step": step,
            "mu_product": mu_product,
            "exp_avg": mean,
            "exp_avg_sq": square,
        }


@final
@dataclass(frozen=True)
class RAdamRule(UpdateRule):
    r"""Rule of ``torch.optim.RAdam``: Adam whose adaptive rate is rectified by r_t.

    While the second moment rests on too few steps (rho_t <= 5) the step is eta m^ alone.

    Attributes:
        maximize: Ascend the objective.
        decoupled_weight_decay: Decay the weights rather than the gradient.

    References:
        Liu et al. (2020), in the form of ``torch.optim.RAdam``.
    """

    domains = _DOMAINS
    buffers = ("step", "exp_avg", "exp_avg_sq")

    maximize: bool = False
    decoupled_weight_decay: bool = False

    def init(self, param: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.init`."""
        return _zero_moments(param)

    def update(self, state: State, grad: Tensor, hyper: Hypers) -> State:
        """See :meth:`UpdateRule.update`."""
        step = state["step"] + 1
        param, grad = _decay(state["param"], self.ascent(grad), hyper, self.decoupled_weight_decay)
        mean, square = _moments(state, grad, hyper)
        power = hyper["beta2"] ** step
        rho_inf = 2 / (1 - hyper["beta2"]) - 1
        rho = rho_inf - 2 * step * power / (1 - power)
        rectified = rho > 5
        # Below the threshold these may be negative or 0; they are not used there.
        numerator = (rho - 4) * (rho - 2) * rho_inf
        denominator = torch.where(rectified, (rho_inf - 4) * (rho_inf - 2) * rho, 1.0)
        rectification = torch.where(rectified, numerator / denominator, 1.0).sqrt()
        adaptive = (1 - power).sqrt() / (sqrt_zero_slope(square) + hyper["eps"])
        rate = torch.where(rectified, rectification * adaptive, 1.0)
        mean_hat = mean / (1 - hyper["beta1"] ** step)
        return {
            "param": param - hyper["lr"] * mean_hat * rate,
            "step": step,
            "exp_avg": mean,
            "exp_avg_sq": square,
        }
