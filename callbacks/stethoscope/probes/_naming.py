"""The names of flags on a tape: which rows belong to which key."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from stethoscope._protocols import Columns, Key
from stethoscope.stats import upload

if TYPE_CHECKING:
    from collections.abc import Sequence


class Column(NamedTuple):
    """One kind of flag: its keys, where each is found, and how rows of one key are joined if it has several."""

    masked: bool  # which of `Tape.levels`
    keys: list[Key]
    rows: list[int]
    join: tuple[Tensor, Tensor] | None
    sparse: bool

    def read(self, levels: Sequence[Tensor]) -> Columns:
        level = levels[self.masked]
        if self.join is None:
            return Columns(self.keys, level, self.rows, self.sparse)
        rows, keys = self.join
        joined = level.new_zeros(len(self.keys)).scatter_reduce_(0, keys, level[rows], "amax")
        return Columns(self.keys, joined, range(len(self.keys)), self.sparse)


class Naming:
    """Collects keys and rows of one column; a key comes several times when a step has several micro-batches."""

    def __init__(self, *, masked: bool, sparse: bool) -> None:
        self.masked, self.sparse = masked, sparse
        self.places: dict[Key, list[int]] = {}

    def add(self, key: Key, row: int) -> None:
        self.places.setdefault(key, []).append(row)

    def column(self, device: torch.device) -> Column:
        rows = [row for several in self.places.values() for row in several]
        join = None
        if len(rows) > len(self.places):
            keys = [i for i, several in enumerate(self.places.values()) for _ in several]
            join = upload(rows, torch.int64, device), upload(keys, torch.int64, device)
        return Column(self.masked, list(self.places), rows, join, self.sparse)
