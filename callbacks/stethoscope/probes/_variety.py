"""How many different items there are among all that were observed lately."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope import stats
from stethoscope.probes._repeats import FEWEST_ITEMS, FEWEST_VALUES, fingerprints
from stethoscope.probes._thinned import thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

KEPT = 32
"""Observed batches that are remembered."""
FEWEST = 10
"""Of them before anything is said."""
LOOKED = 16, 256
"""Items, and values of each, by which data are told from codes."""


class Variety:
    """Remembers numbers of 64 bits that stand for items, in training and elsewhere.

    Only items of eight different values and more count: one-hot states, masks and short codes come again by right.
    """

    def __init__(self) -> None:
        self._names: deque[Tensor] = deque(maxlen=KEPT)
        self._elsewhere: deque[Tensor] = deque(maxlen=KEPT)
        self._last: weakref.ref[Tensor] | None = None
        self._kept = False
        self._fresh = False
        self._taken = 0

    def holds(self, x: Tensor) -> bool:
        """Whether this very tensor was the last batch in training."""
        return self._last is not None and self._last() is x

    def take(self, x: Tensor, phase: str) -> None:
        """Look at one batch, (items, ...); the tensor itself, so that one that is kept can be told from one that is made anew."""
        if len(x) < FEWEST_ITEMS or x[0].numel() < FEWEST_VALUES:
            return
        if phase == "train":
            self._kept = self.holds(x)
            self._last = weakref.ref(x)
        names, _ = fingerprints(x.detach(), 0)
        rich = _is_rich(x.detach())
        # plain items get names that never come again
        names = torch.where(rich, names, torch.arange(self._taken, self._taken + len(names), device=names.device))
        self._taken += len(names)
        (self._names if phase == "train" else self._elsewhere).append(names)
        self._fresh = self._fresh or phase == "train"

    def read(self) -> Tensor | None:
        """(5,): items, different ones among them, and in the last batch; different ones in other phases; 1 where that batch is a tensor that is kept.

        None where training has shown fewer than ten batches, or nothing new.
        """
        if not self._fresh or len(self._names) < FEWEST:
            return None
        self._fresh = False
        here = [names for names in self._names if names.device == self._names[-1].device]
        there = [names for names in self._elsewhere if names.device == here[-1].device]
        known = stats.upload([float(sum(map(len, here))), float(self._kept)], torch.float32, here[-1].device)
        elsewhere = _different(there) if there else torch.zeros_like(known[0])
        return torch.stack([known[0], _different(here), _different(here[-1:]), elsewhere, known[1]])


def _different(batches: Sequence[Tensor]) -> Tensor:
    """How many different numbers there are; `unique` would ask the device how many it found."""
    ordered = torch.cat(list(batches)).sort().values
    return 1.0 + (ordered[1:] != ordered[:-1]).sum()


def _is_rich(x: Tensor) -> Tensor:
    """Whether most items hold eight different values or more."""
    items = x[: LOOKED[0]].reshape(min(len(x), LOOKED[0]), -1)
    ordered = thinned(items, LOOKED[1], 1).sort(1).values
    different = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
    return (different >= FEWEST_VALUES).float().mean() >= 0.5
