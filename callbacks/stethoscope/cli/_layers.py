"""A table of layers for the terminal: what each one's numbers were when it was last observed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record


@dataclass(eq=False)
class Layers:
    """A sink that keeps the last numbers of each module in training, and makes a table of them.

    Memory: a few numbers per module and parameter, however long the run is.
    """

    _types: dict[str, str] = field(default_factory=dict[str, str], init=False)
    _last: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]], init=False)
    _suspects: set[str] = field(default_factory=set[str], init=False)

    def open(self, run: Run) -> None:
        """Take the modules' types from the run."""
        self._types = dict(run.modules)

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Keep what is newer."""
        for record in records:
            if record.phase == "train" and record.source == "probe" and isinstance(record.value, float):
                self._last.setdefault(record.name, {})[record.module] = record.value
        self._suspects |= {finding.module for finding in findings}

    def close(self) -> None:
        """Do nothing: the table can be made afterwards as well."""

    def table(self, most: int = 20) -> Table:
        """Return one row per module that was called and called no other, in call order.

        Args:
            most: rows. Where there are more layers, those with findings are shown and an even choice of the others.
        """
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        rms = self._last.get("activation/rms", {})
        leaves = [
            name for name in rms if not any(other.startswith(f"{name}." if name else "") for other in rms if other)
        ]
        shown = _choose(leaves, self._suspects, most)
        title = "Layers" if len(shown) == len(leaves) else f"Layers ({len(shown)} of {len(leaves)})"
        table = Table(
            title=f"{title} when last observed",
            title_justify="left",
            title_style="bold",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("layer", overflow="fold")
        table.add_column("type", no_wrap=True)
        for heading in ("rms", "zeros", "gradient", "update"):
            table.add_column(heading, justify="right", no_wrap=True)
        zeros = self._last.get("activation/zero_fraction", {})
        for name in shown:
            numbers = [
                _number(rms.get(name)),
                "" if name not in zeros else f"{zeros[name]:.0%}",
                _number(_norm(self._own("gradient/norm", name))),
                _number(max(self._own("parameter/update_ratio", name), default=None)),
            ]
            style = "bold red" if name in self._suspects else ""
            # names come from the user's model: no markup in them
            table.add_row(Text(name or "(model)"), Text(self._types.get(name, "")), *numbers, style=style)
        return table

    def _own(self, statistic: str, module: str) -> list[float]:
        """The values of the parameters of the module and of what it holds without calling it."""
        values = self._last.get(statistic, {})
        return [value for name, value in values.items() if name and name.startswith(f"{module}." if module else "")]


def _choose(names: Sequence[str], wanted: set[str], most: int) -> list[str]:
    if len(names) <= most:
        return list(names)
    kept = {name for name in names if name in wanted}
    others = [name for name in names if name not in kept]
    room = max(0, most - len(kept))
    kept |= {others[round(i * (len(others) - 1) / max(1, room - 1))] for i in range(room)}
    return [name for name in names if name in kept][:most]


def _norm(values: Sequence[float]) -> float | None:
    """The 2-norm of a module's gradient out of those of its parameters."""
    return math.sqrt(sum(value * value for value in values)) if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
