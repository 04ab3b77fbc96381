"""For how long a metric of validation must be without a value before that is worth a finding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stethoscope.watches import _metric_names as names
from stethoscope.watches._metric_stuck import is_result

if TYPE_CHECKING:
    from collections.abc import Mapping

ROUNDS = 5
"""Evaluations that it must be without one: a metric of every fifth is absent from four in a row, and few runs have a hundred."""
FEWEST = 3
"""Evaluations where the length of the run is known."""
SHARE = 0.5
"""Of the planned run, for these: what is computed now and then is computed more than once in a run, so that no gap is half of it."""


def lasts(rounds: int, since: int | None, step: int | None, planned: float) -> bool:
    """Whether evaluations in a row without a value are enough.

    Args:
        rounds: how many.
        since: step at which it had its last value, or else of the first of them.
        step: of the last of them.
        planned: steps of the run, 0 where unknown.

    Examples:
        >>> lasts(5, 0, 50, 0), lasts(3, 49, 199, 200), lasts(3, 49, 199, 1000)
        (True, True, False)
    """
    long = planned > 0 and since is not None and step is not None and step - since >= SHARE * planned
    return rounds >= ROUNDS or (rounds >= FEWEST and long)


def only_first(
    bare: str, entry: Mapping[str, Any], phase: Mapping[str, Any], count: int, step: int | None, planned: float
) -> bool:
    """Whether the first dictionary of a validation had a key, all later ones are alike, and none of them has it."""
    whole = phase["rounds"] == phase["n"] and len(phase["shapes"]) == 2
    alone = count == 1 and not entry["since"] and lasts(entry["absent"], phase["first"], step, planned)
    return whole and alone and not names.bookkeeping(bare)


def wanted(bare: str, train: Mapping[str, Any] | None, *, rate: bool) -> bool:
    """Whether the evaluation itself adds a result under this name.

    A model that has no such metric says None wherever its dictionary is logged, in training too.
    """
    return is_result(bare, 0.5, rate=rate) and (train is None or bare not in train["keys"])
