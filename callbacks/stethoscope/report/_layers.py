"""Statistics of layers as the page's script needs them: few enough cells, each with a scale for its colours."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from stethoscope.report._grid import LARGEST, Table, even, leaves
from stethoscope.report._words import ORDER, titled, words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from stethoscope.report._summary import Summary

CELLS = 800_000
"""Of all statistics together: 4.3 MB of the page."""
MAX_STATISTICS, MAX_ROWS, MAX_COLUMNS = 20, 320, 384
DISTRIBUTION_CELLS = 400_000
"""Of all histograms together: 1.1 MB of the page."""

_NAMES = {name: place for place, name in enumerate(ORDER)}


def layers(summary: Summary) -> list[dict[str, Any]]:
    """Make the tables that the heat map chooses from, the most telling first."""
    suspects = {finding.module for finding in summary.findings}
    types = dict(summary.run.modules)
    keys = sorted(summary.grids, key=lambda key: (key[1] != "train", _NAMES.get(key[0], len(_NAMES))))[:MAX_STATISTICS]
    tables = {key: _shown(summary.grids[key].table(), types, suspects) for key in keys}
    tables = {key: table for key, table in tables.items() if table.rows and len(table.steps)}
    rows = sum(len(table.rows) for table in tables.values())
    columns = max(16, min(MAX_COLUMNS, CELLS // max(1, rows)))
    return [_statistic(key, narrowed(table, columns), types) for key, table in tables.items()]


def distributions(summary: Summary, names: Sequence[str]) -> list[dict[str, Any]]:
    """Make the histograms that the page chooses from, of these layers or an even choice of them."""
    made: list[dict[str, Any]] = []
    for (name, phase), distribution in sorted(summary.distributions.items(), key=lambda item: item[0][1] != "train"):
        chosen = even(names, DISTRIBUTION_CELLS // (24 * 80 * min(2, len(summary.distributions))))
        shares = distribution.shares(chosen)
        if shares is not None and shares.layers and len(made) < 2:
            coded = np.where(np.isnan(shares.shares), 65535, np.round(shares.shares * 65534))
            made.append(
                {
                    "title": titled(name, phase),
                    "layers": shares.layers,
                    "steps": shares.steps,
                    "edges": shares.edges,
                    "shares": _text(coded.astype("<u2")),
                }
            )
    return made


def narrowed(table: Table, columns: int) -> Table:
    """Join neighbouring columns until there are at most so many; smallest and largest values stay.

    Example:
        >>> grid = np.array([[1.0, 5.0, 2.0]], dtype=np.float32)
        >>> narrowed(Table(("a",), np.array([[0, 0], [1, 1], [2, 2]]), grid, grid), 2).high.tolist()
        [[5.0, 2.0]]
    """
    together = -(-len(table.steps) // columns)
    if together <= 1:
        return table
    starts = np.arange(0, len(table.steps), together)
    ends = np.minimum(starts + together, len(table.steps)) - 1
    steps = np.stack([table.steps[starts, 0], table.steps[ends, 1]], axis=1)
    low = np.fmin.reduceat(table.low, starts, axis=1)
    return Table(table.rows, steps, low, np.fmax.reduceat(table.high, starts, axis=1))


def _shown(table: Table, types: Mapping[str, str], suspects: set[str]) -> Table:
    inner = set(leaves(table.rows, types)) | suspects
    places = [index for index, name in enumerate(table.rows) if name in inner]
    if len(places) > MAX_ROWS:
        wanted = [place for place in places if table.rows[place] in suspects][:MAX_ROWS]
        others = [place for place in places if table.rows[place] not in suspects]
        places = sorted({*wanted, *(int(text) for text in even([str(p) for p in others], MAX_ROWS - len(wanted)))})
    return Table(tuple(table.rows[place] for place in places), table.steps, table.low[places], table.high[places])


def _statistic(key: tuple[str, str], table: Table, types: Mapping[str, str]) -> dict[str, Any]:
    name, phase = key
    values = table.extreme()
    scale, knee = _scale(name, values)
    low, high = _range(values, scale)
    return {
        "title": titled(name, phase),
        "phase": phase,
        "meaning": words(name).meaning,
        "unit": words(name).unit,
        "scale": scale,
        "knee": knee,
        "low": low,
        "high": high,
        "rows": table.rows,
        "types": [types.get(row, "") for row in table.rows],
        "steps": table.steps.tolist(),
        "values": _text(values.astype("<f4")),
    }


def _scale(name: str, values: NDArray[np.float32]) -> tuple[str, float]:
    """Choose log, linear, or asinh for what has both signs: asinh(x / knee) is linear below the knee, log above."""
    known = values[np.isfinite(values) & (values <= LARGEST)]
    if words(name).unit in {"share", "flag", "dB"} or not known.size:
        return "linear", 1.0
    if (known < 0).any():
        size = np.abs(known[known != 0])
        return "asinh", float(np.median(size)) or 1.0
    return "log", 1.0


def _range(values: NDArray[np.float32], scale: str) -> tuple[float, float]:
    """The 1st and 99th percentile: one exploding layer must not make all the others look the same."""
    known = values[np.isfinite(values) & (values <= LARGEST)].astype(np.float64)
    known = known[known > 0] if scale == "log" else known
    if not known.size:
        return 0.0, 1.0
    low, high = (float(place) for place in np.percentile(known, [1, 99]))
    if low == high:
        low, high = (
            (low / 2, high * 2) if scale == "log" else (low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2)
        )
    return low, high


def _text(values: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()
