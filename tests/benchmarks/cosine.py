"""How near hypergradients below the floor's cost come to exact ones, along a training run."""

import statistics
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_rtho import RTHO, TRHO
from lightning_rtho.callbacks import HypergradientCallback
from tests.benchmarks.methods import train_quietly
from tests.benchmarks.workloads import make_task

__all__ = ["compare_directions", "cosine_table"]

_STEPS = 100
_TASKS = {"phone": {"smaller": 4}, "cnn": {"smaller": 2}}
_FRACTIONS = (0.5, 0.25, 0.125)


def compare_directions(options: dict[str, Any], device: torch.device) -> list[dict[str, Any]]:
    """Observe the same training exactly and by cheaper means; compare at every update.

    What is compared is lambda dE/dlambda, the derivative in log space, where the callbacks move
    these hyperparameters.

    Args:
        options: Sizes in the place of the usual ones.
        device: Where to train.

    Returns:
        A record for each workload and way.
    """
    records = []
    for workload, sizes in _TASKS.items():
        for method in (RTHO, TRHO):
            exact = _directions(workload, sizes | options, device, method)
            ways: dict[str, dict[str, Any]] = {
                f"curvature_fraction={fraction}": {"curvature_fraction": fraction}
                for fraction in _FRACTIONS
            }
            if method is RTHO:
                ways["tangent_dtype=bfloat16"] = {"tangent_dtype": torch.bfloat16}
            for way, settings in ways.items():
                found = _directions(workload, sizes | options, device, method, **settings)
                cosines = torch.cosine_similarity(found, exact, dim=1).tolist()
                errors = ((found - exact).norm(dim=1) / exact.norm(dim=1)).tolist()
                records.append({
                    "workload": workload,
                    "method": method.__name__,
                    "way": way,
                    "updates": len(found),
                    "cosine": statistics.median(cosines),
                    "least_cosine": min(cosines),
                    "last_cosine": cosines[-1],
                    "error": statistics.median(errors),
                })
    return records


def _directions(
    workload: str,
    sizes: dict[str, Any],
    device: torch.device,
    method: Callable[..., HypergradientCallback],
    **settings: Any,
) -> Tensor:
    """Return lambda dE/dlambda at every update of a run that is observed ``[updates, m]``."""
    L.seed_everything(0, verbose=False)
    task = make_task(workload, **sizes)
    callback = method(
        hyper_batch_size=task.hyper_batch_size, outer_optimizer=None, summary=False, **settings
    )
    train_quietly(task, device, _STEPS, [callback])
    return torch.stack([
        torch.cat([
            (update.hypergradients[name] * value).flatten().double()
            for name, value in update.values.items()
        ])
        for update in callback.schedule
    ])


def cosine_table(records: list[dict[str, Any]]) -> str:
    """Lay out records of :func:`compare_directions` as a table.

    Args:
        records: The records.

    Returns:
        The table, in Markdown.
    """
    lines = [
        "Over the updates of a training that is observed: the phone network at a quarter of its "
        "width, the cnn at half of it.",
        "",
        "| workload | | updates | median cosine | least | last | median relative error |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['workload']} | `{r['method']}({r['way']})` | {r['updates']} | {r['cosine']:.3f} | "
        f"{r['least_cosine']:.3f} | {r['last_cosine']:.3f} | {r['error']:.3f} |"
        for r in records
    ]
    return "\n".join(lines)
