"""Layers by steps of one statistic, in bounded memory: neighbouring steps are joined in pairs when there are too many."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

NAN, INF, LARGEST = 3.4e38, 3.3e38, 3e38
"""How float32 holds a measured NaN, a measured Inf and any finite number beyond its range; NaN stands for "not measured"."""

_NON_FINITE = np.float32(3.2e38)


class Table(NamedTuple):
    """What a grid comes to.

    Args:
        rows: names of modules or parameters, in the order in which they were first seen.
        steps: first and last step of each column, shape `(columns, 2)`.
        low: smallest value per cell, float32, shape `(rows, columns)`; see `NAN` and `INF`.
        high: the same, largest.
    """

    rows: tuple[str, ...]
    steps: NDArray[np.int64]
    low: NDArray[np.float32]
    high: NDArray[np.float32]

    def extreme(self) -> NDArray[np.float32]:
        """Of each cell the value that is furthest from its row's median, so that neither a peak nor a gap is joined away.

        Distances are ratios where nothing is negative, and differences otherwise.
        """
        both = np.stack([self.low, self.high]).astype(np.float64)
        both[both > _NON_FINITE] = np.nan
        if np.nanmin(both, initial=np.inf) >= 0:
            both = np.log10(np.maximum(both, 1e-45))  # the smallest float32
        rows = both.transpose(1, 0, 2).reshape(len(self.rows), -1)
        middle = np.array([[np.median(kept) if (kept := row[~np.isnan(row)]).size else 0.0] for row in rows])
        downwards = (self.high < _NON_FINITE) & (middle.reshape(-1, 1) - both[0] > both[1] - middle.reshape(-1, 1))
        return np.where(downwards, self.low, self.high)


class Grid:
    """Takes in values of many layers at many steps, and keeps the smallest and the largest per layer and group of steps.

    Args:
        most_columns: groups of steps; when there are more, neighbours are joined.
        most_rows: layers. Where the first delivery brings more, an even choice of them is kept.

    Example:
        >>> grid = Grid(most_columns=2)
        >>> for step, value in enumerate([1.0, 9.0, 1.0, 1.0]):
        ...     grid.add(step, ("enc.0",), np.array([value]))
        >>> grid.table().high.tolist(), grid.table().steps.tolist()
        ([[9.0, 1.0]], [[0, 1], [2, 3]])
    """

    def __init__(self, most_columns: int = 384, most_rows: int = 512) -> None:
        self.left_out = 0
        """Rows that there was no room for in a delivery, at most."""
        self._most_columns, self._most_rows = most_columns, most_rows
        self._rows: dict[str, int] = {}
        self._columns: dict[int, tuple[int, int, NDArray[np.float32], NDArray[np.float32]]] = {}
        self._stride = 1
        self._known: tuple[str, ...] = ()
        self._taken = self._places = np.zeros(0, dtype=np.int64)
        self._plain = True

    def add(self, step: int, modules: tuple[str, ...], values: NDArray[np.float64]) -> None:
        """Take in the values of one step; a module may come several times."""
        if modules != self._known:
            self._place(modules)
        values = values[self._taken]
        held = values if np.abs(values).max(initial=0.0) <= LARGEST else _held(values)  # NaN compares as False
        low = np.full(len(self._rows), np.nan, dtype=np.float32)
        if self._plain:
            low[self._places] = held
            high = low
        else:
            high = low.copy()
            np.fmin.at(low, self._places, held.astype(np.float32))
            np.fmax.at(high, self._places, held.astype(np.float32))
        key = step // self._stride
        self._columns[key] = _join(self._columns.get(key), (step, step, low, high))
        if len(self._columns) > self._most_columns:
            self._halve()

    def want(self, module: str) -> None:
        """Follow a layer from now on, where the choice has left it out."""
        if self.left_out and module not in self._rows and len(self._rows) < 2 * self._most_rows:
            self._rows[module] = len(self._rows)
            self._known = ()

    def table(self) -> Table:
        """Return what was gathered, in order of steps."""
        columns = [self._columns[key] for key in sorted(self._columns)]
        steps = np.array([[first, last] for first, last, _, _ in columns], dtype=np.int64).reshape(-1, 2)
        shape = len(self._rows), len(columns)
        low, high = np.full(shape, np.nan, dtype=np.float32), np.full(shape, np.nan, dtype=np.float32)
        for index, (_, _, smallest, largest) in enumerate(columns):
            low[: len(smallest), index] = smallest
            high[: len(largest), index] = largest
        return Table(tuple(self._rows), steps, low, high)

    def _place(self, modules: tuple[str, ...]) -> None:
        """Give rows to the modules of a delivery; deliveries mostly bring the same ones."""
        if set(map(type, modules)) - {str}:
            raise TypeError(f"Names of modules must be text, got {set(map(type, modules))}.")
        new = [name for name in dict.fromkeys(modules) if name not in self._rows]
        room = max(0, self._most_rows - len(self._rows))
        for name in even(new, room):
            self._rows[name] = len(self._rows)
        self.left_out = max(self.left_out, len(new) - room)
        places = [self._rows.get(name, -1) for name in modules]
        self._taken = np.array([index for index, place in enumerate(places) if place >= 0], dtype=np.int64)
        self._places = np.array([place for place in places if place >= 0], dtype=np.int64)
        self._plain = len(set(self._places.tolist())) == len(self._places)
        self._known = modules

    def _halve(self) -> None:
        self._stride *= 2
        joined: dict[int, tuple[int, int, NDArray[np.float32], NDArray[np.float32]]] = {}
        for key in sorted(self._columns):
            joined[key // 2] = _join(joined.get(key // 2), self._columns[key])
        self._columns = joined
        if len(joined) > self._most_columns:
            self._halve()


def even(names: Sequence[str], most: int) -> list[str]:
    """An even choice of names, the first and the last included.

    Example:
        >>> even(["a", "b", "c", "d", "e"], 3)
        ['a', 'c', 'e']
    """
    if len(names) <= most:
        return list(names)
    return [names[round(index * (len(names) - 1) / max(1, most - 1))] for index in range(most)]


def leaves(names: Sequence[str], types: Mapping[str, str]) -> list[str]:
    """Names that contain no other; of names that are no modules of the run, all."""
    inner = {name[:index] for name in names for index, letter in enumerate(name) if letter == "."}
    return [name for name in names if name not in inner or name not in types]


def _held(values: NDArray[np.float64]) -> NDArray[np.float64]:
    finite = np.clip(np.nan_to_num(values), -LARGEST, LARGEST)
    return np.where(np.isnan(values), NAN, np.where(np.isinf(values), INF, finite))


def _join(
    before: tuple[int, int, NDArray[np.float32], NDArray[np.float32]] | None,
    new: tuple[int, int, NDArray[np.float32], NDArray[np.float32]],
) -> tuple[int, int, NDArray[np.float32], NDArray[np.float32]]:
    if before is None:
        return new
    rows = max(len(before[2]), len(new[2]))
    low = np.fmin(_padded(before[2], rows), _padded(new[2], rows))
    high = np.fmax(_padded(before[3], rows), _padded(new[3], rows))
    return min(before[0], new[0]), max(before[1], new[1]), low, high


def _padded(values: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    return values if len(values) == rows else np.pad(values, (0, rows - len(values)), constant_values=np.nan)
