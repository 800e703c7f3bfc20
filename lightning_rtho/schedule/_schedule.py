"""The path that hyperparameters took through a run."""

import dataclasses
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Self, final, overload

from torch import Tensor
from typing_extensions import override

from lightning_rtho.schedule._csv import read_csv, table, write_csv
from lightning_rtho.schedule._json import read_json, write_json
from lightning_rtho.schedule._plot import plot
from lightning_rtho.schedule._update import OuterUpdate

__all__ = ["Schedule"]


@final
class Schedule(Sequence[OuterUpdate]):
    """Every outer update of a run, in order, and the values that the run began with.

    A sequence of `OuterUpdate` that can be kept in a file and drawn. Files hold text alone, every
    number exactly.

    Args:
        updates: Outer updates, in the order of their steps.
        start: Natural values before the first update, by name, each ``[*H]``.
        domains: Domain of each hyperparameter as text, such as ``"Positive()"``, by name.

    Example:
        >>> import torch
        >>> update = OuterUpdate(20, {"lr": torch.tensor(0.2)}, {"lr": torch.tensor(-2.0)}, 0.7)
        >>> schedule = Schedule([update], start={"lr": torch.tensor(0.1)})
        >>> len(schedule), schedule.steps, schedule.names
        (1, [20], ['lr'])
        >>> schedule.values_at(19)["lr"], schedule.values_at(20)["lr"]
        (tensor(0.1000), tensor(0.2000))
    """

    def __init__(
        self,
        updates: Iterable[OuterUpdate] = (),
        *,
        start: Mapping[str, Tensor] | None = None,
        domains: Mapping[str, str] | None = None,
    ) -> None:
        self._updates = list(updates)
        self.start = dict(start or {})
        self.domains = dict(domains or {})

    @override
    def __len__(self) -> int:
        return len(self._updates)

    @overload
    def __getitem__(self, index: int) -> OuterUpdate: ...

    @overload
    def __getitem__(self, index: slice) -> list[OuterUpdate]: ...

    @override
    def __getitem__(self, index: int | slice) -> OuterUpdate | list[OuterUpdate]:
        return self._updates[index]

    def __repr__(self) -> str:
        """Show the hyperparameters and how many updates there are."""
        return f"Schedule({', '.join(self.names)}: {len(self)} updates)"

    def append(self, update: OuterUpdate) -> None:
        """Add an update to the end.

        Args:
            update: The update.
        """
        self._updates.append(update)

    @property
    def names(self) -> list[str]:
        """Names of the hyperparameters."""
        return list(self.start or (self[0].values if self else {}))

    @property
    def steps(self) -> list[int]:
        """Optimizer steps made before each update."""
        return [update.step for update in self]

    def values_at(self, step: float) -> dict[str, Tensor]:
        """Return the natural values that hold once so many optimizer steps are made.

        Args:
            step: Optimizer steps made.

        Returns:
            Values by name, each ``[*H]``: those of the last update until then, else the first
            ones; empty where those are not known.
        """
        made = bisect_right(self.steps, step)
        return dict(self[made - 1].values if made else self.start)

    # Files

    def to_json(self, path: str | PathLike[str]) -> None:
        """Write everything to a JSON file.

        Args:
            path: The file.
        """
        write_json(path, self.state_dict())

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write a table to a CSV file: a row for the start, then one for each update.

        Its columns are ``step``, ``outer_objective``, ``sensitivity``, ``safeguard``,
        ``restored_step``, and ``hyperparameter/<name>`` and ``hypergradient/<name>`` for each
        entry, which for a hyperparameter with a shape are ``<name>[0]``, ``<name>[1]``, ...; what
        is not known is left empty.

        Args:
            path: The file.
        """
        write_csv(path, self.state_dict())

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """Read a file that :meth:`to_json` or :meth:`to_csv` wrote.

        A CSV file says nothing of dtypes and domains: its values are float64.

        Args:
            path: The file, whose name ends in ``.json`` or ``.csv``.

        Returns:
            The schedule.

        Raises:
            ValueError: If the name ends otherwise, or the file holds no schedule.
        """
        readers = {".json": read_json, ".csv": read_csv}
        suffix = Path(path).suffix.lower()
        if suffix not in readers:
            raise ValueError(
                f"`path` must end in '.json' or '.csv', got {str(path)!r}. Write the schedule with "
                "`to_json` or `to_csv`."
            )
        try:
            return cls.from_state_dict(readers[suffix](path))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"`path` must be a schedule written by `to_json` or `to_csv`, got {str(path)!r}, "
                f"which cannot be read ({type(error).__name__}: {error}). Write it anew."
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return everything in tensors, numbers, text, lists and dicts."""
        return {
            "start": dict(self.start),
            "domains": dict(self.domains),
            "updates": [
                {f.name: getattr(update, f.name) for f in dataclasses.fields(OuterUpdate)}
                for update in self
            ],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """Make the schedule of what :meth:`state_dict` returned.

        Args:
            state: The state.

        Returns:
            The schedule.
        """
        updates = [OuterUpdate(**update) for update in state["updates"]]
        return cls(updates, start=state["start"], domains=state["domains"])

    # Tables and figures

    def to_pandas(self) -> Any:
        """Return the table that :meth:`to_csv` writes as a ``pandas.DataFrame`` indexed by step.

        Returns:
            The data frame.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise ImportError("`to_pandas` needs pandas: pip install pandas.") from None
        return pd.DataFrame(table(self.state_dict())).set_index("step")

    def plot(self) -> Any:
        """Draw each hyperparameter, its hypergradient and the outer objective over the steps.

        A hyperparameter in `Positive` gets a logarithmic axis; one with a shape a line for each of
        its first entries.

        Returns:
            The ``matplotlib.figure.Figure``; save it with ``figure.savefig(path)``.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        return plot(self.state_dict())
