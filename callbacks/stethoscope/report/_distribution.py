"""Histograms of layers over the steps of a run: an even choice of steps, decoded when all is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_EDGES = msgspec.json.Decoder(list[float])
_COUNTS = msgspec.json.Decoder(list[list[str | int | list[float]]])


class Shares(NamedTuple):
    """How the values of layers are distributed.

    Args:
        layers: names of modules.
        steps: the observed steps that were kept.
        edges: `bins + 1` increasing numbers, in the unit of the values.
        shares: share of the values in each bin, in [0, 1], float32, shape `(layers, steps, bins)`; NaN: not measured.
    """

    layers: tuple[str, ...]
    steps: tuple[int, ...]
    edges: tuple[float, ...]
    shares: NDArray[np.float32]


class Distribution:
    """Keeps histograms of up to `most` steps as they were written, the first and the last included.

    Args:
        most: steps.
    """

    def __init__(self, most: int = 24) -> None:
        self._most, self._stride = most, 1
        self._kept: dict[int, tuple[int, bytes]] = {}
        self._latest: tuple[int, bytes] = (-1, b"[]")
        self._edges = b""

    def add(self, step: int, values: msgspec.Raw, edges: msgspec.Raw) -> None:
        """Take in one delivery. Nothing is decoded; histograms with other edges than the first ones are left out."""
        text = bytes(edges)
        self._edges = self._edges or text
        if text != self._edges:
            return
        if step >= self._latest[0]:
            self._latest = (step, bytes(values))
        if step // self._stride in self._kept:
            return
        self._kept[step // self._stride] = (step, bytes(values))
        while len(self._kept) > self._most:
            self._stride *= 2
            halved: dict[int, tuple[int, bytes]] = {}
            for key in sorted(self._kept):
                halved.setdefault(key // 2, self._kept[key])
            self._kept = halved

    def shares(self, layers: Sequence[str]) -> Shares | None:
        """Decode what was kept of some layers; None where nothing can be read."""
        kept = {step: text for step, text in [*self._kept.values(), self._latest] if step >= 0}
        try:
            edges = _EDGES.decode(self._edges)
        except msgspec.DecodeError:
            return None
        place = {name: index for index, name in enumerate(layers)}
        bins, columns, steps = len(edges) - 1, [], []
        for step in sorted(kept):
            counts = np.full((len(layers), max(bins, 1)), np.nan)
            try:
                for name, row, *_ in _COUNTS.decode(kept[step]):
                    if name in place and isinstance(row, list) and len(row) == bins:
                        counts[place[name]] = np.nan_to_num(counts[place[name]]) + row  # calls are added up
            except (msgspec.DecodeError, ValueError, TypeError):
                continue
            columns.append(counts)
            steps.append(step)
        if not columns or bins < 1:
            return None
        stacked = np.stack(columns, axis=1)
        total = stacked.sum(axis=2, keepdims=True)
        shares = np.divide(stacked, total, out=np.full(stacked.shape, np.nan), where=total > 0)
        measured = ~np.isnan(shares).all(axis=(1, 2))
        filled = np.flatnonzero(np.nan_to_num(shares).max(axis=(0, 1), initial=0) > 0)
        if not filled.size:
            return None
        inside = slice(filled[0], filled[-1] + 1)
        names = tuple(name for name, there in zip(layers, measured, strict=True) if there)
        shown = shares[measured][:, :, inside].astype(np.float32)
        return Shares(names, tuple(steps), tuple(edges[filled[0] : filled[-1] + 2]), shown)
