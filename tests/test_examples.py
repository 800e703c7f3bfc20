"""Every script of `examples/`, shortened: it runs, leaves its files and prints its number."""

import importlib
import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_rtho import OuterUpdate

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
OPTIONS = {
    "digits": ["--steps", "60"],
    "toy_trajectories": [],
    "starts": ["--quick", "--steps", "20"],
    "hypercleaning": ["--data", "mnist.npz", "--seeds", "0", "--steps", "50"],
    "mnist_cnn": ["--data", "mnist.npz", "--seeds", "0", "1", "--quick"],
    "phone": ["--data", "spoken_digits.npz", "--seeds", "0", "--quick"],
}

FIRST_STEPS = {
    "quickstart": ({}, 2, 9),  # 3.9 %; 53.6 % without the callback
    "layer_rates": ({"steps": 400}, 2, 15),  # 3.7 %
    "task_weights": ({"steps": 300}, 0.4, 0.9),  # 0.55; 1 if tuning gained nothing
    "example_weights": ({"steps": 500}, 0.8, 1),  # 0.95; 0.33 by chance
    "cli": ({}, 2, 20),  # 6.9 %
    "replay": ({"steps": 60}, 0, 0),
    "own_rule": ({}, 0, 1e-6),  # the differences' own error is below 1e-9
    "manual": ({"steps": 300}, 0.4, 0.85),  # 0.52; 1 if tuning gained nothing
}
"""Settings of a short run, and between which numbers the one lies that it ends with."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with archives in the form of the real ones: every class is a pattern in noise."""
    folder, draw = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    labels = draw.integers(0, 10, 70_000)
    images = draw.integers(0, 128, (10, 28, 28), dtype=np.uint8)[labels]
    images[::2] += 100
    np.savez(folder / "mnist", x_train=images[:60_000], y_train=labels[:60_000],
             x_test=images[60_000:], y_test=labels[60_000:])  # fmt: skip
    states = draw.integers(0, 58, 1500)
    frames = np.eye(58, 123)[states] + 0.3 * draw.normal(size=(1500, 123))
    frames = frames.astype(np.float32)
    np.savez(folder / "spoken_digits", x=frames.astype(np.float16), mean=frames.mean(axis=0),
             std=frames.std(axis=0), y_state=states, left_phone=states // 3,
             right_phone=states // 3, frame_utt=np.arange(1500) // 50,
             utt_offset=np.arange(0, 1501, 50), utt_split=np.arange(30) // 10)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    """Run a script once; give its output folder and what it printed."""
    finished = {}

    def run_once(script, again=False):
        if script not in finished or again:
            output = finished[script][0] if again else tmp_path_factory.mktemp(script)
            done = subprocess.run(
                [
                    sys.executable,
                    str(EXAMPLES / f"{script}.py"),
                    *(str(data / o) if o.endswith(".npz") else o for o in OPTIONS[script]),
                    "--output",
                    str(output),
                ],
                cwd=output,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=120,
            )
            finished[script] = output, done
        return finished[script]

    return run_once


def last_number(printed):
    return float(printed.splitlines()[-1].rsplit(":", 1)[1])


def scalars(folder):
    (events,) = folder.glob("version_0/events.out.tfevents.*")
    accumulator = EventAccumulator(str(events)).Reload()
    return {
        tag: [event.value for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_every_example_is_run_here():
    scripts = {p.stem for p in EXAMPLES.glob("*.py") if "def main" in p.read_text()}
    assert scripts == {*OPTIONS, *FIRST_STEPS}


@pytest.mark.parametrize("script", OPTIONS)
def test_example_finishes_without_a_warning(run, script):
    _, done = run(script)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


@pytest.mark.parametrize("script", OPTIONS)
def test_example_draws_its_figure(run, script):
    output, _ = run(script)
    assert (output / f"{script}.png").read_bytes().startswith(b"\x89PNG")


def test_toy_beats_the_untuned_run(run):
    assert 0 < last_number(run("toy_trajectories")[1].stdout) < 0.85  # 0.79 as it stands


def test_digits_prints_a_row_for_each_run(run):
    _, done = run("digits")
    header = next(i for i, line in enumerate(done.stdout.splitlines()) if "test error" in line)
    rows = [line.split() for line in done.stdout.splitlines()[header + 1 : header + 7]]
    assert [row[4] for row in rows] == ["baseline", "RTHO", "TRHO"] * 2


def test_digits_ends_with_a_ratio_of_errors(run):
    assert 0 < last_number(run("digits")[1].stdout) < 1.05  # 60 steps are too few to win by much


@pytest.mark.parametrize(("method", "window"), [("RTHO", 10), ("TRHO", 20)])
def test_digits_logs_a_learning_rate_that_grows_from_too_small_a_start(run, method, window):
    output, _ = run("digits")
    logged = scalars(output / "digits" / f"lr1e-05-{method}")
    for name in ("lr", "l2"):
        assert len(logged[f"hyperparameter/{name}"]) == 60 // window
        assert len(logged[f"hypergradient/{name}"]) == 60 // window
    assert len(logged["outer_objective"]) == 60 // window
    assert len(logged["error/test"]) == 3
    assert logged["hyperparameter/lr"][-1] > 1.3e-5


def test_starts_prints_a_row_for_each_kind_of_run_and_goes_on_where_it_was_stopped(run):
    output, done = run("starts")
    assert "80 of 80 runs to do" in done.stdout
    file = output / "starts-20.json"
    results = json.loads(file.read_text())
    file.write_text(json.dumps(results[:-3]))
    _, again = run("starts", again=True)
    assert "3 of 80 runs to do" in again.stdout
    for printed in (done.stdout, again.stdout):
        rows = [line.split() for line in printed.splitlines() if line.startswith("digits")]
        assert len(rows) == 10
        assert rows[0][:4] == ["digits", "SGD", "fixed", "nothing"]
        assert all(row[-1] == "8" for row in rows)


@pytest.mark.parametrize(
    ("momentum", "slope", "held"),
    [(0, 1.0, []), (0, -1.0, ["momentum"]), (1, 1.0, ["momentum"]), (1, -1.0, [])],
)
def test_starts_tells_values_that_are_held_at_a_bound_from_those_that_belong_there(
    monkeypatch, momentum, slope, held
):
    monkeypatch.syspath_prepend(EXAMPLES)
    starts = importlib.import_module("starts")
    values = [0.5, momentum, momentum]
    updates = [
        OuterUpdate(i, {"momentum": torch.tensor(v)}, {"momentum": torch.tensor(slope)}, 0.0)
        for i, v in enumerate(values)
    ]
    assert starts.stuck_at_a_bound(updates) == ["momentum"]
    assert starts.held_at_a_bound(updates, ["momentum"]) == held


def table_of(folder, script):
    """Rows of a script's table, by their first cell."""
    lines = (folder / f"{script}.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_hypercleaning_tells_wrong_labels_from_right_ones(run):
    output, _ = run("hypercleaning")
    rows = table_of(output, "hypercleaning")
    assert len(rows) == 7
    assert float(rows["all, weighted by `TRHO`"][2]) > 0.7  # 2 / 3 for all images, 50 steps


@pytest.mark.parametrize(("script", "searches"), [("mnist_cnn", 1), ("phone", 2)])
def test_comparison_has_a_row_for_each_method_and_goes_on_where_it_was_stopped(
    run, script, searches
):
    output, done = run(script)
    rows = table_of(output, script)
    assert f"{searches * len(OPTIONS[script][3:-1])} of" in done.stdout
    assert all(math.isfinite(float(row[0].split()[0])) for row in rows.values())
    file = output / f"{script}.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    before = (output / f"{script}.md").read_text()
    _, again = run(script, again=True)
    assert "0 of" in again.stdout
    assert "1 of" in again.stdout
    assert len(table_of(output, script)) == len(rows)
    assert before.splitlines()[0] == (output / f"{script}.md").read_text().splitlines()[0]


# First steps: in this process, which has imported already what they import


@pytest.fixture
def first_steps(tmp_path, monkeypatch):
    """A folder that scripts write into, and training as outside of tests."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # `seed_everything` sets it: it is taken back
    torch.set_default_dtype(torch.float32)
    return tmp_path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # old Matplotlib's with new pyparsing
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("script", FIRST_STEPS)
def test_first_step_ends_with_its_number(script, first_steps, monkeypatch, capsys):
    settings, least, most = FIRST_STEPS[script]
    config = str(EXAMPLES / "cli.yaml")
    arguments = ["cli.py", "fit", "--config", config, "--trainer.max_steps", "400"]
    monkeypatch.setattr(sys, "argv", arguments)
    importlib.import_module(script).main(**settings)
    printed = capsys.readouterr().out
    assert least <= last_number(printed) <= most
    label = printed.splitlines()[-1].rsplit(":", 1)[0]
    assert f"{label}: " in (EXAMPLES / "README.md").read_text()
    for picture in first_steps.glob("*.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert (EXAMPLES / "images" / picture.name).exists()


def test_diff_of_the_readme_makes_the_quickstart_of_a_plain_script(first_steps, capsys):
    plain = (EXAMPLES / "quickstart.py").read_text()
    (diff,) = re.findall(r"```diff\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    for hunk in re.split(r"^@@.*\n", diff, flags=re.MULTILINE)[1:]:
        lines = hunk.splitlines(keepends=True)
        before, after = ("".join(li[1:] for li in lines if li[0] in kind) for kind in (" -", " +"))
        assert plain.count(after) == 1
        plain = plain.replace(after, before)
    assert "rtho" not in plain.lower()
    script = first_steps / "plain.py"
    script.write_text(plain)
    runpy.run_path(str(script), run_name="__main__")
    assert last_number(capsys.readouterr().out) > 40  # percent: the rate is 100 times too small


def test_readme_of_the_examples_names_every_script_and_shows_every_picture():
    readme = (EXAMPLES / "README.md").read_text()
    assert set(re.findall(r"\]\((\w+)\.py\)", readme)) == {*OPTIONS, *FIRST_STEPS}
    pictures = {path.name for path in (EXAMPLES / "images").iterdir()}
    assert set(re.findall(r"\]\(images/([\w.]+)\)", readme)) == pictures
    assert all(path.stat().st_size < 100_000 for path in (EXAMPLES / "images").iterdir())
