"""Device buffers behind `Activations`: one row of raw moments per tensor that is observed, and one pool of samples.

A hook writes a few 0-d results straight into its row. All else (histograms, zero fractions, square roots) is worked
out for every row together when the bank is read, so that a small module costs a small number of operations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stethoscope import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

LOW, HIGH, TOTAL, NORM, SQUARES, FOURTHS, BAD = range(7)
NEUTRAL = (float("inf"), float("-inf"), 0.0, 0.0, 0.0, 0.0, 0.0)
"""What a row holds before its first value: the identity of min, max, sum, root of squares, sum, sum, sum."""

RANGE = frozenset({"min", "max", "absmax", "nonfinite"})
SAMPLED = frozenset({"zero_fraction", "histogram"})
MOMENTS = frozenset({"std", "kurtosis"})

_FIRST_ROWS = 32
_LARGE = 65_536
"""Values from which, on a CPU, `amin` and `amax` one after the other take a fifth to a third less than `aminmax` (torch 2.13)."""


class Row(NamedTuple):
    """Where one observed tensor keeps its numbers, as views that hooks write to with `out=`."""

    low: Tensor
    high: Tensor
    total: Tensor
    norm: Tensor
    squares: Tensor
    fourths: Tensor
    bad: Tensor


class _Run(NamedTuple):
    """Neighbouring rows whose samples are as long and lie at the same distance in the pool."""

    first: int
    rows: int
    start: int
    capacity: int
    size: int
    whole: bool  # whether the samples are all values

    def goes_on(self, row: int, start: int, capacity: int, size: int, whole: bool) -> bool:
        """Whether a row is the next of this run."""
        follows = (self.first + self.rows, self.start + self.rows * self.capacity)
        return (row, start, capacity, size, whole) == (*follows, self.capacity, self.size, self.whole)


class Bank:
    """Raw moments and samples of many tensors of one device and one precision.

    Args:
        device: of the tensors.
        dtype: float32 or float64.
        statistics: names from `Activations`.
        sample: values kept per tensor for zero fraction and histogram.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, statistics: frozenset[str], sample: int) -> None:
        self.device, self.dtype, self.statistics, self.sample = device, dtype, statistics, sample
        self.rows: list[Row] = []
        self._ranges = bool(statistics & RANGE)
        self._means = bool(statistics & {"mean", "std", "kurtosis"})
        self._norms = "rms" in statistics
        self._moments = bool(statistics & MOMENTS)
        self._exact_counts = "nonfinite_count" in statistics
        self._samples = bool(statistics & SAMPLED)
        # a call costs more than the values of a small tensor, so what the pool holds whole is worked out from there
        self._is_put_off = self._samples and not (self._moments or self._exact_counts)
        self._layout: tuple[tuple[list[int], list[bool]], list[_Run]] = (([], []), [])
        self._pool_size = 0
        self._spans: dict[int, tuple[int, int]] = {}  # row -> start and capacity in the pool
        self._shapes: dict[int, tuple[torch.Size, Tensor]] = {}  # row -> its span of the pool in the shape last seen
        self._numel: list[int] = []  # values of the pass under way, per row
        self._sampled: list[int] = []
        self._total_numel: list[int] = []  # values of all passes since the last read
        self._total_sampled: list[int] = []
        self._uploads: dict[str, tuple[list[int], Tensor]] = {}
        self._dirty = False
        self._fresh, self._raw, self._gathered, self._counts_by_bin = self._buffers(_FIRST_ROWS)
        self._pool = self._empty(0)
        self._base_of = torch.empty(0, dtype=torch.int64, device=device)

    def _empty(self, *shape: int) -> Tensor:
        # buffers made inside of inference_mode could not be written to outside of it
        with torch.inference_mode(mode=False):
            return torch.empty(shape, dtype=self.dtype, device=self.device)

    def _neutral(self, rows: int) -> Tensor:
        filled = self._empty(rows, len(NEUTRAL))
        for column, value in enumerate(NEUTRAL):
            filled[:, column] = value
        return filled

    def _buffers(self, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Neutral rows to copy from, rows that hooks write to, rows gathered so far, and their histograms."""
        with torch.inference_mode(mode=False):
            counts = torch.zeros(rows, stats.CODES, dtype=torch.int64, device=self.device)
        return self._neutral(rows), self._neutral(rows), self._neutral(rows), counts

    def _grow(self) -> None:
        used = len(self.rows)
        fresh, raw, gathered, counts = self._buffers(2 * used)
        raw[:used], gathered[:used], counts[:used] = self._raw, self._gathered, self._counts_by_bin
        self._fresh, self._raw, self._gathered, self._counts_by_bin = fresh, raw, gathered, counts
        self.rows = [Row(*raw[i].unbind()) for i in range(used)]

    def add(self) -> int:
        """Reserve one more row and return its index."""
        index = len(self.rows)
        if index == len(self._raw):
            self._grow()
        self.rows.append(Row(*self._raw[index].unbind()))
        for counts in (self._numel, self._sampled, self._total_numel, self._total_sampled):
            counts.append(0)
        return index

    def make_room(self, index: int) -> None:
        """A new pass is about to write a row: if it still holds the last pass, all rows are folded."""
        if self._numel[index]:
            self.fold()

    def write(self, index: int, x: Tensor) -> None:
        """Take in one tensor. A row is written once per pass; a second time only its range is widened.

        Args:
            index: from `add`.
            x: as `stats.measurable` returns it, not empty, this bank's device and dtype. Gradients must be off.
        """
        row = self.rows[index]
        if self._numel[index]:
            if self._ranges:
                low, high = torch.aminmax(x)
                torch.minimum(row.low, low, out=row.low)
                torch.maximum(row.high, high, out=row.high)
            return
        self._dirty = True
        self._numel[index] = x.numel()
        if self._is_put_off and x.numel() <= self.sample:
            self._keep_sample(index, x)
            return
        if self._ranges and self.device.type == "cpu" and x.numel() >= _LARGE:
            torch.amin(x, dim=(), out=row.low)
            torch.amax(x, dim=(), out=row.high)
        elif self._ranges:
            torch.aminmax(x, out=(row.low, row.high))
        if self._means:
            torch.sum(x, dim=None, out=row.total)
        if self._norms:
            torch.linalg.vector_norm(x, out=row.norm)
        if self._moments:
            squares, fourths = stats.central_moments(x)
            row.squares.copy_(squares)
            row.fourths.copy_(fourths)
        if self._exact_counts:
            row.bad.copy_(stats.nonfinite_count(x))
        if self._samples:
            self._keep_sample(index, x)

    def _keep_sample(self, index: int, x: Tensor) -> None:
        known = self._shapes.get(index)
        if known is not None and known[0] == x.shape:
            self._sampled[index] = known[1].numel()
            known[1].copy_(x if x.numel() <= self.sample else stats.sample(x, self.sample))
            return
        values = stats.sample(x, self.sample)
        size = values.numel()
        start, capacity = self._spans.get(index, (0, 0))
        if size > capacity:
            start, capacity = self._spans[index] = self._reserve(index, size)
        span = self._pool[start : start + size]
        self._shapes[index] = (x.shape, span.view(x.shape) if x.numel() <= self.sample else span)
        self._sampled[index] = size
        span.copy_(values)

    def _reserve(self, index: int, size: int) -> tuple[int, int]:
        capacity = min(self.sample, 1 << (size - 1).bit_length())
        start = self._pool_size
        self._pool_size += capacity
        if self._pool_size > len(self._pool):
            grown = self._empty(2 * self._pool_size).fill_(torch.nan)
            with torch.inference_mode(mode=False):
                base_of = torch.zeros(len(grown), dtype=torch.int64, device=self.device)
            grown[:start], base_of[:start] = self._pool[:start], self._base_of[:start]
            self._pool, self._base_of = grown, base_of
            self._shapes.clear()  # they are views of the pool before it grew
        self._base_of[start : start + capacity] = index * stats.CODES
        return start, capacity

    def fold(self) -> None:
        """Add the pass under way (one micro-batch) to what was gathered before, for all rows together."""
        if not self._dirty:
            return
        self._dirty = False
        raw, gathered = self._raw, self._gathered
        if self._samples:
            for run in self._runs():
                self._reduce(run)
        if self._ranges:
            torch.minimum(gathered[:, LOW], raw[:, LOW], out=gathered[:, LOW])
            torch.maximum(gathered[:, HIGH], raw[:, HIGH], out=gathered[:, HIGH])
        if self._moments:
            self._fold_moments()
        if self._means:
            gathered[:, TOTAL] += raw[:, TOTAL]
        if self._norms:
            torch.hypot(gathered[:, NORM], raw[:, NORM], out=gathered[:, NORM])
        if self._exact_counts:
            gathered[:, BAD] += raw[:, BAD]
        if self._samples:
            used = self._pool[: self._pool_size]
            # unused places hold NaN and so count as non-finite samples, which nobody reads
            bins = stats.log_bins(used).add_(self._base_of[: self._pool_size])
            self._counts_by_bin.view(-1).scatter_add_(0, bins, torch.ones_like(bins))
            used.fill_(torch.nan)
        raw.copy_(self._fresh)
        for index, (numel, sampled) in enumerate(zip(self._numel, self._sampled, strict=True)):
            self._total_numel[index] += numel
            self._total_sampled[index] += sampled
        self._numel, self._sampled = [0] * len(self.rows), [0] * len(self.rows)

    def _runs(self) -> list[_Run]:
        """The rows of this pass in runs that lie in the pool like the rows of a matrix; the same until shapes change."""
        laid_out = self._sampled, [numel == sampled for numel, sampled in zip(self._numel, self._sampled, strict=True)]
        if self._layout[0] != laid_out:
            runs: list[_Run] = []
            for row, (size, whole) in enumerate(zip(*laid_out, strict=True)):
                if not size:
                    continue
                start, capacity = self._spans[row]
                last = runs[-1] if runs else None
                if last is not None and last.goes_on(row, start, capacity, size, whole):
                    runs[-1] = last._replace(rows=last.rows + 1)
                else:
                    runs.append(_Run(row, 1, start, capacity, size, whole))
            self._layout = laid_out, runs
        return self._layout[1]

    def _reduce(self, run: _Run) -> None:
        """Take from the pool what hooks have left undone: everything for tensors that it holds whole."""
        block = self._pool.as_strided((run.rows, run.size), (run.capacity, 1), run.start)
        raw = self._raw[run.first : run.first + run.rows]
        if self._is_put_off and run.whole:
            if self._ranges:
                raw[:, LOW] = torch.minimum(raw[:, LOW], block.amin(dim=1))
                raw[:, HIGH] = torch.maximum(raw[:, HIGH], block.amax(dim=1))
            if self._means:
                raw[:, TOTAL] = block.sum(dim=1)
            if self._norms:
                raw[:, NORM] = torch.linalg.vector_norm(block, dim=1)
        if self._ranges and self._norms:
            self._mend_overflow(run, block, raw)

    def _mend_overflow(self, run: _Run, block: Tensor, raw: Tensor) -> None:
        """Take the norm from the scaled sample where squares leave the range of the dtype although all values are inside.

        In float32 that is above 1.8e19 and below 1e-19. Exact for tensors that the sample holds whole, an estimate
        for larger ones.
        """
        largest = torch.maximum(raw[:, LOW].abs(), raw[:, HIGH].abs())
        norm = (
            torch.linalg.vector_norm(block / largest.clamp(min=torch.finfo(self.dtype).tiny)[:, None], dim=1) * largest
        )
        if not run.whole:
            norm *= (self._upload("now", self._numel)[run.first : run.first + run.rows] / run.size).sqrt()
        lost = (
            (raw[:, NORM].isinf() | (raw[:, NORM] < torch.finfo(self.dtype).tiny ** 0.4))
            & largest.isfinite()
            & (largest > 0)
        )
        raw[:, NORM] = torch.where(lost, norm, raw[:, NORM])

    def _fold_moments(self) -> None:
        """Combine the moments of two sets (Chan, Golub and LeVeque 1979); the fourth without its cross terms."""
        raw, gathered, used = self._raw, self._gathered, len(self.rows)
        before, now = self._upload("before", self._total_numel), self._upload("now", self._numel)
        means = gathered[:used, TOTAL] / before.clamp(min=1), raw[:used, TOTAL] / now.clamp(min=1)
        both = before * now / (before + now).clamp(min=1)
        gathered[:used, SQUARES] += raw[:used, SQUARES] + (means[1] - means[0]).square() * both
        gathered[:used, FOURTHS] += raw[:used, FOURTHS]

    def _upload(self, name: str, values: list[int]) -> Tensor:
        """Counts that the host knows, on the device; sent again only when they change, and without waiting."""
        known = self._uploads.get(name)
        if known is not None and known[0] == values:
            return known[1]
        sent = stats.upload(values, self.dtype, self.device)
        self._uploads[name] = (list(values), sent)
        return sent

    def scalars(self, names: Sequence[str]) -> Tensor:
        """Return the finished statistics `names` of all rows, a fresh tensor of shape (rows, names)."""
        used = len(self.rows)
        gathered = self._gathered[:used]
        low, high = gathered[:, LOW], gathered[:, HIGH]
        columns = []
        for name in names:
            if name == "min":
                column = low
            elif name == "max":
                column = high
            elif name == "absmax":
                column = torch.maximum(low.abs(), high.abs())
            elif name == "nonfinite":
                column = torch.maximum(stats.nonfinite_level(low), stats.nonfinite_level(high))
            elif name == "nonfinite_masked":
                column = stats.nonfinite_level(high.clamp(min=0))  # -Inf in a mask is healthy
            elif name == "mean":
                column = gathered[:, TOTAL] / self._upload("numel", self._total_numel)
            elif name == "rms":
                column = gathered[:, NORM] / self._upload("numel", self._total_numel).sqrt()
            elif name == "std":
                column = (gathered[:, SQUARES] / self._upload("numel", self._total_numel)).sqrt()
            elif name == "kurtosis":
                column = gathered[:, FOURTHS] * self._upload("numel", self._total_numel) / gathered[:, SQUARES].square()
            elif name == "nonfinite_count":
                column = gathered[:, BAD]
            else:
                assert name == "zero_fraction", name
                column = self._counts_by_bin[:used, stats.ZERO] / self._upload("sampled", self._total_sampled)
            columns.append(column.to(self.dtype))
        return torch.stack(columns, dim=1)

    def histograms(self) -> Tensor:
        """Return the bin counts of all rows, int64, a fresh tensor of shape (rows, `stats.BINS`)."""
        counts = self._counts_by_bin[: len(self.rows), : stats.BINS].clone()
        counts[:, stats.BINS // 2] += self._counts_by_bin[: len(self.rows), stats.ZERO]
        return counts

    def clear(self) -> None:
        """Forget what was gathered; rows stay."""
        self._gathered.copy_(self._fresh)
        self._counts_by_bin.zero_()
        self._total_numel, self._total_sampled = [0] * len(self.rows), [0] * len(self.rows)

    def copy_gathered(self, source: int, target: int) -> None:
        """Let a row start from what another one has gathered in earlier passes of this step."""
        self._gathered[target].copy_(self._gathered[source])
        self._counts_by_bin[target].copy_(self._counts_by_bin[source])
        self._total_numel[target] = self._total_numel[source]
        self._total_sampled[target] = self._total_sampled[source]
