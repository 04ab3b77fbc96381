"""Schedules that act at certain steps, and what becomes of them in a run of a given length. Standard library only.

Shared by `audits.plan` (before the run) and `watches.Sparsity` (in the loop).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from stethoscope._record import Finding

Verdict: TypeAlias = Literal["reached", "unfinished", "never starts"]


@dataclass(frozen=True)
class Schedule:
    """Something that acts between two counts of optimizer steps: sparsification, warm-up, unfreezing, a curriculum.

    Counts are optimizer steps made, as sparsifiers and schedulers count them: 1 after the first. Below `start` nothing
    happens; from `start` it acts on multiples of `interval`; from `stop` on it is complete, at every count.

    Args:
        name: what it is called in findings.
        start: first count at which it may act.
        stop: count at which it is complete.
        interval: between start and stop it acts when `count % interval == 0`.

    Raises:
        ValueError: start after stop, a negative count, an interval below one.

    Examples:
        >>> Schedule("sparsify", 2500, 8000, 50).last_action(2549)
        2500
    """

    name: str
    start: int
    stop: int
    interval: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(
                f"Schedule {self.name!r} starts at {self.start} and stops at {self.stop}. Legal: 0 <= start <= stop, in optimizer steps."
            )
        if self.interval < 1:
            raise ValueError(f"Schedule {self.name!r} has interval {self.interval}. Legal: 1 or more optimizer steps.")

    def last_action(self, count: float) -> float | None:
        """The last count, up to this one, at which it acted; None if it never did."""
        if count >= max(self.stop, 1):
            return count
        last = count - count % self.interval
        return last if last >= max(self.start, 1) else None

    def progress(self, count: float) -> float:
        """How far its last action has brought it, in [0, 1]: the share of the way from start to stop."""
        last = self.last_action(count)
        if last is None:
            return 0.0
        return 1.0 if last >= self.stop else (last - self.start) / (self.stop - self.start)

    def density(self, count: float, target: float, exponent: float = 3.0) -> float:
        """Density that a sparsifier has reached: `a + (1 - a) * target`, `a = (1 - progress) ** exponent`.

        References: Zhu and Gupta 2017, arXiv:1710.01878 (the cubic schedule); RNNoise and LPCNet use the same.
        """
        dense: float = (1 - self.progress(count)) ** exponent
        return dense + (1 - dense) * target


class Fate(NamedTuple):
    """What becomes of a schedule.

    Args:
        verdict: complete at the end, begun but not complete, or without effect.
        progress: of its last action, in [0, 1].
        last_action: count of its last action, None for none.
        largest_start: the largest start that would still act.
        largest_stop: the largest stop that would be complete.
    """

    verdict: Verdict
    progress: float
    last_action: float | None
    largest_start: float
    largest_stop: float


def fate(schedule: Schedule, steps: float) -> Fate:
    """What becomes of a schedule in a run of so many optimizer steps; `math.inf` for a run without end."""
    last = schedule.last_action(steps)
    verdict: Verdict = "never starts" if last is None else "reached" if steps >= schedule.stop else "unfinished"
    largest_start = steps if math.isinf(steps) else steps - steps % schedule.interval
    return Fate(verdict, schedule.progress(steps), last, largest_start, steps)


def judge(schedule: Schedule, steps: float, step: int | None = None) -> list[Finding]:
    """Findings on a schedule in a run of so many steps; `step` is when it was judged."""
    result = fate(schedule, steps)
    evidence = {
        "start": schedule.start,
        "stop": schedule.stop,
        "interval": schedule.interval,
        "planned_steps": steps,
        "largest_start": result.largest_start,
        "largest_stop": result.largest_stop,
        "progress": result.progress,
    }
    where = f"'{schedule.name}' ({schedule.start} to {schedule.stop}, every {schedule.interval} steps)"
    if result.verdict == "never starts":
        why = (
            f"no multiple of {schedule.interval} lies between its start and the end"
            if steps >= schedule.start
            else "it would start after the end"
        )
        return [
            Finding(
                "schedule-unreachable",
                "error",
                f"{where} never acts in the {steps:g} optimizer steps of this run: {why}.",
                _way_out(schedule, result),
                step=step,
                evidence=evidence,
            )
        ]
    if result.verdict == "unfinished":
        return [
            Finding(
                "schedule-unfinished",
                "warning",
                f"{where} is {result.progress:.0%} of its way when the {steps:g} optimizer steps of this run are over; its last action is at {result.last_action:g}.",
                _way_out(schedule, result),
                step=step,
                evidence=evidence,
            )
        ]
    return []


def _way_out(schedule: Schedule, result: Fate) -> str:
    steps = result.largest_stop
    if steps < 1:
        return "Make at least one step."
    same_share = int(schedule.start * steps / schedule.stop)
    same_share -= same_share % schedule.interval
    act = (
        f"a start above {result.largest_start:g} never acts"
        if result.largest_start
        else f"no multiple of the interval {schedule.interval} is reached: lower it"
    )
    return (
        f"Set stop to at most {steps:g} and start to {same_share} (the same share of the way; {act}), "
        f"or make at least {schedule.stop} steps."
    )
