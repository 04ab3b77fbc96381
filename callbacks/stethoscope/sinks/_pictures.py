"""The pictures of a run: one for each statistic that tells how large things are, layers by steps."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.sinks._picture import Picture

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from stethoscope._record import Record

_SHOWN = ("/rms", "/norm", "/update_ratio")
"""Ends of the names that get a picture: what is never negative and spans decades over depth."""


class Painted(NamedTuple):
    """A finished picture: what of, pixels of shape `(height, width, 3)`, how to read it, layers from top to bottom."""

    name: str
    pixels: NDArray[np.uint8]
    text: str
    layers: Sequence[str]


class Pictures:
    """Collects the training's records and paints, more and more rarely."""

    def __init__(self) -> None:
        self._pictures: defaultdict[str, Picture] = defaultdict(Picture)
        self._place: dict[str, int] = {}

    def order(self, modules: Sequence[tuple[str, str]]) -> None:
        """Take the order of the layers from the model; gradients, for one, are measured from the last to the first."""
        self._place = {name: place for place, (name, _) in enumerate(modules)}

    def add(self, step: int, records: Sequence[Record]) -> Iterator[Painted]:
        """Take in one delivery; hand over the pictures that are due."""
        columns: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for record in records:
            if (
                record.module
                and record.name.endswith(_SHOWN)
                and record.phase == "train"
                and isinstance(record.value, float)
            ):
                layer = f"{record.module}#{record.call}" if record.call else record.module
                columns[record.name][layer] = record.value
        for name, column in columns.items():
            picture = self._pictures[name]
            picture.add(step, {layer: column[layer] for layer in sorted(column, key=self._depth)})
            if picture.due:
                yield self._painted(name)

    def last(self) -> Iterator[Painted]:
        """Hand over all of them, and start anew."""
        for name in list(self._pictures):
            yield self._painted(name)
        self._pictures.clear()

    def _depth(self, layer: str) -> int:
        name = layer.partition("#")[0]
        return self._place.get(name, self._place.get(name.rpartition(".")[0], 0))

    def _painted(self, name: str) -> Painted:
        picture = self._pictures[name]
        text, layers = picture.legend()
        return Painted(name, picture.framed(name), text, layers)
