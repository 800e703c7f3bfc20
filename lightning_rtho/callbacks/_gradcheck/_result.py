"""What a check of hypergradients has found."""

from dataclasses import dataclass

__all__ = ["HypergradcheckError", "HypergradcheckResult", "HypergradcheckRow"]


@dataclass(frozen=True)
class HypergradcheckRow:
    """One hyperparameter: its hypergradient by both methods and by finite differences.

    Those of a hyperparameter with a shape are derivatives along one direction, in which every
    entry changes by its own size, up or down by chance.

    Attributes:
        name: Name of the hyperparameter.
        value: Its natural value; of one with a shape the mean.
        forward: dE/dlambda by forward mode, as `RTHO` computes it.
        reverse: dE/dlambda by reverse mode, as `TRHO` does; NaN where a step that runs again
            has another gradient, None under manual optimization.
        differences: dE/dlambda by central differences of whole runs.
        step: Their step size, relative to the value.
        agrees: Whether the three agree.

    Example:
        >>> HypergradcheckRow("lr", 0.1, -2.0, -2.0, -2.0, 1e-4, True).agrees
        True
    """

    name: str
    value: float
    forward: float
    reverse: float | None
    differences: float
    step: float
    agrees: bool


@dataclass(frozen=True)
class HypergradcheckResult:
    """What `hypergradcheck` has found; printing it gives a table.

    Attributes:
        rows: One row a hyperparameter; empty if the module was refused.
        causes: Likely causes of what does not agree, the likeliest first.

    Example:
        >>> row = HypergradcheckRow("lr", 0.1, -2.0, -2.0, -2.5, 1e-4, False)
        >>> result = HypergradcheckResult((row,), ("a `detach` in `training_step`",))
        >>> result.passed
        False
        >>> print(result)
        hyperparameter      value       forward       reverse   differences   step
        lr                    0.1  -2.00000e+00  -2.00000e+00  -2.50000e+00  1e-04  DIFFERS
        Likely cause: a `detach` in `training_step`
    """

    rows: tuple[HypergradcheckRow, ...]
    causes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every hypergradient agrees with finite differences."""
        return bool(self.rows) and all(row.agrees for row in self.rows) and not self.causes

    def __str__(self) -> str:
        """Return the table, then the causes."""
        width = max([14, *(len(row.name) for row in self.rows)])
        lines = []
        if self.rows:
            columns = ("value", "forward", "reverse", "differences")
            heads = "".join(f"{c:>{n}}" for c, n in zip(columns, (11, 14, 14, 14), strict=True))
            lines.append(f"{'hyperparameter':{width}}{heads}   step")
        for row in self.rows:
            reverse = "" if row.reverse is None else f"{row.reverse:.5e}"
            lines.append(
                f"{row.name:{width}}{row.value:11.4g}{row.forward:14.5e}{reverse:>14}"
                f"{row.differences:14.5e}{row.step:7.0e}  {'ok' if row.agrees else 'DIFFERS'}"
            )
        return "\n".join([*lines, *(f"Likely cause: {cause}" for cause in self.causes)])


class HypergradcheckError(RuntimeError):
    """Hypergradients differ from finite differences.

    Args:
        result: What was found.

    Attributes:
        result: What was found.

    Example:
        >>> HypergradcheckError(HypergradcheckResult((), ("weights were clamped",))).result.passed
        False
    """

    def __init__(self, result: HypergradcheckResult) -> None:
        self.result = result
        super().__init__(f"Hypergradients are not those of the run.\n{result}")
