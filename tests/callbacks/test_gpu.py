"""The same numbers on a CUDA device, with its own kernels, scaler and random state."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from torch import optim

from lightning_rtho import TRHO, Hyperparameter, Offload, Positive
from tests.callbacks import test_checkpoint, test_ddp, test_models, test_precision, test_trust
from tests.callbacks.problems import SmallNet, as_hyperparameters, fit
from tests.callbacks.test_precision import OBSERVERS

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ON_GPU: dict[str, Any] = {"accelerator": "gpu"}
METHODS = OBSERVERS | {
    "offload": lambda: TRHO(hyper_batch_size=4, outer_optimizer=None, tape=Offload("cpu"))
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.02}),
    "adam": (optim.Adam, {"lr": 0.05, "eps": 1e-3, "weight_decay": 0.02}),
}


@pytest.fixture
def deterministic() -> Iterator[dict[str, Any]]:
    """Settings under which two runs are alike; Lightning leaves torch's switch on."""
    yield ON_GPU | {"deterministic": "warn"}
    torch.use_deterministic_algorithms(False)


def scaler() -> MixedPrecision:
    return MixedPrecision("16-mixed", DEVICE, torch.amp.GradScaler(DEVICE, init_scale=2.0**10))


def test_a_setting_of_one_entry_and_an_index_of_the_host():
    class Weighted(SmallNet):
        def training_step(self, batch, batch_idx):
            weight = self.l2[torch.tensor([0])] * torch.tensor(0.5)
            return (super().training_step(batch, batch_idx) * weight).sum()

    module = Weighted(lr=Hyperparameter([0.1], Positive()), l2=Hyperparameter([0.1], Positive()))
    fit(module, callback := METHODS["forward"](), steps=4, **ON_GPU)
    assert len(callback.schedule) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_method_gives_the_value_of_the_cpu(name):
    optimizer, settings = OPTIMIZERS[name]
    found = {}
    for method, make in METHODS.items():
        for where in ({}, ON_GPU):
            hypers = as_hyperparameters({**settings, "l2": 0.01})
            callback = make()
            trainer = fit(SmallNet(optimizer, **hypers), callback, steps=4, **where)
            device = trainer.strategy.root_device.type
            found[method, device] = {k: v.item() for k, v in callback.hypergradients.items()}
    assert {device for _, device in found} == {"cpu", DEVICE}
    reference = found["forward", "cpu"]
    # Float64's rounding, amplified by four steps.
    assert all(values == pytest.approx(reference, rel=1e-10) for values in found.values())


@pytest.mark.parametrize("method", test_models.METHODS)
@pytest.mark.parametrize(
    "name",
    ["attention", "lstm", "gru", "rnn", "embedding", "group norm", "layer norm"],
)
def test_layers_with_kernels_of_their_own_give_the_value_of_the_cpu(name, method):
    found = []
    for where in ({}, ON_GPU):
        callback = test_models.METHODS[method]()
        body = test_models.FOLLOWED[name]
        fit(SmallNet(optim.SGD, body=body, lr=0.1, momentum=0.5), callback, steps=4, **where)
        found.append(callback.hypergradients["lr"].item())
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.mark.parametrize("method", test_models.METHODS)
def test_weight_norm_gives_the_value_of_the_cpu_in_single_precision(method):
    """Of torch's fused kernel, which the plain training step runs, the norm has no more."""
    torch.set_default_dtype(torch.float32)
    found = []
    for where in ({}, ON_GPU):
        callback = test_models.METHODS[method]()
        body = test_models.FOLLOWED["weight norm"]
        fit(SmallNet(optim.SGD, body=body, lr=0.1, momentum=0.5), callback, steps=4, **where)
        found.append(callback.hypergradients["lr"].item())
    # Float32's rounding of 6e-8, amplified by four steps.
    assert found[0] == pytest.approx(found[1], rel=1e-4)


@pytest.mark.parametrize("observer", test_trust.OBSERVERS)
def test_observing_changes_nothing(observer, deterministic):
    torch.set_default_dtype(torch.float32)
    runs = []
    for callbacks in ([], [test_trust.OBSERVERS[observer]()]):
        module = test_trust.Busy(optimizer=optim.Adam, lr=0.01, l2=Hyperparameter(0.01, Positive()))
        trainer = fit(module, *callbacks, steps=9, check_val_every_n_epoch=1, **deterministic)
        tensors, others = test_trust.everything(module, trainer)
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
        runs.append((tensors, others))
    (plain, plain_others), (observed, observed_others) = runs
    assert plain.keys() == observed.keys()
    assert [name for name in plain if not torch.equal(plain[name], observed[name])] == []
    assert plain_others == observed_others
    assert len(callbacks[0].schedule) == 3


@pytest.mark.parametrize("name", ["attention", "lstm", "transformer"])
def test_recomputing_observer_leaves_the_kernels_of_the_training_step(name, deterministic):
    torch.set_default_dtype(torch.float32)
    weights = []
    for callbacks in ([], [test_models.METHODS["recompute"]()]):
        module = SmallNet(optim.Adam, body=test_models.FOLLOWED[name], lr=0.01)
        fit(module, *callbacks, steps=8, **deterministic)
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("method", OBSERVERS)
@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [("bf16-mixed", 0.1), ("bf16-true", 0.1), ("scaled", 0.02)],  # as on the CPU
)
def test_reduced_precision_agrees_with_float32(method, precision, tolerance):
    full = test_precision.hypergradients(OBSERVERS[method]())
    settings = {"plugins": [scaler()]} if precision == "scaled" else {"precision": precision}
    reduced = test_precision.hypergradients(OBSERVERS[method](), **settings, **ON_GPU)
    assert reduced == pytest.approx(full, rel=tolerance)
    assert reduced != full


@pytest.mark.parametrize("method", OBSERVERS)
def test_step_skipped_by_the_scaler_is_no_step(method):
    test_precision.check_that_a_skipped_step_is_no_step(OBSERVERS[method], scaler, **ON_GPU)


@pytest.mark.parametrize(
    ("method", "step"),
    [(method, step) for method in test_checkpoint.METHODS for step in (6, 7)][:-1],
)  # where a window ends, and in its midst, which a kept graph does not outlive
def test_resumed_run_is_bitwise_the_uninterrupted_one(method, step, tmp_path, deterministic):
    found = []
    for ckpt_path in (None, tmp_path / f"step={step}.ckpt"):
        callback = test_checkpoint.METHODS[method]()
        ended = test_checkpoint.run(callback, tmp_path, ckpt_path=ckpt_path, **deterministic)
        found.append(test_checkpoint.final(*ended, callback))
    whole, resumed = found
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []


class Unwaiting(Callback):
    """Lets no step of the second window wait for the device, but for its update."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if 4 <= batch_idx < 8:
            torch.cuda.set_sync_debug_mode("error")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", OBSERVERS)
def test_no_step_waits_for_the_device(method, name):
    optimizer, settings = OPTIMIZERS[name]
    module = SmallNet(optimizer, **as_hyperparameters({**settings, "l2": 0.01}))
    try:
        # Before ours, so that it looks away before the update.
        fit(module, Unwaiting(), callback := OBSERVERS[method](), steps=8, **ON_GPU)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(callback.schedule) == 2


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("method", test_ddp.METHODS)
def test_two_devices_equal_one(method, tmp_path):
    (one,) = test_ddp.run(method, tmp_path / "one", 1, "auto", **ON_GPU)
    strategy = DDPStrategy(start_method="spawn", process_group_backend="nccl")
    two = test_ddp.run(method, tmp_path / "two", 2, strategy, **ON_GPU)
    for rank in two:
        # Sums over the batch are taken in another order.
        torch.testing.assert_close(rank, one, rtol=1e-10, atol=1e-12)
    for kind in ("values", "hypergradients"):
        for update, other in zip(two[0][kind], two[1][kind], strict=True):
            assert all(torch.equal(update[name], other[name]) for name in update)
