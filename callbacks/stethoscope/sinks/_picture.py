"""A picture of one statistic: layers from top to bottom, steps from left to right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stethoscope.sinks._frame import frame

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAX_ROWS = 256
MAX_COLUMNS = 256
_FIRST_DUE = 16
_HEIGHT, _WIDTH = 384, 768
"""Pixels that few layers and steps are enlarged to, at most 16 x 16 for one cell."""

_MISSING = -1.0
_RAMP = np.array([[0.10, 0.08, 0.30], [0.13, 0.32, 0.55], [0.12, 0.58, 0.55], [0.55, 0.78, 0.30], [0.99, 0.92, 0.35]])
"""Small to large; its lightness rises evenly, so it can be read without colour vision."""
_ZERO = (0.0, 0.0, 0.0)
_NONE = (0.85, 0.85, 0.85)
_NON_FINITE = (1.0, 0.0, 1.0)
_SHADES = 253
"""With the three above, as many colours as a byte can name."""


class Picture:
    """Collects a statistic that is never negative, in bounded memory, and paints it.

    Holds 256 x 256 float32 values (256 KiB). When all columns are filled, neighbours are joined, and the larger value
    stays; NaN and Inf win over any number, so that they are never thinned away. Further layers than 256 are left out.
    """

    def __init__(self) -> None:
        self._cells = np.full((MAX_ROWS, MAX_COLUMNS), _MISSING, dtype=np.float32)
        self._rows: dict[str, int] = {}
        self._seen = 0
        self._stride = 1
        self._steps = (0, 0)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add the values of one step, by layer."""
        column = self._seen // self._stride
        if column == MAX_COLUMNS:
            half = np.maximum(self._cells[:, ::2], self._cells[:, 1::2])
            self._cells[:] = _MISSING
            self._cells[:, : MAX_COLUMNS // 2] = half
            self._stride *= 2
            column //= 2
        self._steps = (self._steps[0] if self._seen else step, step)
        self._seen += 1
        for layer in values:
            if len(self._rows) < MAX_ROWS:
                self._rows.setdefault(layer, len(self._rows))
        kept = {self._rows[layer]: value for layer, value in values.items() if layer in self._rows}
        rows = list(kept)
        new = np.array(list(kept.values()), dtype=np.float64)
        # float32 would turn a finite value beyond 3e38 into Inf.
        new = np.where(np.isfinite(new), np.minimum(new, 3e38), new)
        self._cells[rows, column] = np.maximum(self._cells[rows, column], new.astype(np.float32))

    @property
    def due(self) -> bool:
        """Whether to paint now: after 16, 32, 64 ... steps, so that painting costs less and less."""
        return self._seen >= _FIRST_DUE and self._seen & (self._seen - 1) == 0

    def paint(self) -> NDArray[np.uint8]:
        """Return RGB pixels, shape `(height, width, 3)`.

        The colour is the logarithm between the 1st and the 99th percentile: dark is small, yellow is large. Zero is black, a value that was not measured is grey, NaN and Inf are magenta.
        """
        cells = self._used()
        low, high = np.log10(self._range())
        logs = np.log10(np.where(np.isfinite(cells) & (cells > 0), cells, 1.0))
        place = (logs - low) / (high - low) if high > low else np.full(cells.shape, 0.5)
        colours = np.round(np.clip(place, 0, 1) * (_SHADES - 1)).astype(np.uint8)
        colours[cells == 0] = _SHADES
        colours[cells == _MISSING] = _SHADES + 1
        colours[~np.isfinite(cells)] = _SHADES + 2
        tall, wide = max(1, min(16, _HEIGHT // len(cells))), max(1, min(16, _WIDTH // cells.shape[1]))
        pixels: NDArray[np.uint8] = _palette()[colours.repeat(tall, axis=0).repeat(wide, axis=1)]
        return pixels

    def legend(self) -> tuple[str, list[str]]:
        """Return how to read it, in one line, and the layers from top to bottom."""
        low, high = self._range()
        columns = (
            f"{self._stride} observed steps each (the largest value)" if self._stride > 1 else "one observed step each"
        )
        text = (
            f"Columns: steps {self._steps[0]} to {self._steps[1]}, {columns}. "
            f"Colour: logarithm, dark up to {low:.3g}, yellow from {high:.3g}; black 0, grey not measured, magenta NaN or Inf."
        )
        return text, list(self._rows)

    def framed(self, title: str) -> NDArray[np.uint8]:
        """Return the picture with names, steps and scale around it."""
        low, high = self._range()
        middle = 10 ** ((np.log10(low) + np.log10(high)) / 2)
        marks = [(f"{value:.2g}", _RAMP[place]) for value, place in ((low, 0), (middle, len(_RAMP) // 2), (high, -1))]
        marks += [("0", np.array(_ZERO)), ("not measured", np.array(_NONE)), ("NaN, Inf", np.array(_NON_FINITE))]
        scale = [(words, (int(255 * r), int(255 * g), int(255 * b))) for words, (r, g, b) in marks]
        return frame(self.paint(), list(self._rows), title, self._steps, scale)

    def _used(self) -> NDArray[np.float32]:
        return self._cells[: max(1, len(self._rows)), : max(1, -(-self._seen // self._stride))]

    def _range(self) -> tuple[float, float]:
        cells = self._used()
        positive = cells[np.isfinite(cells) & (cells > 0)]
        if not positive.size:
            return 1.0, 1.0
        # One exploding layer must not make all the others look the same.
        low, high = np.percentile(positive, [1, 99])
        return float(low), float(high)


def _palette() -> NDArray[np.uint8]:
    places, anchors = np.linspace(0, 1, _SHADES), np.linspace(0, 1, len(_RAMP))
    shades = np.stack([np.interp(places, anchors, _RAMP[:, channel]) for channel in range(3)], axis=1)
    return np.round(np.vstack([shades, _ZERO, _NONE, _NON_FINITE]) * 255).astype(np.uint8)
