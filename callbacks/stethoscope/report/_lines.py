"""Numbers over steps, as the page's script needs them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope.report._curve import Point


class Mark(NamedTuple):
    """A finding on a time axis.

    Args:
        label: the number of its cause on the page.
        step: where.
        severity: its colour.
        what: what the reader is told on hovering.
    """

    label: str
    step: int
    severity: str
    what: str


def lines(
    points: Mapping[str, Sequence[Point]], most: int, unit: str = "", marks: Sequence[Mark] = ()
) -> dict[str, Any]:
    """Make the data of one figure.

    Args:
        points: by what a line is called: a phase or a run.
        most: lines; further ones are left out.
        unit: of the values.
        marks: findings, drawn at the top.

    Returns:
        JSON. The axis is logarithmic where all values are positive and differ by more than a factor of 1000.
    """
    shown = dict(list(points.items())[:most])
    finite = [
        edge for line in shown.values() for point in line for edge in (point.low, point.high) if math.isfinite(edge)
    ]
    logarithmic = bool(finite) and min(finite) > 0 and max(finite) > 1000 * min(finite)
    bottom, upper, top = _span(finite, logarithmic=logarithmic)
    first = min((point.first for line in shown.values() for point in line), default=0)
    last = max([point.last for line in shown.values() for point in line] + [mark.step for mark in marks] or [1])
    margin = max(1, last - first) * 0.03
    return {
        "figure": "curve-log" if logarithmic else "curve-linear",
        "unit": unit,
        "x": [first - margin, last + margin],
        "y": [bottom, upper, top],
        "lines": [{"label": label, "points": [list(point) for point in line]} for label, line in shown.items()],
        "marks": [mark._asdict() for mark in marks],
    }


def _span(finite: Sequence[float], *, logarithmic: bool) -> tuple[float, float, float]:
    """The bottom of the axis, where marks stand, and the top."""
    if not finite:
        return 0.0, 0.85, 1.0
    low, high = min(finite), max(finite)
    if logarithmic:
        stretch = (high / low) ** 0.08
        return low / stretch, min(high * stretch, 1e306), min(high * stretch**2.2, 1e307)
    room = (high / 2 - low / 2) * 2 or abs(high) or 1.0
    if not math.isfinite(room):
        return -1.2e308, 1.2e308, 1.5e308
    return low - 0.06 * room, high + 0.1 * room, high + 0.22 * room
