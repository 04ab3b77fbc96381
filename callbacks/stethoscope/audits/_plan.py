"""Schedules against the steps that a run will really make."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stethoscope._record import Finding, Report
from stethoscope._schedule import Schedule, Verdict, fate, judge


@dataclass(frozen=True, kw_only=True)
class PlanReport(Report):
    """What becomes of a schedule.

    Args:
        verdict: `"reached"`, `"unfinished"` or `"never starts"`.
        ends_dense: whether the run ends as if there were no schedule: it never acts, or only where it changes nothing
            yet (a sparsifier's first action at `start` keeps all weights).
        progress: share of the way from start to stop at its last action, in [0, 1].
        last_action: count of optimizer steps at its last action, None for none.
        largest_start: the largest start that would still act, in optimizer steps.
        largest_stop: the largest stop that would be complete, in optimizer steps.
    """

    verdict: Verdict = "reached"
    ends_dense: bool = False
    progress: float = 1.0
    last_action: float | None = None
    largest_start: float = 0
    largest_stop: float = 0


def plan(schedule: Schedule, planned_steps: float, *, restarted_at: int = 0) -> PlanReport:
    """Say whether a schedule is complete, unfinished or without effect at the end of a run.

    **Decides:** complete when `planned_steps >= stop`; else it acts at the multiples of `interval` from `start` on.
    **Cost:** none to speak of; host.

    Args:
        schedule: what is to act when, in optimizer steps made.
        planned_steps: optimizer steps that the run will make in all, see `audits.planned_steps`; Lightning's
            `trainer.estimated_stepping_batches` may be given as it is; infinity for a run without end.
        restarted_at: optimizer steps that were made before the schedule's own counter began anew, as in a resumed run
            whose sparsifier does not restore its counter; 0 where it never does.

    Raises:
        ValueError: planned_steps is negative or no number, or restarted_at is not within it.

    Examples:
        >>> from stethoscope.audits import Schedule, plan
        >>> report = plan(Schedule("sparsify", 2500, 8000, 50), 1200)
        >>> report.verdict, report.ends_dense, report.largest_stop
        ('never starts', True, 1200)
    """
    if not planned_steps >= 0:
        raise ValueError(f"planned_steps is {planned_steps}. Legal: 0 or more optimizer steps, math.inf for no end.")
    if not 0 <= restarted_at <= planned_steps:
        raise ValueError(f"restarted_at is {restarted_at}. Legal: 0 to planned_steps ({planned_steps}).")
    left = planned_steps - restarted_at
    result = fate(schedule, left)
    findings = judge(schedule, left)
    if restarted_at:
        again = (
            f"it does not act again before {schedule.start} further steps, of {left:g}, and what it had done wears off "
            "meanwhile (an optimizer refills pruned weights within one step)"
            if schedule.start
            else f"it makes its way of {schedule.stop} steps a second time"
        )
        findings.append(
            Finding(
                "schedule-restarted",
                "warning",
                f"The counter of '{schedule.name}' begins anew after {restarted_at} steps: {again}.",
                "Restore the counter of what acts (sparsifier, scheduler)"
                + (f", or set start to 0 and stop to at most {left:g} for the resumed run." if schedule.start else "."),
                evidence={"restarted_at": restarted_at, "steps_left": left, "start": schedule.start},
            )
        )
    ends_dense = result.last_action is None or result.progress == 0.0
    text = f"{result.verdict}: {result.progress:.0%} of the way at the end"
    return PlanReport(
        title=f"schedule '{schedule.name}' {schedule.start} to {schedule.stop} every {schedule.interval}, {planned_steps:g} steps",
        summary=text + (", without effect" if ends_dense else ""),
        findings=tuple(findings),
        verdict=result.verdict,
        ends_dense=ends_dense,
        progress=result.progress,
        last_action=result.last_action,
        largest_start=result.largest_start,
        largest_stop=result.largest_stop,
    )


def planned_steps(
    *,
    epochs: float,
    batches: int | None = None,
    items: int | None = None,
    batch_size: int | None = None,
    drop_last: bool = False,
    accumulate: int = 1,
    flush: bool = False,
    max_steps: float | None = None,
) -> float:
    """Optimizer steps that a run will make.

    **Formula:** batches = items / batch_size, rounded down with `drop_last` and up without; steps = epochs *
    batches / accumulate, rounded down per run, or per epoch and up with `flush`; at most `max_steps`.

    Args:
        epochs: passes over the data; `math.inf` where only `max_steps` ends the run.
        batches: batches per epoch, `len(loader)`; per rank in distributed training.
        items: instead of batches: items per epoch (per rank).
        batch_size: items per batch.
        drop_last: whether an incomplete last batch is dropped.
        accumulate: batches per optimizer step. Where a loop counts batches anew in each epoch and drops the rest, give
            batches without that rest: `batches=len(loader) // accumulate * accumulate`.
        flush: whether each epoch ends with a step, as with Lightning and transformers.
        max_steps: limit; None or -1 for none.

    Raises:
        ValueError: neither batches nor items with batch_size, or a count below one.

    Examples:
        >>> planned_steps(epochs=3, items=1000, batch_size=128, drop_last=True)
        21
    """
    if batches is None:
        if items is None or batch_size is None:
            raise ValueError("Give batches (per epoch), or items and batch_size.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}. Legal: 1 or more.")
        batches = items // batch_size if drop_last else -(-items // batch_size)
    if accumulate < 1 or batches < 0 or epochs < 0:
        raise ValueError(
            f"Got epochs={epochs}, batches={batches}, accumulate={accumulate}. Legal: accumulate from 1, the others from 0."
        )
    if math.isnan(epochs) or (math.isinf(epochs) and not batches):
        raise ValueError(f"Got epochs={epochs}, batches={batches}: the number of steps is not determined.")
    steps = epochs * -(-batches // accumulate) if flush else epochs * batches / accumulate
    if max_steps is not None and max_steps >= 0:
        steps = min(steps, max_steps)
    return steps if math.isinf(steps) else math.floor(steps)
