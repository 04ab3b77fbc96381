"""Where flags are kept until they are read: two numbers per tensor, in order of arrival."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, aminmax

from stethoscope import stats

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROWS = 256
SMALL = 4096
"""Values up to which tensors are put off, to be read together; also up to which `aminmax`, the cheaper call, beats `sum`,
the cheaper loop (measured on a CPU, torch 2.13)."""


class Tape:
    """Rows of two numbers, low and high, handed out one after the other; they stay allocated.

    A row is a column of the table, since a CPU goes along a long dimension several times faster than along a short one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.used = 0
        self._table = self._rows(_ROWS)
        self._views: list[tuple[Tensor, Tensor]] = []

    def _rows(self, count: int) -> Tensor:
        with torch.inference_mode(mode=False):
            return torch.full((2, count), -torch.inf, dtype=torch.float32, device=self.device)

    def _reserve(self, count: int) -> int:
        first = self.used
        self.used += count
        if self.used > self._table.shape[1]:
            grown = self._rows(2 * self.used)
            grown[:, :first] = self._table[:, :first]
            self._table, self._views = grown, []
        return first

    def write(self, x: Tensor) -> int:
        """Take in one tensor and return its row. Gradients must be off."""
        row = self._reserve(1)
        if not self._views:
            self._views = list(zip(self._table[0].unbind(), self._table[1].unbind(), strict=True))
        if x.dtype is torch.float32 and 0 < x.numel() <= SMALL:
            aminmax(x, out=self._views[row])
            return row
        low = self._views[row][0]
        if x.dtype is torch.float32:
            torch.sum(x, dim=None, out=low)
        else:
            low.copy_(x.sum(dtype=torch.float32) if x.dtype in (torch.float16, torch.bfloat16) else x.sum())
        return row

    def write_together(self, alike: Sequence[Tensor]) -> int:
        """Take in tensors of one shape, float32, and return the first of their rows. Gradients must be off."""
        first = self._reserve(len(alike))
        rows = torch.stack(list(alike)).view(len(alike), -1)
        # along a dimension, two calls take a tenth of aminmax's time on a CPU
        torch.amin(rows, dim=1, out=self._table[0, first : self.used])
        torch.amax(rows, dim=1, out=self._table[1, first : self.used])
        return first

    def levels(self) -> Tensor:
        """`stats.nonfinite_level` of all used rows, and the same with -Inf taken for finite as in a mask, shape (2, rows)."""
        bounds = self._table[:, : self.used]
        torch.maximum(bounds[0], bounds[1], out=bounds[1])  # of a sum, high was left at -Inf
        # where -Inf is the largest value it is the smallest one too, so that nothing is lost
        bounds[1].clamp_(min=0)
        levels = stats.nonfinite_level(bounds)
        torch.maximum(levels[0], levels[1], out=levels[0])
        bounds[1].fill_(-torch.inf)
        return levels
