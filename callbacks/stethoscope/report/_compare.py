"""Where do two runs part?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stethoscope.report._causes import Cause, causes
from stethoscope.report._grid import INF, LARGEST, NAN, Table, leaves

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from stethoscope.report._curve import Point
    from stethoscope.report._summary import Summary

EQUAL = 1e-4
"""Relative difference up to which numbers count as equal: the order of sums differs between machines and versions."""
NOISE = 6.0
"""How often the scatter of a series from one observed step to the next; normal noise exceeds 6 once in 500 million times."""
LEAST, LEAST_OTHERWISE = 0.25, 1.0
"""Smallest relative difference that counts in runs that begin equal, and in others: with another seed, small parameters
drift apart by a factor of two in healthy runs."""
LASTING = 3
"""Observed steps in a row, so that one odd batch does not count."""
SETTLED = 3
"""Observed steps at the start whose difference is taken as what seeds make."""


@dataclass(frozen=True)
class Parting:
    """A series in which two runs part.

    Args:
        name: of the records.
        phase: of the records.
        module: layer or parameter; `""` for a number of the whole model.
        step: the first observed step at which they are apart; where steps are joined, the first one of the group.
        first: value in the first run.
        second: value in the second run.
        times_noise: how many times the scatter of the series; infinite where one is not finite.
    """

    name: str
    phase: str
    module: str
    step: int
    first: float
    second: float
    times_noise: float


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side.

    Args:
        first: one run.
        second: the other.
        equal_until: the last step up to which all that both recorded is equal to 4 digits; None where the first
            numbers differ already, as with another seed.
        common: observed steps that both runs have.
        partings: series in which they part beyond noise, the earliest first.
        only_first: causes of findings that only the first run has.
        only_second: the same of the second.
        differ_first: names of records that differ at the first step at which anything does: where it is the update ratio
            alone, seed and data are the same.
    """

    first: Summary
    second: Summary
    equal_until: int | None
    common: int
    partings: tuple[Parting, ...]
    only_first: tuple[Cause, ...]
    only_second: tuple[Cause, ...]
    differ_first: tuple[str, ...] = ()


def compare(first: Summary, second: Summary) -> Comparison:
    """Find out where two runs part.

    **How it is decided.** Series that both runs have are compared at the steps that both observed. Numbers are compared on
    a scale that is linear near zero and logarithmic beyond (asinh of the value over a quarter of the series' median
    magnitude), so that a difference of 0.25 is about 25 %. Runs part in a series where, for 3 observed steps in a row
    the difference exceeds what it was in the first 3 by more than 0.25 (1 where the runs differ from the start), and by more than 6 times the
    scatter from one step to the next (1.4826 times the median magnitude of the steps, over sqrt 2, of the noisier run; their rms where the median is 0); or
    where one run is finite and the other is not. Two runs cannot tell what seeds alone do, hence the larger limit.

    Args:
        first: a run, see `summarise`.
        second: another one.
    """
    partings: list[Parting] = []
    equal, shared, differ_first = _equal_until(first, second)
    least = LEAST_OTHERWISE if equal is None else LEAST
    for name, phase, one, other in _both(first, second):
        steps, places, matches = np.intersect1d(one.steps[:, 0], other.steps[:, 0], return_indices=True)
        if not len(steps):
            continue
        for module, row, twin in _rows(one, other, first):
            a, b = _values(one, row)[places], _values(other, twin)[matches]
            parted = _part(a, b, least)
            if parted is not None:
                at, noise = parted
                pair = _told(one.high[row, places[at]]), _told(other.high[twin, matches[at]])
                partings.append(Parting(name, phase, module, int(steps[at]), *pair, noise))
    depth = {module: place for place, (module, _) in enumerate(first.run.modules)}
    partings.sort(key=lambda part: (part.step, _depth(part.module, depth), -part.times_noise))
    ours, theirs = causes(first.findings), causes(second.findings)
    return Comparison(
        first,
        second,
        equal,
        shared,
        tuple(partings),
        tuple(cause for cause in ours if cause.code not in {other.code for other in theirs}),
        tuple(cause for cause in theirs if cause.code not in {other.code for other in ours}),
        differ_first,
    )


def _equal_until(first: Summary, second: Summary) -> tuple[int | None, int, tuple[str, ...]]:
    """The last common step before any number differs, how many common steps there are, and which numbers differ first."""
    shared: set[int] = set()
    since: dict[str, float] = {}
    for name, _, one, other in _both(first, second):
        steps, places, matches = np.intersect1d(one.steps[:, 0], other.steps[:, 0], return_indices=True)
        shared |= set(steps.tolist())
        for _, row, twin in _rows(one, other, first):
            a, b = _values(one, row)[places], _values(other, twin)[matches]
            same = _same(a, b)
            if not same.all():
                since[name] = min(since.get(name, math.inf), float(steps[~same][0]))
    differ = min(since.values(), default=math.inf)
    names = tuple(sorted(name for name, step in since.items() if step == differ))
    return max((step for step in shared if step < differ), default=None), len(shared), names


def _same(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether numbers are equal to 4 digits, or up to 4 digits of what is usual in the series, where they cancel out."""
    known = np.abs(a[np.isfinite(a)])
    usual = float(np.median(known)) if known.size else 0.0
    return np.isclose(a, b, rtol=EQUAL, atol=EQUAL * usual, equal_nan=True)


def _both(first: Summary, second: Summary) -> Iterator[tuple[str, str, Table, Table]]:
    for key in first.curves.keys() & second.curves.keys():
        tables = []
        for summary in (first, second):
            points = summary.curves[key].points()
            steps = np.array([[point.first, point.last] for point in points], dtype=np.int64).reshape(-1, 2)
            values = np.array([[_held(point) for point in points]])
            tables.append(Table(("",), steps, values, values))
        yield (*key, tables[0], tables[1])
    for key in first.grids.keys() & second.grids.keys():
        yield (*key, first.grids[key].table(), second.grids[key].table())


def _held(point: Point) -> float:
    """As cells of a grid are held; see `NAN` and `INF` there."""
    if point.nonfinite is None:
        return point.value
    return NAN if math.isnan(point.value) else INF


def _told(value: float) -> float:
    return float(value) if value <= LARGEST else math.nan if value > (NAN + INF) / 2 else math.inf


def _rows(one: Table, other: Table, first: Summary) -> Iterator[tuple[str, int, int]]:
    twins = {name: row for row, name in enumerate(other.rows)}
    inner = set(leaves(one.rows, dict(first.run.modules)))
    for row, name in enumerate(one.rows):
        if name in twins and name in inner:
            yield name, row, twins[name]


def _values(table: Table, row: int) -> NDArray[np.float64]:
    """The largest value of each group of steps; Inf where there is a NaN or Inf, NaN where nothing was measured."""
    values = table.high[row].astype(np.float64)
    return np.where(np.isnan(values), np.nan, np.where(values > LARGEST, np.inf, values))


def _part(a: NDArray[np.float64], b: NDArray[np.float64], least: float) -> tuple[int, float] | None:
    """Return where two series part, and by how many times their scatter."""
    measured = np.flatnonzero(~np.isnan(a) & ~np.isnan(b))
    a, b = a[measured], b[measured]
    broken = np.isinf(a) != np.isinf(b)
    fine = ~np.isinf(a) & ~np.isinf(b)
    known = np.abs(np.concatenate([a[fine], b[fine]]))
    known = known[known > 0]
    knee = float(np.median(known)) / 4 if known.size else 1.0
    bent = [np.arcsinh(np.where(fine, values, 0.0) / knee) for values in (a, b)]
    apart = np.where(fine, np.abs(bent[0] - bent[1]), 0.0)
    scatter = max(_scatter(values[fine]) for values in bent)
    start = float(apart[:SETTLED].max(initial=0.0)) if len(apart) > SETTLED else 0.0
    beyond = (apart > start + max(least, NOISE * scatter)) | broken
    for index in np.flatnonzero(beyond):
        lasting = beyond[index : index + LASTING]
        if broken[index] or (lasting.all() and len(lasting) == LASTING):
            noise = math.inf if broken[index] or scatter == 0 else float(apart[index] / scatter)
            return int(measured[index]), noise
    return None


def _scatter(values: NDArray[np.float64]) -> float:
    moves = np.abs(np.diff(values))
    if not len(moves):
        return 0.0
    usual = 1.4826 * float(np.median(moves))
    return (usual or float(np.sqrt(np.mean(moves**2)))) / math.sqrt(2)


def _depth(module: str, depth: dict[str, int]) -> int:
    """Numbers of the whole model come last; parameters have the place of their layer."""
    if not module:
        return len(depth) + 1
    while module not in depth and "." in module:
        module = module.rpartition(".")[0]
    return depth.get(module, len(depth))
