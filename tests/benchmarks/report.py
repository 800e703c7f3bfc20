"""Tables and the figure of what was measured.

python -m tests.benchmarks.report
"""

import argparse
import json
from pathlib import Path
from typing import Any

from tests.benchmarks.cosine import cosine_table
from tests.benchmarks.growth import SWEEPS
from tests.benchmarks.kernels import kernels_line
from tests.benchmarks.methods import TITLES
from tests.benchmarks.workloads import WORKLOADS

__all__ = ["OUTPUT", "table"]

_HERE = Path(__file__).parent
OUTPUT = _HERE / "output"

_NOTES = """\
Made by `python -m tests.benchmarks` and `python -m tests.benchmarks.report`.

- **Time**: seconds a step over those of the same `Trainer.fit` without a callback, run just before and just after in the same process; the first window of each is left out. Median over repeats, smallest and largest in brackets. glibc's heap is told to keep what is freed (`MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_`); as it comes it gives memory back and takes it anew several times a step, the more the younger the process. Evaluations of the outer objective, on a validation batch as large as a training batch, are part of every method.
- **Floor**: counted passes, with 3 F for a plain gradient: RTHO 3 F + 6 m F, TRHO 9 F with kept graphs and 12 F recomputing, less the last product of a window, of which only the hyperparameters' part is needed. The outer objective's gradient, 1 / window more, is not in it. On a fraction f of the examples a product takes 6 f F, and the gradient below it 3 f F more.
- **Alone**: the gradients and products of a mode, and nothing else, in plain torch: no update, no tangents or states, no Lightning. It is the floor as it can be measured. The counted one leaves out what a loss has beside its network (in phone, penalties on all weights, whose second derivatives take several passes over memory) and that small batches use a processor less well.
- **Memory**: peak of a training in a process of its own, over that of plain training: of the whole `process`, libraries included, and of what the training has `in use`, above the libraries and with freed blocks given back at once (glibc keeps holes in its heap else, plain training's as well). `states` is the peak in use above plain training's, in units of one training state (weights and optimizer buffers): at the least m of `RTHO` and one a step of the window of `TRHO`, beside the graph of a step. The safeguard is off: it keeps one more state, which neither loops by hand nor peers have.
- Loops by hand and peers train without Lightning and leave the hyperparameters where they are; a test holds their hypergradients against ours.
- Peers are given what they can do. None can tune a decoupled decay (transformer): higher has no AdamW, TorchOpt takes the decay as a number, Betty's AdamW divides by the second moment where its root belongs. Betty's Adam gives NaN as soon as a weight has had no gradient (many). That of higher leaves eps out of the correction of the bias, so its hypergradient is another where gradients are tiny (cnn, many).
- Betty 0.2.1 runs with four repairs: its `IterativeProblem` patches the optimizer twice, takes an update at zero gradient for Adam's first step, reads an attribute that is not there, and is installed by `pip install --ignore-requires-python betty-ml` on Python 3.11 and later.
"""  # noqa: E501


def table(results: dict[str, Any]) -> str:
    """Lay out the results of one workload as a table.

    Args:
        results: What was measured of it.

    Returns:
        The table, in Markdown.
    """
    rows = [["method", "floor", "time", "process", "in use", "states"]]
    milliseconds = results["workload"] == "small"
    if milliseconds:
        rows[0].append("ms above plain")
    plain = results["memory"].get("plain")
    for method, timing in results["timings"].items():
        ratios = timing["ratios"]
        row = [
            TITLES[method],
            f"{results['floors'][method]:.1f}",
            f"**{timing['ratio']:.2f}** ({min(ratios):.2f}-{max(ratios):.2f})",
        ]
        memory = results["memory"].get(method)
        if memory and plain:
            above = memory["in_use"] - plain["in_use"]
            row += [
                f"{memory['process'] / plain['process']:.2f}",
                f"{memory['in_use'] / plain['in_use']:.2f}",
                f"{above / results['state_bytes']:.1f}",
            ]
        else:
            row += ["-"] * 3
        if milliseconds:
            row.append(f"{timing['milliseconds_above_plain']:.2f}")
        rows.append(row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    repeats = max((len(timing["ratios"]) for timing in results["timings"].values()), default=0)
    heading = (
        f"**{results['workload']}**: {results['summary']}; m = {results['entries']}, "
        f"window {results['hyper_batch_size']}; repeats: {repeats}"
    )
    return "\n".join([heading, "", *lines])


def machine(results: dict[str, Any]) -> str:
    """Say in a line where and with what something was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{results['machine']}; {versions}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """Draw time and memory over what was varied."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogFormatter

    labels = {"ratio": "time a step / plain", "memory_ratio": "memory in use / plain"}
    measured = [key for key in labels if any(record[key] for record in records)]
    figure, axes = plt.subplots(
        len(measured), 3, figsize=(12, 3 * len(measured)), sharey="row", layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column, (sweep, (label, values)) in zip(axes.T, SWEEPS.items(), strict=True):
        for row, key in zip(column, measured, strict=True):
            for method in dict.fromkeys(record["method"] for record in records):
                points = sorted(
                    (record["value"], record[key])
                    for record in records
                    if record["sweep"] == sweep and record["method"] == method
                )
                row.plot(*zip(*points, strict=True), marker="o", label=TITLES[method].strip("`"))
            row.set_xscale("log")
            row.set_yscale("log")
            row.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            row.yaxis.set_major_formatter(LogFormatter())
            row.grid(alpha=0.25, which="both")
            if sweep != "width":  # measured in weights there
                row.set_xticks(values, [str(value) for value in values])
                row.minorticks_off()
        column[-1].set_xlabel(label)
    for row, key in zip(axes[:, 0], measured, strict=True):
        row.set_ylabel(labels[key])
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Turn measurements into RESULTS.md and a figure.")
    parser.add_argument("--input", type=Path, default=OUTPUT, help="folder of the measurements")
    parser.add_argument("--output", type=Path, default=_HERE, help="folder of the report")
    args = parser.parse_args()
    found = [args.input / f"{name}.json" for name in WORKLOADS]
    measured = [json.loads(path.read_text()) for path in found if path.exists()]
    if not measured:
        raise SystemExit(f"Nothing in {args.input}: run `python -m tests.benchmarks` first.")
    parts = ["# Benchmarks", _NOTES]
    for place in dict.fromkeys(machine(results) for results in measured):
        parts += [f"## {place}", *(table(r) for r in measured if machine(r) == place)]
    kernels = args.input / "kernels.json"
    if kernels.exists():
        line = kernels_line(json.loads(kernels.read_text()))
        parts += ["## Compiled derivatives of the update", line]
    cosine = args.input / "cosine.json"
    if cosine.exists():
        parts += [
            "## Below the floor: cosine to the exact hypergradient",
            cosine_table(json.loads(cosine.read_text())["records"]),
        ]
    growth = args.input / "growth.json"
    if growth.exists():
        results = json.loads(growth.read_text())
        draw(results["records"], args.output / "growth.png")
        parts += [
            "## Growth",
            f"The phone network at width {results['options'].get('width', 500)}, m weights for its "
            f"examples, window 5, where not varied; repeats: {results['repeats']} "
            f"({machine(results)}).",
            "![Cost over hyperparameters, window and weights](growth.png)",
        ]
    (args.output / "RESULTS.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    print(f"Wrote {args.output / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
