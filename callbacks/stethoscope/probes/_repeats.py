"""Which items of a batch are copies of others, by numbers of 64 bits that stand for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stethoscope.probes._thinned import thinned

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST_ITEMS = 4
FEWEST_VALUES = 8
"""Of an item: fewer are alike by chance."""
MOST_ITEMS = 256
MOST_VALUES = 4096
"""Of an item and tensor that are looked at, evenly spread."""


class Repeats:
    """Counts copies within a batch, which of them the batch before has held as well, and items that hold nothing.

    Args:
        model: where it has dropout, a batch in which every item comes exactly twice does not count: R-Drop (Liang et al. 2021) and
            SimCSE (Gao et al. 2021) give both copies on purpose, to compare what dropout makes of them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._twice_is_fine = any(_drops(module) for module in model.modules())
        self._before: Tensor | None = None
        self._sums: Tensor | None = None

    def take(self, main: Tensor, others: Sequence[Tensor]) -> None:
        """Look at one call; an item is its part of all tensors, since a user with ten films is ten items.

        Args:
            main: (items, ...) whose constant items (padding, silence) do not count.
            others: of the same call; those with another first axis are left out.
        """
        count = len(main)
        others = [x for x in others if len(x) == count]
        if count < FEWEST_ITEMS or sum(x[0].numel() for x in (main, *others)) < FEWEST_VALUES:
            return
        names, constant = fingerprints(main, 0)
        for i, x in enumerate(others):
            names = names + fingerprints(x, i + 1)[0]
        blank = (constant & ((names[:, None] == names).sum(1) > 1)).float().mean()
        names = torch.where(constant, torch.arange(len(names), device=names.device), names)
        ordered = names.sort().values
        alike = ordered[0] == ordered[-1]
        copies = ordered[1:] == ordered[:-1]
        repeated = torch.where(alike, 1.0, copies.sum() / len(names))
        if self._twice_is_fine and len(names) % 2 == 0:
            half = len(names) // 2
            twice = (names[:half] == names[half:]).all() | (names[::2] == names[1::2]).all()
            twice &= copies.sum() == half  # and no more often
            repeated = torch.where(twice & ~alike, 0.0, repeated)
        returned = torch.zeros_like(repeated)
        if self._before is not None and self._before.device == names.device:
            again = copies & (ordered[1:, None] == self._before).any(1)
            returned = again.sum() / copies.sum().clamp(min=1)
        self._before = names
        found = torch.stack([torch.ones_like(repeated), repeated, returned, blank])
        moved = self._sums is not None and self._sums.device != found.device
        self._sums = found if self._sums is None or moved else self._sums + found

    def read(self) -> Tensor | None:
        """(3,): share of items that equal an earlier one (1 where all are alike), of these copies that came back, and of blank items.

        Blank is what is one number all over in the main tensor and equals another item in all of them: padding, rows that found no partner.
        """
        sums, self._sums = self._sums, None
        return None if sums is None else sums[1:] / sums[0]


def fingerprints(x: Tensor, salt: int) -> tuple[Tensor, Tensor]:
    """Return (items,) int64, equal where items are; (items,) whether all values of an item are the same."""
    items = x[:MOST_ITEMS].detach().reshape(min(len(x), MOST_ITEMS), -1)
    items = thinned(items, MOST_VALUES, 1)
    # -0.0 + 0.0 is 0.0: a product with a mask of zeros has both
    bits = (items.float() + 0.0).contiguous().view(torch.int32) if items.is_floating_point() else items
    bits = bits.to(torch.int64)
    # random weights make collisions as rare as 2^-63, sums that wrap around do not depend on the order of summation
    weights = torch.arange(1, bits.shape[1] + 1, device=x.device) + salt * 2**32
    for factor, shift in ((0x1E3779B97F4A7C15, 31), (0x3F58476D1CE4E5B9, 27), (0x14D049BB133111EB, 29)):
        weights = weights * factor
        weights = weights ^ (weights >> shift)
    return ((bits + 1) * weights).sum(1), (bits == bits[:, :1]).all(1)


def _drops(module: nn.Module) -> bool:
    # of layers, the rate is `p`; of recurrent and attention modules, `dropout`
    rate = getattr(module, "p" if "Dropout" in type(module).__name__ else "dropout", 0)
    return isinstance(rate, float) and rate > 0
