"""A result of validation that is one number, bit for bit, while the loss improves: it is not computed, or not from this model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Record

FEWEST = 4
"""Evaluations that must agree: of fewer, an honest result of few items may be the same by chance."""
ALONE = 20
"""Evaluations where the length of the run is unknown."""
SHARE = 0.5
"""Of the planned run: a recogniser has no sentence right for the first third of a good one."""
GAIN = 0.3
"""Share of its absolute value that a loss must have fallen by."""
GOOD = 0.9
"""Of an accuracy that has moved before: what is right this often, of a small set, is often the same number for the rest of the run."""
ECHOES = 3
"""Evaluations in a row whose loss is, bit for bit, that of the last training step, each another one."""

_HIGHER = re.compile(
    r"exact|em|match|matched|precision|map|mrr|ndcg|rouge|meteor|hits?|psnr|ssim|sdr|sisdr|snr|sisnr|pesq|stoi|kappa|mcc|r2|score"
)
_LOWER = re.compile(r"wer|cer|per|ter|eer|error|errors|rmse|mse|mae|mape|fid|ppl|perplexity")


class Streak(NamedTuple):
    """Equal values in a row.

    Args:
        value: that they have.
        seen: steps at which it came.
        first, last: steps.
        loss: in validation, at the first; None where there is none.
        trained: level of the training loss until the first; None where there is none.
        moved: whether there were other values before.
    """

    value: float
    seen: int
    first: int
    last: int
    loss: float | None
    trained: float | None
    moved: bool = False


def is_quality(bare: str, *, rate: bool) -> bool:
    """Whether a name stands for something that is better the larger it is.

    Examples:
        >>> is_quality("si_sdr_db", rate=False), is_quality("neg_si_sdr", rate=False), is_quality("wer", rate=False)
        (True, False, False)
    """
    words = names.tokens(bare)
    turned = {"neg", "negative", "minus", "loss", "error", "err"}
    return turned.isdisjoint(words) and (rate or any(map(_HIGHER.fullmatch, words)))


def stepped(state: State, records: Sequence[Record]) -> State:
    """Take in what a training step says: its loss, and once how many there will be."""
    for record in records:
        value = record.value
        if record.source != "step" or not isinstance(value, (int, float)) or value - value != 0.0:
            continue
        if record.name == "plan/steps":
            state = {**state, "planned": value}
        elif record.name == "loss" and record.phase == "train":
            total, count, level = state.get("trained", (0.0, 0, None))
            state = {**state, "trained": [total + value, count + 1, level], "latest": value}
    return state


def is_result(bare: str, value: float, *, rate: bool) -> bool:
    """Whether a name stands for what a model is judged by now, and the value is not the best that there is.

    Examples:
        >>> is_result("exact_match", 0.0, rate=False), is_result("wer", 0.0, rate=False), is_result("margin", 0.5, rate=False)
        (True, False, False)
        >>> is_result("best_acc", 0.8, rate=True)  # of all validations so far
        False
    """
    words = names.tokens(bare)
    if "best" in words:
        return False
    if rate or any(map(_HIGHER.fullmatch, words)):
        return value not in {1.0, 100.0}
    return value != 0.0 and any(map(_LOWER.fullmatch, words))


def follow(streak: Streak | None, value: float, step: int, loss: float | None, trained: float | None) -> Streak:
    """Take in one value."""
    if streak is None or streak.value != value:
        return Streak(value, 1, step, step, loss, trained, streak is not None)
    return streak._replace(seen=streak.seen + (step > streak.last), last=step)


def echo(before: Sequence[float], value: float, latest: float | None) -> list[float]:
    """Take in a loss of validation; return those in a row that were the last training loss, each another number.

    Examples:
        >>> echo([0.5], 0.4, 0.4), echo([0.5], 0.5, 0.5), echo([0.5, 0.4], 0.31, 0.3)
        ([0.5, 0.4], [0.5], [])
    """
    if value != latest:
        return []
    return list(before) if before and before[-1] == value else [*before[-ECHOES:], value]


def is_stuck(streak: Streak, loss: float | None, trained: float | None, planned: float, *, rate: bool = False) -> bool:
    """Whether the values are equal for long enough, while the loss of validation or of training has improved by much.

    Args:
        streak: of equal values.
        loss: in validation, now.
        trained: level of the training loss, now.
        planned: steps of the run, 0 where unknown.
        rate: whether it is an accuracy.
    """
    if rate and streak.moved and (GOOD <= streak.value <= 1 or streak.value >= 100 * GOOD):
        return False
    long = streak.last - streak.first >= SHARE * planned if planned else streak.seen >= ALONE
    return streak.seen >= FEWEST and long and (_improved(streak.loss, loss) or _improved(streak.trained, trained))


def _improved(then: float | None, now: float | None) -> bool:
    return then is not None and now is not None and then - now > GAIN * abs(then)
