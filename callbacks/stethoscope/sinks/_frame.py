"""What makes a picture readable by itself: names beside the rows, steps below, a scale of its colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from PIL.ImageDraw import ImageDraw

_PAPER, _INK = (255, 255, 255), (32, 33, 36)
_GAP, _LINE = 8, 16  # pixels around and per line of text
_MIN_WIDTH = 420  # of the cells: what stands below them must fit
_LONGEST = 40  # characters of a layer's name


def frame(
    pixels: NDArray[np.uint8],
    layers: Sequence[str],
    title: str,
    steps: tuple[int, int],
    scale: Sequence[tuple[str, tuple[int, int, int]]],
) -> NDArray[np.uint8]:
    """Return the picture with its frame, shape `(height, width, 3)`; as it is where Pillow is not installed.

    Args:
        pixels: the cells, shape `(height, width, 3)`; each layer has the same number of rows.
        layers: their names, from top to bottom. As many are written as there is room for.
        title: one line.
        steps: of the first and the last column.
        scale: what each colour means.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:  # TensorBoard brings it along, W&B does not
        return pixels
    height, width, _ = pixels.shape
    tall = height / max(len(layers), 1)
    every = max(1, round(_LINE * 0.75 / tall + 0.49))
    names = {row: _short(layer) for row, layer in enumerate(layers) if row % every == 0}
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = 2 * _GAP + int(max((ruler.textlength(_plain(name)) for name in names.values()), default=0))
    top, below = _GAP + _LINE, 2 * _LINE + _GAP
    image = Image.new("RGB", (left + max(width, _MIN_WIDTH) + _GAP, top + height + below), _PAPER)
    image.paste(Image.fromarray(pixels), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((left, _GAP // 2), _plain(title), fill=_INK)
    for row, name in names.items():
        draw.text((left - _GAP, top + (row + 0.5) * tall), _plain(name), fill=_INK, anchor="rm")
    draw.text((left, top + height + 2), f"step {steps[0]}", fill=_INK)
    draw.text((left + width, top + height + 2), f"step {steps[1]}", fill=_INK, anchor="ra") if width > 130 else None
    _legend(draw, left, top + height + _LINE + _GAP // 2, scale)
    return np.asarray(image)


def _legend(draw: ImageDraw, x: float, y: float, scale: Sequence[tuple[str, tuple[int, int, int]]]) -> None:
    for words, colour in scale:
        draw.rectangle((x, y, x + 10, y + 10), fill=colour, outline=_INK)
        draw.text((x + 14, y + 5), words, fill=_INK, anchor="lm")
        x += 22 + draw.textlength(words)


def _short(name: str) -> str:
    """Leave out the middle of a long name: its beginning says which block, its end which layer."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2 - 3]}...{name[-(_LONGEST // 2) :]}"


def _plain(text: str) -> str:
    """Leave out what the built-in font cannot draw: without FreeType all beyond Latin-1, and line breaks."""
    return " ".join(text.encode("latin-1", "replace").decode("latin-1").split())
