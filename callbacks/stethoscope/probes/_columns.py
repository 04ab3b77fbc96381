"""Whether the columns of the data are, in other phases, what they were in training."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stethoscope import stats

ENOUGH = 10
"""Training observations before anything is compared."""
SPREADS = 8.0
"""Standard deviations over training observations beyond which a column counts: with those of ten, chance goes there once in 50,000."""
FEWEST = 8
"""Values of a column from which it has a spread."""
CHANGED_DB, SHIFTED = 6.0, 1.0
"""How far a column counts as off: its spread by a factor of two, its mean by one spread."""


class _Moments(NamedTuple):
    """Sums over rows, per column: exact zeros are padding, masks, dropout or another category."""

    filled: Tensor
    total: Tensor
    squares: Tensor


class Column:
    """The columns of what one layer is given: Welford's means over training observations, sums over another phase.

    Two numbers per column and observation: the mean, and the spread (standard deviation) in dB.
    """

    def __init__(self) -> None:
        self._seen = 0
        self._mean: Tensor | None = None  # (2, columns)
        self._squares: Tensor | None = None
        self._sums: dict[str, _Moments] = {}

    def take(self, rows: Tensor, phase: str) -> None:
        """Add (rows, columns) of one call."""
        if rows.device.type != "mps":  # which has no float64
            rows = rows.double()  # a year or a price would lose its spread in the difference of two squares
        before = self._sums.get(phase)
        now = _Moments(rows.count_nonzero(0).to(rows.dtype), rows.sum(0), rows.square().sum(0))
        if before is not None and before.total.shape == now.total.shape and before.total.device == now.total.device:
            now = _Moments(before.filled + now.filled, before.total + now.total, before.squares + now.squares)
        self._sums[phase] = now

    def read(self, phase: str) -> Tensor | None:
        """Take in what training has shown, or compare with it.

        Returns:
            Outside of training, (4,): share of columns whose spread has changed, and the largest change (dB); share of columns whose mean has
            shifted, and the largest shift (in spreads). Columns that were constant at some observation are left out.
        """
        sums = self._sums.pop(phase, None)
        if sums is None:
            return None
        mean = sums.total / sums.filled
        spread = (sums.squares / sums.filled - mean.square()).clamp(min=0).sqrt()
        spread = torch.where(sums.filled < FEWEST, torch.nan, spread)
        now = torch.stack([mean, 20 * spread.log10()])
        known = self._mean is not None and self._mean.shape == now.shape and self._mean.device == now.device
        if phase == "train":
            self._learn(now, fresh=not known)
            return None
        if not known or self._seen < ENOUGH:
            return None
        return self._compare(now)

    def _learn(self, now: Tensor, *, fresh: bool) -> None:
        if fresh or self._mean is None or self._squares is None:
            self._seen, self._mean, self._squares = 1, now, torch.zeros_like(now)
            return
        self._seen += 1
        change = now - self._mean
        self._mean = self._mean + change / self._seen
        self._squares = self._squares + change * (now - self._mean)

    def _compare(self, now: Tensor) -> Tensor:
        assert self._mean is not None
        assert self._squares is not None
        noise = (self._squares / (self._seen - 1)).sqrt()
        off = now - self._mean
        scale = 10 ** (self._mean[1:] / 20)
        off, noise = (torch.cat([each[:1] / scale, each[1:]]) for each in (off, noise))
        usable = off.isfinite().all(0) & noise.isfinite().all(0)
        counts = (off.abs() > SPREADS * noise) & usable
        bars = stats.upload([SHIFTED, CHANGED_DB], off.dtype, off.device)[:, None]
        shares = (counts & (off.abs() > bars)).sum(1) / usable.sum().clamp(min=1)
        largest = torch.where(counts, off.abs(), torch.zeros_like(off)).amax(1)
        return torch.stack([shares[1].to(off.dtype), largest[1], shares[0].to(off.dtype), largest[0]]).float()
