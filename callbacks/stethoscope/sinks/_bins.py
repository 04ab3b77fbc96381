"""Histograms as dashboards want them: finite, without empty ends, not too many bins."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stethoscope._record import Histogram


class Bins(NamedTuple):
    """Counts between edges, at least one of them above zero.

    Args:
        edges: float64, shape `(n + 1,)`, finite.
        counts: float64, shape `(n,)`, finite, not negative.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.float64]


def trim(histogram: Histogram, most: int | None = None) -> Bins | None:
    """Cut empty bins off both ends, and join neighbours until there are at most `most` bins.

    Counts that are not finite and positive are taken as 0, an infinite edge as the nearest finite one.

    Returns:
        None where nothing was counted.

    Examples:
        >>> from stethoscope._record import Histogram
        >>> bins = trim(Histogram((0.0, 1.0, 2.0, 3.0), (0, 5, 0)))
        >>> bins.edges.tolist(), bins.counts.tolist()
        ([1.0, 2.0], [5.0])
    """
    counts = np.asarray(histogram.counts, dtype=np.float64)
    counts = np.where(np.isfinite(counts) & (counts > 0), counts, 0.0)
    edges = np.asarray(histogram.edges, dtype=np.float64)
    filled = np.flatnonzero(counts)
    finite = edges[np.isfinite(edges)]
    if not filled.size or not finite.size:
        return None
    edges = np.clip(np.nan_to_num(edges, nan=finite[0], posinf=finite[-1], neginf=finite[0]), finite[0], finite[-1])
    edges, counts = edges[filled[0] : filled[-1] + 2], counts[filled[0] : filled[-1] + 1]
    if most is not None and len(counts) > most:
        together = -(-len(counts) // most)
        starts = np.arange(0, len(counts), together)
        edges, counts = np.append(edges[starts], edges[-1]), np.add.reduceat(counts, starts)
    return Bins(edges, counts)
