"""How many series a dashboard gets, and which."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from stethoscope._record import Histogram

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stethoscope._record import Finding, Record

_T = TypeVar("_T")

MAX_SERIES = 300
"""Series per emission. W&B takes 100,000 values a minute and TensorBoard's page becomes slow with some thousand cards;
at every=50 and five steps a second this is 1,800 values a minute."""

MAX_HISTOGRAMS = 16
"""Histograms among them: one costs as much as 60 numbers."""

MAX_SUSPECTS = 100
"""Series of layers with findings that come on top, so that one cause with many findings does not undo the budget."""

MAX_NAMES = 12
"""Names in the log of what was left out; a training may log tens of thousands."""

_TELLING = ("rms", "norm")
"""Statistics that say most about a layer in one number; shown before the others of their group."""


class _Series(NamedTuple):
    name: str
    module: str
    call: int
    phase: str
    logged: bool


class _Emission(NamedTuple):
    """Series that come in one write together."""

    phase: str
    logged: bool


class Budget:
    """Lets the same series through at every write, so that none has holes.

    Each series is decided on when it first comes, and for the whole run. Of one emission (a phase, or what is logged in
    it) there are at most `limit`: first what belongs to no layer, then one statistic for all layers, a few histograms
    of evenly spaced layers, one statistic of each other group, and at last further statistics, each for all layers or
    not at all. Where room is short for the first statistic of a group, it is shown for evenly spaced layers. Layers
    with findings are added. What is left out is stated once in the log.

    Args:
        sink: name of the sink, for the log.
        limit: series per emission; None lets everything through.

    Raises:
        ValueError: `limit` is below 1.

    Examples:
        >>> from stethoscope import Record
        >>> layers = [Record("activation/rms", 1.0, 0, module=f"enc.{i}") for i in range(400)]
        >>> len(Budget("Doctest", limit=300).admit(layers))
        300
    """

    def __init__(self, sink: str, limit: int | None = MAX_SERIES) -> None:
        if limit is not None and limit < 1:
            raise ValueError(f"max_series={limit!r} must be a number of series, at least 1, or None for no limit.")
        self._sink = sink
        self._limit = limit
        self._shown: dict[_Series, bool] = {}
        self._used: Counter[_Emission] = Counter()
        self._histograms: Counter[_Emission] = Counter()
        self._suspects: set[str] = set()
        self._extra = 0
        self._stated = False

    def admit(self, records: Sequence[Record], findings: Iterable[Finding] = ()) -> Sequence[Record]:
        """Return the records to show, in the same order."""
        if self._limit is None:
            return records
        series = [_Series(r.name, r.module, r.call, r.phase, r.source == "log") for r in records]
        fresh = {key: record for key, record in zip(series, records, strict=True) if key not in self._shown}
        suspects = {finding.module for finding in findings if finding.module} - self._suspects
        self._suspects |= suspects
        if fresh:
            self._choose(fresh, self._limit)
        if self._suspects and (fresh or suspects):
            self._add_suspects()
        if fresh and not self._stated:
            self._state()
        return [record for key, record in zip(series, records, strict=True) if self._shown[key]]

    def _choose(self, fresh: dict[_Series, Record], limit: int) -> None:
        emissions: defaultdict[_Emission, list[_Series]] = defaultdict(list)
        for key in fresh:
            self._shown[key] = False
            emissions[_Emission(key.phase, key.logged)].append(key)
        for emission, keys in emissions.items():
            layered = [key for key in keys if key.module]
            histograms = [key for key in layered if isinstance(fresh[key].value, Histogram)]
            scalars = set(layered) - set(histograms)
            # A later layer of a statistic that was left out stays out with it.
            out = {
                key.name
                for key, shown in self._shown.items()
                if not shown and key not in fresh and key.phase == emission.phase
            }
            statistics = _in_turn(key for key in layered if key in scalars and key.name not in out)
            first_time = not any(
                key.module and shown for key, shown in self._shown.items() if key.phase == emission.phase
            )
            self._take([key for key in keys if not key.module], emission, limit)
            firsts = [statistic for turn, statistic in statistics if turn == 0]
            if firsts and first_time:
                first, *firsts = firsts
                self._take(_evenly(first, limit - self._used[emission]), emission, limit)
            self._histograms[emission] += self._take(
                _evenly(histograms, MAX_HISTOGRAMS - self._histograms[emission]), emission, limit
            )
            # The smallest first, so that what it leaves of its share goes to the others.
            for left, statistic in zip(range(len(firsts), 0, -1), sorted(firsts, key=len), strict=True):
                self._take(_evenly(statistic, (limit - self._used[emission]) // left), emission, limit)
            for turn, statistic in statistics:
                if turn > 0 and len(statistic) <= limit - self._used[emission]:
                    self._take(statistic, emission, limit)

    def _take(self, keys: Sequence[_Series], emission: _Emission, limit: int) -> int:
        taken = keys[: limit - self._used[emission]]
        self._shown.update(dict.fromkeys(taken, True))
        self._used[emission] += len(taken)
        return len(taken)

    def _add_suspects(self) -> None:
        for key, shown in self._shown.items():
            if self._extra >= MAX_SUSPECTS:
                return
            # A finding on a module concerns its parameters, which records name in full.
            if not shown and (key.module in self._suspects or key.module.rpartition(".")[0] in self._suspects):
                self._shown[key] = True
                self._extra += 1

    def _state(self) -> None:
        hidden = [key for key, shown in self._shown.items() if not shown]
        if hidden:
            self._stated = True
            logging.getLogger("stethoscope").warning(
                "%s shows %d of %d series (at most %d at a time), the same ones for the whole run; layers with findings "
                "are added. Left out: %s. Set max_series to change this; Jsonl writes everything.",
                self._sink,
                len(self._shown) - len(hidden),
                len(self._shown),
                self._limit,
                _told(hidden),
            )


def _told(hidden: Sequence[_Series]) -> str:
    """Name what was left out, as far as a line of a log has room."""
    layers = Counter(key.name for key in hidden if key.module)
    names = [f"{name} of {count:,} layers" if count > 1 else f"{name} of one layer" for name, count in layers.items()]
    names += dict.fromkeys(key.name for key in hidden if not key.module)
    more = [f"and {len(names) - MAX_NAMES:,} more"] if len(names) > MAX_NAMES else []
    return ", ".join([*names[:MAX_NAMES], *more])


def _in_turn(keys: Iterable[_Series]) -> list[tuple[int, list[_Series]]]:
    """Sort whole statistics: the first one of each group (turn 0), then the second one of each group, and so on."""
    statistics: defaultdict[str, list[_Series]] = defaultdict(list)
    for key in keys:
        statistics[key.name].append(key)
    telling_first = sorted(statistics, key=lambda name: name.rpartition("/")[2] not in _TELLING)
    seen: Counter[str] = Counter()
    turns: list[tuple[int, str]] = []
    for name in telling_first:
        group = name.partition("/")[0]
        turns.append((seen[group], name))
        seen[group] += 1
    return [(turn, statistics[name]) for turn, name in sorted(turns, key=lambda turn: turn[0])]


def _evenly(items: Sequence[_T], most: int) -> Sequence[_T]:
    return items if len(items) <= most else [items[i * len(items) // most] for i in range(max(most, 0))]
