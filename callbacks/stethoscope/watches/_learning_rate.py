"""`LearningRate`: a schedule that is over long before the run is, or begins to run backwards."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

WARM = 0.5  # share of the planned run at which a warm-up is long over: some percent of the run are usual
LEAST = 20  # steps: a cosine that is restarted comes close to zero for a few
BOTTOM, HALF, LEAP = 0.01, 0.5, 0.6
"""Shares of the peak: where a fall ends, where a rise is sure, what a restart takes at once."""
MIRROR = 2.0  # a cosine climbs behind its end as it fell before it; steps from half of the peak to nothing over those back to half


@dataclass(frozen=True)
class LearningRate:
    """Reports a learning rate that has gone to nothing while much of the planned run is left.

    **What it decides:** the largest learning rate of all parameter groups lies at or below `nothing` times its peak for 20 steps
    and `hold` of the planned run in a row, and at least `left` of the run is still to come. A group that is frozen by a
    rate of zero is fine while others learn.
    Or the rate has fallen to 1 % of its peak and climbs back to half of it, not at once as a restart does, and in more than twice
    the steps in which it first rose to its peak, as no cyclical schedule does, but in as many as it fell in (half to twice), as no warm-up of a
    second stage does: `CosineAnnealingLR` that goes on behind its end.
    Or, at the half of a planned run, the rate has only ever risen, and at that pace reaches the rate that its scheduler scales (`initial_lr` in the
    optimizer's groups) after the run is over: a warm-up that was counted for another run.
    **Findings:** `scheduler-ends-early`, `schedule-unfinished`. **Cost:** host only, O(1) per step. **Needs:** no probe; `planned_steps`.

    Args:
        nothing: share of the peak. Three cuts to a tenth each are usual, four are not.
        hold: share of the planned steps.
        left: share of the planned steps.

    Raises:
        ValueError: a number outside of (0, 1).

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay, series
        >>> plan = Record("plan/steps", 1000, 0, source="step")
        >>> found = replay(LearningRate(), [plan, *series(lr=[0.1] * 100 + [0.0] * 200)])
        >>> print(found[0].message)
        The learning rate is 0 since step 100, 0 % of its peak of 0.1, and 85 % of the run is left.
    """

    _: KW_ONLY
    nothing: float = 1e-4
    hold: float = 0.05
    left: float = 0.25

    def __post_init__(self) -> None:
        for name in ("nothing", "hold", "left"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in (0, 1), not {getattr(self, name)!r}.")

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """No learning rate seen."""
        start = {"plan": None, "peak": 0.0, "since": None, "told": False}
        return {
            **start,
            "first": None,
            "peaked": 0,
            "high": 0,
            "fell": 0,
            "bottom": None,
            "last": 0.0,
            "turned": False,
            "meant": None,
            "rises": None,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the records of one step."""
        rates = []
        for record in records:
            value = record.value
            if record.source != "step" or not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if record.name == "plan/steps":
                state = {**state, "plan": float(value)}
            elif record.name == "plan/lr":
                state = {**state, "meant": float(value)}
            elif record.name.partition("/")[0] == "lr":
                rates.append(float(value))
        if not rates:
            return state, ()
        rate, step, plan = max(rates), records[0].step, state["plan"]
        peak = max(state["peak"], rate)
        state, found = _warm_up(state, rate, step)
        if found:
            return {**state, "peak": peak}, found
        state, found = _turn(state, rate, step)
        if found:
            return {**state, "peak": peak}, found
        if not plan or not 0 <= rate <= self.nothing * peak or peak == 0:
            return {**state, "peak": peak, "since": None, "told": False}, ()
        since = step if state["since"] is None else state["since"]
        state = {**state, "peak": peak, "since": since}
        remains = 1 - (step + 1) / plan
        if state["told"] or step - since < max(LEAST, self.hold * plan) or remains < self.left:
            return state, ()
        finding = Finding(
            "scheduler-ends-early",
            "warning",
            f"The learning rate is {rate:.3g} since step {since}, {100 * rate / peak:.2g} % of its peak of {peak:.3g}, "
            f"and {100 * remains:.0f} % of the run is left.",
            "Compare the length of the schedule with the run: is it in epochs and stepped per step, or are gradients accumulated? "
            "If the run should end here, stop it.",
            step,
            evidence={"lr": rate, "peak": peak, "since": since, "left": remains},
        )
        return {**state, "told": True}, (finding,)


def _warm_up(state: State, rate: float, step: int) -> tuple[State, Sequence[Finding]]:
    """Whether a rate that has only risen so far gets to where it should within the run."""
    rises, plan, meant = state.get("rises"), state["plan"], state.get("meant")
    if rises is None:
        return {**state, "rises": [step, rate]}, ()
    if not rises or rate < state["last"]:
        return {**state, "rises": []}, ()
    if not plan or meant is None or step + 1 < WARM * plan:
        return state, ()
    pace = (rate - rises[1]) / max(1, step - rises[0])
    state = {**state, "rises": []}
    if pace <= 0 or rate >= meant or step + (meant - rate) / pace < plan:
        return state, ()
    ends = step + (meant - rate) / pace
    finding = Finding(
        "schedule-unfinished",
        "warning",
        f"Half of the run is over, and the learning rate is still warming up: {rate:.3g}, {100 * rate / meant:.2g} % of {meant:.3g}, which it reaches at "
        f"about step {ends:,.0f} of {plan:,.0f}.",
        "Count the warm-up for this run: some percent of its steps; is it in epochs and stepped per step, or from the recipe of a longer one?",
        step,
        evidence={"lr": rate, "meant": meant, "reached_at": ends},
    )
    return state, (finding,)


def _turn(state: State, rate: float, step: int) -> tuple[State, Sequence[Finding]]:
    """Whether a rate that had fallen to nothing climbs back as slowly."""
    peak, last, bottom = state["peak"], state["last"], state["bottom"]
    first = step if state["first"] is None else state["first"]
    peaked = step if rate > peak else state["peaked"]
    high, fell = state.get("high", 0), state.get("fell", 0)
    if rate <= BOTTOM * peak:
        fell = step if bottom is None else fell
        bottom = step
    elif rate < last or rate - last > LEAP * peak:  # falls on, or is restarted
        bottom = None
    risen = bottom is not None and rate >= HALF * peak > 0
    mirrored = risen and fell - high <= MIRROR * (step - bottom) and step - bottom <= MIRROR * (fell - high)
    high = step if rate >= HALF * peak else high
    state = {
        **state,
        "first": first,
        "peaked": peaked,
        "high": high,
        "fell": fell,
        "bottom": None if risen else bottom,
        "last": rate,
    }
    if state["turned"] or not mirrored or step - bottom <= 2 * (peaked - first):
        return state, ()
    finding = Finding(
        "scheduler-ends-early",
        "warning",
        f"The learning rate fell to nothing at step {bottom} and climbs again: {rate:.3g}, {100 * rate / peak:.0f} % of its peak of {peak:.3g}.",
        "CosineAnnealingLR runs backwards behind its T_max: set T_max to the number of calls of scheduler.step(), or use "
        "CosineAnnealingWarmRestarts if the rate shall start again.",
        step,
        evidence={"lr": rate, "peak": peak, "since": bottom},
    )
    return {**state, "turned": True}, (finding,)
