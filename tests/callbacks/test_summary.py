"""The table before a run says what is tuned, where it acts and what that costs."""

from typing import Any

import pytest
from torch import nn, optim

from lightning_rtho import RTHO, TRHO, Hyperparameter, Interval, KeepGraph, Offload, Positive
from lightning_rtho.callbacks import _base
from tests.callbacks.problems import SmallNet, fit
from tests.callbacks.test_manual import ByHand


class TwoGroups(SmallNet):
    """Four hyperparameters of five entries: in the loss, in one group, in two."""

    def __init__(self) -> None:
        super().__init__(
            body=lambda: nn.Sequential(
                nn.Linear(3, 9), nn.Tanh(), nn.LayerNorm(9, elementwise_affine=False),
                nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 1, bias=True),
            ),
            l2=Hyperparameter(0.01, Positive()),
        )  # fmt: skip
        self.first = Hyperparameter(0.1, Positive())
        self.decay = Hyperparameter(0.001, Positive())
        self.shift = Hyperparameter([0.25, 0.75], Interval(0, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.shift.square().sum()

    def configure_optimizers(self) -> optim.Optimizer:
        groups = [
            {"params": self.net[0].parameters(), "lr": self.first},  # 36 weights
            {"params": [*self.net[3].parameters(), *self.net[5].parameters()]},  # 40 and 5
        ]
        return optim.SGD(groups, lr=0.2, momentum=0.9, weight_decay=self.decay)


GRADIENT = (36 + 40 + 5) * 8 / 1e3  # kB in float64
STATE = 2 * GRADIENT  # with the velocity
TIME = "x the gradient of a plain step, if validation batches are as large as its own."
ON_TOP = "Second derivatives within a step come on top."


@pytest.fixture
def printed(monkeypatch) -> list[str]:
    """What is printed by Lightning's utility."""
    lines: list[str] = []
    monkeypatch.setattr(_base, "rank_zero_info", lambda text: lines.extend(text.splitlines()[1:]))
    return lines


def test_table_names_every_hyperparameter_and_where_it_acts(printed):
    fit(TwoGroups(), RTHO(hyper_batch_size=2), steps=2)
    assert printed[:6] == [
        "name  | value            | domain                  | acts as",
        "------+------------------+-------------------------+----------------------------",
        "l2    | 0.01             | Positive()              | loss",
        "first | 0.1              | Positive()              | lr of group 1",
        "decay | 0.001            | Positive()              | weight_decay of groups 1, 2",
        "shift | 0.5, mean of [2] | Interval(low=0, high=1) | loss",
    ]


@pytest.mark.parametrize(
    ("callback", "settings", "expected"),
    [
        (
            # (3 + 6 * 5) / 3 and a validation gradient in 4 steps; for TRHO (12 - 6 / 4) / 3 and it
            RTHO(hyper_batch_size=4),
            {},
            [
                "RTHO(hyper_batch_size=4) looks back over the whole run.",
                f"Time: 11.2 {TIME}",
                f"Memory: keeps {6 * STATE:.3g} kB: 5 training states of {STATE:.3g} kB, a copy of "
                f"the best state so far. {ON_TOP}",
                "TRHO(hyper_batch_size=4) would take 3.8 x, but keep 4 training states and look "
                "back over its hyper-batch.",
            ],
        ),
        (
            RTHO(["l2"], hyper_batch_size=1, outer_batches=2, safeguard=False),
            {"accumulate_grad_batches": 2},  # the tangents' gradients are added up
            [
                "RTHO(hyper_batch_size=1) looks back over the whole run.",
                f"Time: 5.0 {TIME}",
                f"Memory: keeps {STATE + GRADIENT:.3g} kB: 1 training state of {STATE:.3g} kB, "
                f"1 gradient of {GRADIENT:.3g} kB. {ON_TOP}",
                "TRHO(hyper_batch_size=1) would take 4.0 x, but keep 1 training state and look "
                "back over its hyper-batch.",
            ],
        ),
        (
            TRHO(hyper_batch_size=1, tape=KeepGraph(), outer_optimizer=None),  # (9 - 6) / 3 and 1
            {},
            [
                "TRHO(hyper_batch_size=1, tape=KeepGraph) looks back over its hyper-batch.",
                f"Time: 2.0 {TIME}",
                f"Memory: keeps {STATE + GRADIENT:.3g} kB: 1 training state of {STATE:.3g} kB, "
                f"1 gradient of {GRADIENT:.3g} kB. The graphs of 1 step and second derivatives "
                "within one come on top.",
            ],
        ),
        (
            TRHO(["first"], hyper_batch_size=10, tape=Offload("cpu"), safeguard=False),
            {},
            [
                "TRHO(hyper_batch_size=10, tape=Offload) looks back over its hyper-batch.",
                f"Time: 3.9 {TIME}",
                f"Memory: keeps {10 * STATE:.3g} kB: 10 training states of {STATE:.3g} kB on cpu. "
                f"{ON_TOP}",
                "RTHO(hyper_batch_size=10) would take 3.1 x, but keep 1 training state and look "
                "back over the whole run.",
            ],
        ),
    ],
    ids=["forward", "accumulated", "keep graph", "offload"],
)
def test_costs_are_those_counted_by_hand(callback, settings, expected, printed):
    fit(TwoGroups(), callback, steps=1, **settings)
    assert printed[-len(expected) :] == expected
    assert not any(line in printed for line in expected[4:])


def test_state_holds_what_the_optimizer_will_keep_of_weights_that_are_trained(printed):
    module = SmallNet(optim.Adam, lr=Hyperparameter(0.1, Positive()), l2=0.0, amsgrad=True)
    module.net[2].bias.requires_grad_(False)
    fit(module, RTHO(safeguard=False), steps=2)
    trained = 9 + 3 + 3
    # Each with two averages and the maximum of one; a count of steps for each of three tensors.
    assert f"1 training state of {(4 * 8 * trained + 3 * 4) / 1e3:.3g} kB" in printed[-1]


def test_other_method_is_not_advised_where_it_is_refused(printed):
    module = ByHand(**{n: Hyperparameter(v, Positive()) for n, v in [("lr", 0.1), ("l2", 0.1)]})
    fit(module, RTHO(hyper_batch_size=2), steps=2)
    assert "Time: 5.5 x the" in printed[-2]
    assert "TRHO" not in "".join(printed)


@pytest.mark.parametrize("method", [RTHO, TRHO])
def test_nothing_is_printed_where_that_is_asked(method, printed):
    fit(TwoGroups(), method(hyper_batch_size=2, summary=False), steps=2)
    assert printed == []
