"""The evaluations of a run so far, as blocks of equal weight, and whether they climb by more than their own noise."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.watches._trend import line, student

if TYPE_CHECKING:
    from collections.abc import Sequence

LIMIT = 32
"""Blocks kept; when one more would come, neighbours are merged: a block is never less than about 1/32 of a long run."""
SHARE = 0.02
"""Of the planned run: steps that a block lasts at least, so that a validation at every step is not judged step by step."""
CLEAR = 4.0
"""Standard deviations that a climb must exceed: the lowest of twenty noisy values lies 1.9 below their mean."""
SCARE = 1.5
"""Times the largest climb that the run has come back from."""


class Block(NamedTuple):
    """Evaluations in a row, with the training since the evaluations before.

    Args:
        first, last: steps.
        seen: evaluations.
        value: mean loss.
        train: mean training loss.
        steps: values of the training loss.
        rate: mean accuracy in [0, 1], None where there is none.
    """

    first: int
    last: int
    seen: int
    value: float
    train: float
    steps: int
    rate: float | None


def push(blocks: Sequence[Block], size: int, span: float, new: Block) -> tuple[list[Block], int, bool]:
    """Take in one evaluation; return the blocks, evaluations per block, and whether the last block is complete."""
    last = blocks[-1] if blocks else None
    if last is not None and not _complete(last, size, span):
        blocks = [*blocks[:-1], _merged(last, new)]
    else:
        blocks = [*blocks, new]
    if len(blocks) > LIMIT:
        blocks = [blocks[0], *(_merged(a, b) for a, b in zip(blocks[1::2], blocks[2::2], strict=True))]
        size *= 2
    return list(blocks), size, _complete(blocks[-1], size, span)


def _complete(block: Block, size: int, span: float) -> bool:
    return block.seen >= size and block.steps >= span


def _merged(one: Block, other: Block) -> Block:
    count, steps = one.seen + other.seen, one.steps + other.steps
    rate = None
    if one.rate is not None and other.rate is not None:
        rate = (one.rate * one.seen + other.rate * other.seen) / count
    return Block(
        one.first,
        other.last,
        count,
        (one.value * one.seen + other.value * other.seen) / count,
        (one.train * one.steps + other.train * other.steps) / steps,
        steps,
        rate,
    )


def scare(values: Sequence[float]) -> float:
    """Return the largest climb above the best so far that a new best has followed; not from the first value.

    Examples:
        >>> scare([9.0, 4.0, 6.0, 3.0, 3.5])
        2.0
    """
    best, climb, largest = math.inf, 0.0, 0.0
    for value in values[1:]:
        if value < best:
            best, climb, largest = value, 0.0, max(largest, climb)
        climb = max(climb, value - best)
    return largest


def climbs(values: Sequence[float], best: float) -> bool:
    """Whether values, those after the best one, end above it by more than their own noise.

    A line is fitted to them. Its end must lie above `best` by more than `max(4, t(0.95, n - 2))` standard deviations of the
    residuals.
    """
    if len(values) < 3:
        return False
    at = list(range(len(values)))
    slope, residuals = line(at, values)
    freedom = len(values) - 2
    noise = math.sqrt(math.fsum(r * r for r in residuals) / freedom)
    end = math.fsum(values) / len(values) + slope * (len(values) - 1) / 2
    return end - best > max(CLEAR, student(0.95, freedom)) * noise
