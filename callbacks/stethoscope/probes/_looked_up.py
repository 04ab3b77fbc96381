"""What embeddings are asked for: how often each row, in training and elsewhere, and whether it is one row for all."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

FEWEST = 8
"""Items of which one row for all says anything."""
ENOUGH = 10
"""Training observations before anything is compared."""
EDGE = 0.5
"""Share of the sequences that begin or end with a row, from which it is padding or a mark, and as frequent as sequences are short."""
MOST_ROWS = 2**18


class LookedUp:
    """Counts the rows that one embedding is asked for, in sequences; notes a single one that all items ask for."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._counts: dict[str, Tensor] = {}  # phase to (2, rows): everywhere, at the edges
        self._items: Counter[str] = Counter()
        self._seen = 0
        self._one: Tensor | None = None
        self._same: Tensor | None = None

    def take(self, x: Tensor, phase: str) -> None:
        """Look at one call: (items,) or (items, length) whole numbers."""
        items = x.reshape(len(x), -1)
        if items.shape[1] == 1 and len(items) >= FEWEST and phase == "train":
            before, self._one = self._one, items[0].clone()
            if before is not None and before.device == items.device:
                same = (items == before).all()
                self._same = same if self._same is None else self._same & same
        elif items.shape[1] > 2 and self._rows <= MOST_ROWS:
            known = self._counts.get(phase)
            if known is None or known.device != x.device:
                known = torch.zeros(2, self._rows, device=x.device)
            for row, part in enumerate((items, items[:, [0, -1]])):
                flat = part.reshape(-1).clamp(0, self._rows - 1).long()
                known[row].scatter_add_(0, flat, torch.ones(len(flat), device=x.device))
            self._counts[phase] = known
            self._items[phase] += len(items)
            self._seen += phase == "train"

    def one_row(self) -> Tensor | None:
        """1 where all calls of (items,) since the last reading asked for one row, the one of the observation before."""
        same, self._same = self._same, None
        return None if same is None else same.float()

    def excess(self, phase: str) -> Tensor | None:
        """(3,): of the row that has become more frequent than in training by most: its share here, there, and which it is.

        None in training, and while too little was seen. Rows at the edges of half of the training sequences are left out.
        """
        train = self._counts.get("train")
        here = self._counts.pop(phase, None) if phase != "train" else None
        if here is None or train is None or self._seen < ENOUGH or here.device != train.device:
            return None
        now, before = here[0] / here[0].sum(), train[0] / train[0].sum()
        inner = train[1] < EDGE * self._items["train"]
        row = torch.where(inner, now - before, -1.0).argmax()
        return torch.stack([now[row], before[row], row.float()])
