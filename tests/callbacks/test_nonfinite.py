"""What is not finite freezes hypergradients and hyperparameters for that step, and nothing else."""

import csv

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_rtho import RTHO, TRHO, Hyperparameter, NonNegative
from tests.callbacks.problems import SmallNet, fit

METHODS = {"forward": RTHO, "reverse": TRHO}


class Curved(torch.autograd.Function):
    """x, whose second derivative is infinite; values and gradients are ordinary."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 + 0 * (x - x.detach()).abs().sqrt()).nan_to_num()


class Bad(SmallNet):
    """Has one bad step, of the kind asked for."""

    def __init__(self, kind: str, at: int, **settings) -> None:
        super().__init__(**settings)
        self.kind, self.at = kind, at

    def training_step(self, batch, batch_idx):
        x, y = batch
        bad = self.global_step == self.at
        if bad and self.kind == "loss":
            return super().training_step((x, y * float("nan")), batch_idx)
        if bad and self.kind == "Hessian product":
            bias = Curved.apply(self.net[-1].bias)
            return super().training_step(batch, batch_idx) + bias.sum()
        return super().training_step(batch, batch_idx)


def fitted(module: SmallNet, callback, **settings):
    return fit(module, callback, steps=12, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_product_that_is_not_finite(method, tmp_path):
    """Z stays for that step, the update that it is due at does not come, and the run goes on."""
    callback = METHODS[method](["lr"], hyper_batch_size=2)
    module = Bad("Hessian product", at=5, lr=0.1)
    with pytest.warns(UserWarning, match="Hessian product is not finite at step 6") as warned:
        fitted(module, callback, logger=CSVLogger(tmp_path))
    assert sum("not finite" in str(w.message) for w in warned) == 1
    assert [update.step for update in callback.schedule] == [2, 4, 8, 10, 12]
    assert all(update.hypergradients["lr"].isfinite() for update in callback.schedule)
    assert all(p.isfinite().all() for p in module.parameters())
    assert _counts(tmp_path) == ["1"]


def _counts(path):
    """Read the values of `nonfinite_steps` that were logged."""
    (log,) = path.rglob("metrics.csv")
    with log.open() as file:
        return [row["nonfinite_steps"] for row in csv.DictReader(file) if row["nonfinite_steps"]]


class InGroups(Bad):
    """The rate that is tuned is not that of the weight with the bad product."""

    def configure_optimizers(self):
        groups = [{"params": self.net[i].parameters(), "lr": lr} for i, lr in ((0, 0.1), (2, 0.2))]
        return torch.optim.SGD(groups)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [2, 3])
def test_the_step_of_a_bad_product_is_named_where_another_weight_is_tuned(method, at):
    callback = METHODS[method](["lr"], hyper_batch_size=4, safeguard=False)
    module = InGroups("Hessian product", at=at)
    with pytest.warns(UserWarning, match=f"Hessian product is not finite at step {at + 1}"):
        fit(module, callback, steps=4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("at", [1, 2, 3])
def test_the_step_of_a_bad_product_is_named(method, at):
    callback = METHODS[method](["lr"], hyper_batch_size=4)
    with pytest.warns(UserWarning, match=f"Hessian product is not finite at step {at + 1}"):
        fit(Bad("Hessian product", at=at, lr=0.1), callback, steps=4)


@pytest.mark.parametrize("at", [0, 2])
def test_a_bad_product_with_a_hyperparameter_of_the_loss(at):
    """It shows in the hypergradient at once, also in the first step of a window."""

    class Weighed(SmallNet):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.global_step == at:
                loss = loss + Curved.apply(self.l2 * self.net[-1].bias).sum()
            return loss

    module = Weighed(l2=Hyperparameter(0.01, NonNegative()), lr=0.1)
    callback = TRHO(hyper_batch_size=4)
    with pytest.warns(UserWarning, match=f"Hessian product is not finite at step {at + 1}"):
        fit(module, callback, steps=4)


@pytest.mark.parametrize("method", METHODS)
def test_a_bad_product_counts_once(method, tmp_path):
    callback = METHODS[method](["lr"], hyper_batch_size=4)
    settings = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit(Bad("Hessian product", at=1, lr=0.1), callback, steps=4, **settings)
    assert _counts(tmp_path) == ["1"]


def test_forward_mode_keeps_its_history_through_a_bad_product():
    """After one frozen step of six, Z is not that of the run, but it is not zero either."""
    found = []
    for at in (4, 100):
        callback = RTHO(["lr"], hyper_batch_size=6, outer_optimizer=None)
        fit(Bad("Hessian product", at=at, lr=0.1), callback, steps=6)
        found.append(callback.hypergradients["lr"])
    frozen, exact = found
    assert frozen != exact
    one_step = RTHO(["lr"], hyper_batch_size=6, outer_optimizer=None, discount=0.0)
    fit(Bad("Hessian product", at=100, lr=0.1), one_step, steps=6)
    assert abs(frozen - exact) < abs(one_step.hypergradients["lr"] - exact)


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_leaves_the_run_as_it_would_be(method):
    plain = Bad("loss", at=5, lr=0.1)
    fit(plain, steps=12)
    observed = Bad("loss", at=5, lr=0.1)
    callback = METHODS[method](["lr"], hyper_batch_size=2, outer_optimizer=None)
    with pytest.warns(UserWarning, match="gradient is not finite at step 6"):
        fitted(observed, callback)
    assert [update.step for update in callback.schedule] == [2, 4]
    for one, other in zip(plain.parameters(), observed.parameters(), strict=True):
        assert torch.equal(one.isnan(), other.isnan())
        assert one.isnan().any()
