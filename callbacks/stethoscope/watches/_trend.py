"""How fast does a noisy series fall? Robust blocks over an endless series, and an interval for their slope."""

from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist, median
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._record import JSON

LIMIT = 64
"""Blocks kept; when one more would come, neighbours are merged and blocks get twice as wide."""

PARTS = 16
"""Means kept of the block that is being filled, so that a single outlier can be cut off."""


class Trend(NamedTuple):
    """Slope of a straight line through blocks, per step, and its one-sided bounds."""

    slope: float
    low: float
    high: float


def start(width: int) -> dict[str, JSON]:
    """An empty series whose blocks are `width` steps wide."""
    return {"width": max(1, width), "begin": None, "part": 0, "parts": [], "blocks": []}


def push(series: dict[str, JSON], step: int, value: float) -> tuple[dict[str, JSON], bool]:
    """Take in one finite value; return the new series and whether a block was closed."""
    closed = series["begin"] is not None and step >= series["begin"] + series["width"]
    if closed:
        series = _close(series)
    begin = series["begin"]
    if begin is None:
        begin = step
    elif closed:
        begin += (step - begin) // series["width"] * series["width"]
    part = (step - begin) * PARTS // series["width"]
    parts = series["parts"]
    if parts and part == series["part"]:
        total, steps, count = parts[-1]
        parts = [*parts[:-1], [total + value, steps + step, count + 1]]
    else:
        parts = [*parts, [value, step, 1]]
    return {**series, "begin": begin, "part": part, "parts": parts}, closed


def _close(series: dict[str, JSON]) -> dict[str, JSON]:
    parts = series["parts"]
    at = sum(steps for _, steps, _ in parts) / sum(count for _, _, count in parts)
    levels = sorted(total / count for total, _, count in parts)
    cut = len(levels) // 5
    kept = levels[cut : len(levels) - cut]
    blocks = [*series["blocks"], [at, math.fsum(kept) / len(kept)]]
    width = series["width"]
    if len(blocks) > LIMIT:
        pairs = zip(blocks[1::2], blocks[2::2], strict=True)
        blocks = [blocks[0], *([(a[0] + b[0]) / 2, (a[1] + b[1]) / 2] for a, b in pairs)]
        width *= 2
    return {**series, "width": width, "parts": [], "part": 0, "blocks": blocks}


def window(blocks: Sequence[Sequence[float]], since: float, at_least: int) -> list[Sequence[float]]:
    """The blocks at and after step `since`, or the last `at_least` where those are more."""
    inside = sum(1 for at, _ in blocks if at >= since)
    return list(blocks[-max(inside, at_least) :])


def trend(blocks: Sequence[Sequence[float]], confidence: float) -> Trend:
    """Fit a line by least squares; residuals beyond three robust deviations are pulled in, once.

    `se^2 = sum(r^2) / (n - 2) / sum((t - mean t)^2) * (1 + a) / (1 - a)` with `a` the lag-1 autocorrelation of the
    residuals, cut to [0, 0.8]; the bounds are `slope -+ t(confidence, n - 2) * se`, one-sided. Needs three blocks.
    """
    at = [block[0] for block in blocks]
    level = [block[1] for block in blocks]
    slope, residuals = line(at, level)
    spread = 1.4826 * median(abs(r) for r in residuals)
    if spread > 0 and max(abs(r) for r in residuals) > 3 * spread:
        fitted = [y - r for y, r in zip(level, residuals, strict=True)]
        level = [f + max(-3 * spread, min(3 * spread, r)) for f, r in zip(fitted, residuals, strict=True)]
        slope, residuals = line(at, level)
    n = len(at)
    middle = math.fsum(at) / n
    square = math.fsum(r * r for r in residuals)
    lagged = math.fsum(a * b for a, b in pairwise(residuals))
    alike = min(0.8, max(0.0, lagged / square)) if square > 0 else 0.0
    variance = square / (n - 2) / math.fsum((t - middle) ** 2 for t in at)
    error = student(confidence, n - 2) * math.sqrt(variance * (1 + alike) / (1 - alike))
    return Trend(slope, slope - error, slope + error)


def line(at: Sequence[float], level: Sequence[float]) -> tuple[float, list[float]]:
    """Return slope and residuals of the straight line by least squares."""
    n = len(at)
    middle, mean = math.fsum(at) / n, math.fsum(level) / n
    slope = math.fsum((t - middle) * (y - mean) for t, y in zip(at, level, strict=True))
    slope /= math.fsum((t - middle) ** 2 for t in at)
    return slope, [y - mean - slope * (t - middle) for t, y in zip(at, level, strict=True)]


def student(confidence: float, freedom: int) -> float:
    """One-sided quantile of Student's t by the expansion of Cornish and Fisher (error below 2 % from 3 degrees on)."""
    z = NormalDist().inv_cdf(confidence)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
