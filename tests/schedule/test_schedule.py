"""A schedule: a sequence of updates that a file gives back to the last bit."""

import csv
import json
import math
import sys
from types import ModuleType

import pytest
import torch

from lightning_rtho import OuterUpdate, Schedule


def make_schedule() -> Schedule:
    """Values that no short decimal holds, in two precisions and three shapes."""
    generator = torch.Generator().manual_seed(0)

    def values() -> dict[str, torch.Tensor]:
        return {
            "lr/pg1": torch.rand((), dtype=torch.float64, generator=generator) / 3e7,
            "w": torch.rand(2, 3, dtype=torch.float32, generator=generator),
            "a[0].rates.0": torch.rand(1, dtype=torch.float64, generator=generator) * 1e300,
        }

    start = values()
    updates = [OuterUpdate(step, values(), values(), 0.1 * step, step / 7) for step in (3, 6, 9)]
    unknown = {name: torch.full_like(value, torch.nan) for name, value in start.items()}
    updates.append(
        OuterUpdate(11, values(), unknown, math.nan, safeguard="restored", restored_step=6)
    )
    domains = {"lr/pg1": "Positive()", "w": "Interval(low=0, high=1)", "a[0].rates.0": "Real()"}
    return Schedule(updates, start=start, domains=domains)


def assert_same(found: Schedule, expected: Schedule, *, dtype: torch.dtype | None = None) -> None:
    assert found.steps == expected.steps
    pairs = [(found.start, expected.start)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.outer_objective == pytest.approx(theirs.outer_objective, rel=0, nan_ok=True)
        assert ours.safeguard == theirs.safeguard
        assert ours.restored_step == theirs.restored_step
        assert ours.sensitivity == pytest.approx(theirs.sensitivity, rel=0, nan_ok=True)
        pairs += [(ours.values, theirs.values), (ours.hypergradients, theirs.hypergradients)]
    for ours, theirs in pairs:
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == (dtype or value.dtype)
            expected_value = value.to(dtype or value.dtype)
            torch.testing.assert_close(ours[name], expected_value, rtol=0, atol=0, equal_nan=True)


def test_json_gives_back_every_bit_dtype_and_domain(tmp_path):
    schedule = make_schedule()
    schedule.to_json(tmp_path / "s.json")
    loaded = Schedule.load(tmp_path / "s.json")
    assert_same(loaded, schedule)
    assert loaded.domains == schedule.domains


def test_csv_gives_back_every_bit_in_float64(tmp_path):
    schedule = make_schedule()
    schedule.to_csv(tmp_path / "s.csv")
    assert_same(Schedule.load(str(tmp_path / "s.csv")), schedule, dtype=torch.float64)


def test_csv_is_a_table_that_others_can_read(tmp_path):
    schedule = make_schedule()
    schedule.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 3, 6, 9, 11]
    assert rows[0]["outer_objective"] == ""
    assert [row["safeguard"] for row in rows] == ["", "", "", "", "restored"]
    assert float(rows[2]["hyperparameter/w[1,2]"]) == schedule[1].values["w"][1, 2].item()
    assert float(rows[2]["hypergradient/lr/pg1"]) == schedule[1].hypergradients["lr/pg1"].item()


def test_state_dict_gives_back_everything():
    schedule = make_schedule()
    assert_same(Schedule.from_state_dict(schedule.state_dict()), schedule)


def test_a_schedule_is_a_sequence_of_updates():
    schedule = make_schedule()
    updates = list(schedule)
    assert len(schedule) == 4
    assert schedule
    assert not Schedule()
    assert schedule[-1] is updates[3]
    assert schedule[1:3] == updates[1:3]
    schedule.append(updates[0])
    assert schedule[4] is updates[0]


def test_values_hold_from_their_update_on():
    schedule = make_schedule()
    for step, expected in {
        0: schedule.start,
        2: schedule.start,
        3: schedule[0].values,
        5.5: schedule[0].values,
        11: schedule[3].values,
        1000: schedule[3].values,
    }.items():
        assert torch.equal(schedule.values_at(step)["w"], expected["w"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.pkl", "", "must end in"),
        ("s.json", "{}", "cannot be read"),
        ("s.json", "not json", "cannot be read"),
        ("s.json", json.dumps({"format": 99}), "`format` is not 1"),
        ("s.csv", "epoch,loss\n1,2\n", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_schedule_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        Schedule.load(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        Schedule.load(tmp_path / "none.json")


def test_plot_draws_every_panel(tmp_path):
    schedule = make_schedule()
    figure = schedule.plot()
    axes = {ax.get_title(): ax for ax in figure.axes}
    assert axes["lr/pg1"].get_yscale() == "log"
    assert axes["w"].get_yscale() == "linear"
    assert len(axes["w"].lines) == 6
    (line,) = axes["lr/pg1"].lines
    assert list(line.get_xdata()) == [0, 3, 6, 9, 11]
    assert line.get_ydata()[2] == schedule[1].values["lr/pg1"].item()
    line = axes["dE/d(lr/pg1)"].lines[0]
    assert line.get_ydata()[2] == schedule[2].hypergradients["lr/pg1"].item()
    *known, unknown = axes["Outer objective E"].lines[0].get_ydata()
    assert known == [update.outer_objective for update in schedule[:-1]]
    assert math.isnan(unknown)
    figure.savefig(tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


def test_a_schedule_without_updates_is_not_drawn():
    with pytest.raises(ValueError, match="without updates"):
        Schedule().plot()


def test_pandas_gets_the_table():
    pandas = pytest.importorskip("pandas")
    frame = make_schedule().to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.index) == [0, 3, 6, 9, 11]
    assert frame["hyperparameter/lr/pg1"][3] == make_schedule()[0].values["lr/pg1"].item()


@pytest.mark.parametrize(("library", "method"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_what_is_optional_says_how_to_get_it(library, method, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    blocked: ModuleType | None = None
    monkeypatch.setitem(sys.modules, library, blocked)
    with pytest.raises(ImportError, match="pip install"):
        getattr(make_schedule(), method)()
