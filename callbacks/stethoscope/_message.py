"""The message of one rank: packs the records of a delivery into arrays to be added up over ranks, and unpacks the result.

The arithmetic is that of `_combine.py`, for thousands of records at once: deliveries of one kind look alike from step to step, so
that what to do with each record is worked out once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias
from zlib import crc32

import numpy as np

from stethoscope import _combine
from stethoscope._record import Histogram, Record

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"

_new = tuple.__new__  # makes a record in half the time


class Layout:
    """Which records of a delivery are combined, and where their numbers are in a message.

    Args:
        records: of one delivery.
        everything: combine all records that have an operation; else only those of parts of a whole.
        ranks: how many there are.
        shards: see `Run`.
    """

    def __init__(self, records: Sequence[Record], everything: bool, ranks: int, shards: Mapping[str, int]) -> None:
        self._shape = _shape(records)
        chosen = [
            i
            for i, record in enumerate(records)
            if record.source == "probe"
            and (everything or _combine.is_part(record))
            and not _combine.is_lone(record)
            and _combine.operation(record)
        ]
        # hooks fire in another order on another rank
        chosen.sort(key=lambda i: (records[i].name, records[i].module, records[i].call))
        self._scalars = [i for i in chosen if not isinstance(records[i].value, Histogram)]
        self._histograms = [i for i in chosen if isinstance(records[i].value, Histogram)]
        how = [_combine.operation(records[i]) for i in self._scalars]
        self._squared = np.array([each == "rms" for each in how], dtype=bool)
        self._extreme = np.array([each in ("min", "max") for each in how], dtype=bool)
        self._sign = np.array([-1.0 if each == "min" else 1.0 for each in how if each in ("min", "max")])
        self._factor = np.array(
            [_factor(records[i], each, ranks, shards) for i, each in zip(self._scalars, how, strict=True)]
        )
        wholes = [_combine.WHOLES.get(records[i].name) for i in self._scalars]
        self._names = [whole[0] if whole else records[i].name for i, whole in zip(self._scalars, wholes, strict=True)]
        self._with_ratios = "parameter/update_norm" in self._names
        bins = [len(value.counts) for i in self._histograms if isinstance(value := records[i].value, Histogram)]
        self.sums, self.peaks = len(self._scalars) + sum(bins), len(self._sign)
        said = [(records[i].name, records[i].module, records[i].call) for i in (*self._scalars, *self._histograms)]
        self.checksum = crc32(repr((said, bins)).encode())

    def fits(self, records: Sequence[Record]) -> bool:
        """Whether it was made of a delivery that looks the same."""
        return _shape(records) == self._shape

    def pack(self, records: Sequence[Record]) -> tuple[Numbers, Numbers]:
        """Return this rank's contribution: numbers to be added up, and numbers of which the largest counts."""
        values: Numbers = np.array([records[i].value for i in self._scalars], dtype=np.float64)
        extremes = values[self._extreme] * self._sign
        # of several numbers one of which is NaN, the largest depends on their order: a sum does not
        values[self._extreme] = np.where(np.isnan(extremes), np.nan, 0.0)
        with np.errstate(over="ignore"):
            values[self._squared] **= 2
        counts = [value.counts for i in self._histograms if isinstance(value := records[i].value, Histogram)]
        flat = [np.concatenate([np.asarray(each, dtype=np.float64) for each in counts])] if counts else []
        return np.concatenate([values, *flat]), np.where(np.isnan(extremes), -np.inf, extremes)

    def unpack(self, records: Sequence[Record], sums: Numbers, peaks: Numbers) -> list[Record]:
        """Return the delivery with the records of all ranks in place of this rank's; they are stamped as rank 0's.

        Args:
            records: what `pack` was given.
            sums: over ranks.
            peaks: largest over ranks.
        """
        size = len(self._scalars)
        with np.errstate(invalid="ignore"):
            values = sums[:size] * self._factor
            values[self._squared] = np.sqrt(values[self._squared])
            values[self._extreme] += peaks * self._sign
        made = list(records)
        for i, name, value in zip(self._scalars, self._names, values.tolist(), strict=True):
            _, _, step, module, phase, call, _, source, kind = records[i]
            made[i] = _new(Record, (name, value, step, module, phase, call, 0, source, kind))
        start = size
        for i in self._histograms:
            mine = records[i].value
            assert isinstance(mine, Histogram)
            end = start + len(mine.counts)
            made[i] = records[i]._replace(value=Histogram(mine.edges, tuple(sums[start:end].tolist())), rank=0)
            start = end
        return _combine.with_ratios(made) if self._with_ratios else made


def _shape(records: Sequence[Record]) -> list[tuple[object, ...]]:
    return [(name, module, call, kind, value is None) for name, value, _, module, _, call, _, _, kind in records]


def _factor(record: Record, how: str | None, ranks: int, shards: Mapping[str, int]) -> float:
    if how not in ("mean", "rms"):
        return 1.0
    parts = shards.get(record.module, shards.get("", 1)) if _combine.is_part(record) else 1
    return parts / ranks
