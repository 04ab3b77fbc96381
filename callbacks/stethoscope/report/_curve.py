"""One number over the steps of a run, in bounded memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable


class Point(NamedTuple):
    """Neighbouring steps of a curve.

    Args:
        first: first step.
        last: last step.
        low: smallest finite value; NaN where there is none.
        high: largest finite value; NaN where there is none.
        value: the last value, finite or not.
        nonfinite: the first step with NaN or Inf; None where all values are finite.
    """

    first: int
    last: int
    low: float
    high: float
    value: float
    nonfinite: int | None


class Curve:
    """Takes in a number at many steps and keeps, per group of steps, its smallest, largest and last value.

    Args:
        most: groups of steps; when there are more, neighbours are joined.

    Example:
        >>> curve = Curve(most=2)
        >>> for step, value in enumerate([3.0, 8.0, 2.0, math.nan]):
        ...     curve.add(step, value)
        >>> [(point.high, point.value, point.nonfinite) for point in curve.points()]
        [(8.0, 8.0, None), (2.0, nan, 3)]
    """

    def __init__(self, most: int = 512) -> None:
        self._most, self._stride = most, 1
        self._points: dict[int, Point] = {}

    def add(self, step: int, value: float, *, leads: bool = True) -> None:
        """Take in one value. Of several ranks one leads: its value is the line, those of others widen the range."""
        finite = math.isfinite(value)
        number = value if finite else math.nan
        point = Point(step, step, number, number, value, None if finite else step)
        key = step // self._stride
        before = self._points.get(key)
        self._points[key] = point if before is None else _join(before, point, leads=leads)
        if len(self._points) > self._most:
            self._halve()

    def points(self) -> list[Point]:
        """Return the points in order of steps."""
        return [self._points[key] for key in sorted(self._points)]

    def _halve(self) -> None:
        self._stride *= 2
        joined: dict[int, Point] = {}
        for key in sorted(self._points):
            before = joined.get(key // 2)
            joined[key // 2] = self._points[key] if before is None else _join(before, self._points[key])
        self._points = joined
        if len(joined) > self._most:
            self._halve()


def _join(before: Point, new: Point, *, leads: bool = True) -> Point:
    steps = [step for step in (before.nonfinite, new.nonfinite) if step is not None]
    return Point(
        min(before.first, new.first),
        max(before.last, new.last),
        _known(before.low, new.low, min),
        _known(before.high, new.high, max),
        new.value if leads else before.value,
        min(steps, default=None),
    )


def _known(one: float, other: float, choose: Callable[[float, float], float]) -> float:
    return other if math.isnan(one) else one if math.isnan(other) else choose(one, other)
