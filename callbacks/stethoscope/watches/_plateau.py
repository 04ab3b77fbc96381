"""`Plateau`: a loss that has stopped falling."""

from __future__ import annotations

import math
import re
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches import _trend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

GROW = 0.5  # share of the steps since the last restart that the window covers: log-time, so power laws are not flagged
CONFIRM = 3  # closed blocks in a row: one block more or less must not decide
RISES = 2.0  # times what counts as improving, the other way: less than that is the noise of a flat loss
SHARE_OF_DROP = 0.015  # gain per patience: a run of ten patiences adds less than 15 % to what it reached
SHARE_OF_NOISE = 0.1  # in standard deviations of one step: what is smaller nobody sees, and stuck runs have no drop
DECIBELS = 0.5  # per patience, for unit="dB"
BLOCKS = 20  # per patience
FEWEST = 8  # blocks that a verdict needs
UNPLANNED = 1000  # steps of patience where the length of the run is unknown
SHORTEST = 20  # steps of patience in a planned run
LR_CHANGE = 2.0  # factor
HUGE = 1e100  # left out as infinite: squares of it would overflow, and no float32 is as large
LEFT = 0.5  # share of the planned run ahead for a warning: later, converged runs are as common as stuck ones
LEARNT = 0.1  # share of a positive loss: less was hardly learnt at all, and of the rest less is hardly left
NEVER = 3.0  # standard deviations of one step: what a loss that may be negative must fall by to have fallen
HIGH = 0.5  # share of the start, of a loss that was never below zero: more than this is left of what was to be learnt
SAME = 20  # values from the first on that are one number: no batch is like the other, and no update without effect
RISING_RATE = 1.05  # factor since the window began: a warm-up is under way


@dataclass(frozen=True)
class Plateau:
    """Reports a loss that has stopped falling, once it is confident of that.

    **What it decides:** the loss gains less than `min_improvement` per `patience` steps: a line is fitted to robust
    block means over the last `max(patience, half the run)`, and the upper confidence bound of its gain lies below
    `min_improvement` three blocks in a row; where the last half alone is undecided, the whole run is asked. Between "improving" and "stalled" there is "undecided", which says
    nothing, and so does a loss that rises: that is `Jumps`' business. A learning rate that changes by a factor of two and a planned step of `schedule` start the window anew,
    and while it still warms up (the first half of a planned run at most) nothing is judged. Adding a constant to the loss or scaling it changes nothing (unless `min_improvement` is given in its units), so
    negative losses are fine; NaN and missing steps are left out.
    **Finding:** `loss-plateau`; a warning, but info where at most half of the planned run or a step of `schedule` lies
    ahead: a converged run is as flat as a stuck one. Info, too, where several optimizers step (in a game of two the loss of one
    is no measure of progress) or where a loss that was never below zero has fallen to a tenth of its start. A warning at any time where it has hardly
    fallen at all (less than a tenth; if it may be negative, 3 standard deviations of one step, and of the means of the first half patience and of the end; an info if the model was trained before, as the
    weights of its normalisations tell, since fine-tuning starts near its end), where it has been flat for more than half of the
    planned run with more than half of its start left, and, at once, where its first 20 values are one number. **Cost:** host only, O(1) time and memory per step.
    **Needs:** no probe.

    Args:
        name: record to follow, a loss: lower is better.
        phase: `"train"`, `"val"`, ...; use one instance per phase.
        patience: steps, or a share of the planned steps such as `"10%"` (at least 20 steps). Where the plan is
            unknown, a share means `max(1000, share of the steps so far)`.
        min_improvement: smallest gain per patience that counts as improving, in units of the loss. None: 0.5 for
            `unit="dB"`, else the larger of 1.5 % of the drop since the first half patience and 0.1 standard
            deviations of a single step.
        unit: of the loss, for messages; `"dB"` also sets `min_improvement`.
        confidence: of the one-sided bound, in (0.5, 1).
        schedule: steps at which something is planned to change (learning rate, data, curriculum).

    Raises:
        ValueError: a patience that is neither steps nor a share, or a number out of its range.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> stuck = series(loss=[max(-10.0, 5.0 - step) for step in range(1000)])
        >>> print(replay(Plateau(unit="dB", patience=100), stuck)[0].message)
        loss gains 0 dB per 100 steps (95 % upper bound 0 dB < 0.5 dB), level -10 dB.

    References:
        Equivalence testing instead of "slope not significant": Schuirmann 1987, J. Pharmacokin. Biopharm. 15(6).
    """

    name: str = "loss"
    _: KW_ONLY
    phase: str = "train"
    patience: int | str = "10%"
    min_improvement: float | None = None
    unit: str = ""
    confidence: float = 0.95
    schedule: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _share(self.patience)
        if self.min_improvement is not None and not self.min_improvement > 0:
            raise ValueError(f"min_improvement must be positive or None, not {self.min_improvement!r}.")
        if not 0.5 < self.confidence < 1:
            raise ValueError(f"confidence must lie in (0.5, 1), not {self.confidence!r}.")
        object.__setattr__(self, "schedule", tuple(sorted(self.schedule)))

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """An empty run."""
        return {
            "plan": None,
            "lr": None,
            "last": None,
            "previous": None,
            "noise": None,
            "series": None,
            "began": None,
            "head": [0.0, 0],
            "best": None,
            "lr_began": None,
            "flat": 0,
            "stalled": None,
            "start": [],
            "low": None,
            "optimizers": 1,
            "pretrained": False,
            "never": False,
            "same": 0,
            "soft": False,
            "flat_from": None,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the records of one step; judge whenever a block is full."""
        for record in records:
            if record.name == "plan/steps" and isinstance(record.value, (int, float)):
                if record.value > 0 and record.value != state["plan"]:  # a resumed run says it again
                    state = {**state, "plan": record.value, "series": None}
            elif record.name == "plan/optimizers" and isinstance(record.value, (int, float)):
                state = {**state, "optimizers": record.value}
            elif record.name == "plan/pretrained" and (state["last"] is None or record.step <= state["last"]):
                # said again by a resumed run, it is about what this run has learnt itself
                state = {**state, "pretrained": record.value == 1.0}
            elif record.name == "lr" and isinstance(record.value, (int, float)) and math.isfinite(record.value):
                state = {**state, "lr": record.value}
        for record in records:
            if record.name != self.name or record.phase != self.phase or not isinstance(record.value, (int, float)):
                continue
            # The negation leaves out NaN as well.
            if not abs(record.value) < HUGE or (state["last"] is not None and record.step <= state["last"]):
                continue
            return self._take(state, record.step, float(record.value))
        return state, ()

    def _take(self, state: State, step: int, value: float) -> tuple[State, Sequence[Finding]]:
        state = self._restart(state, step)
        noise = state["noise"]
        if state["previous"] is not None:
            # 0.886 E|difference| is the standard deviation of independent normal steps.
            jump = 0.886 * abs(value - state["previous"])
            noise = jump if noise is None else noise + 0.02 * (min(jump, 5 * noise + 1e-12) - noise)
        series, closed = _trend.push(state["series"], step, value)
        low = value if state["low"] is None else min(value, state["low"])
        start = state["start"] if len(state["start"]) == 3 else [*state["start"], value]
        state = {**state, "last": step, "previous": value, "noise": noise, "series": series, "low": low, "start": start}
        if state["same"] is not None:
            state["same"] = state["same"] + 1 if value == state["start"][0] else None
            if state["same"] == SAME and state["stalled"] is None:
                return {**state, "stalled": value, "never": True}, (self._same(state, step, value),)
        return self._judge(state, step) if closed else (state, ())

    def _restart(self, state: State, step: int) -> State:
        lr, before = state["lr"], state["lr_began"]
        fresh = state["series"] is None
        changed = lr is not None and before is not None and not before / LR_CHANGE <= lr <= before * LR_CHANGE
        planned = not fresh and any(state["last"] < at <= step for at in self.schedule)
        if fresh or changed or planned:
            return {**self._fresh(state, step), "stalled": None if planned else state["stalled"]}
        return state if before is not None else {**state, "lr_began": lr}

    def _fresh(self, state: State, step: int) -> State:
        width = self._patience(state, step) // BLOCKS
        return {**state, "series": _trend.start(width), "began": step, "lr_began": state["lr"], "flat": 0}

    def _patience(self, state: State, step: int) -> int:
        share = _share(self.patience)
        if share is None:
            return int(self.patience)
        if state["plan"] is None:
            return max(UNPLANNED, int(share * step))
        return max(SHORTEST, int(share * state["plan"]))

    def _judge(self, state: State, step: int) -> tuple[State, Sequence[Finding]]:
        patience = self._patience(state, step)
        blocks = state["series"]["blocks"]
        at, level = blocks[-1]
        head, best = state["head"], state["best"]
        if not head[1] or at < patience / 2:
            head = [head[0] + level, head[1] + 1]
        best = level if best is None else min(best, level)
        state = {**state, "head": head, "best": best}
        age = step - state["began"]
        if age < patience or len(blocks) < FEWEST:
            return state, ()
        drop = max(0.0, head[0] / head[1] - best)
        enough = self._enough(drop, state["noise"] or 0.0)
        rounding = 1e-12 * max(abs(level), abs(best))
        if state["stalled"] is not None:
            return self._stays(state, step, patience, enough + rounding)
        seen = _trend.window(blocks, step - max(patience, GROW * age), FEWEST)
        trend = _trend.trend(seen, self.confidence)
        gain, high = -trend.slope * patience, -trend.low * patience
        if high >= enough + rounding > gain:
            # Undecided: a run that has been flat ever since the restart shows it sooner over all of its blocks.
            seen = blocks
            high = -_trend.trend(seen, self.confidence).low * patience
        rises = gain < -RISES * (enough + rounding)
        flat = state["flat"] + 1 if high < enough + rounding and not rises and not self._warms_up(state, step) else 0
        never = gain >= -(enough + rounding) and self._never_left(state, step, seen)
        if flat < CONFIRM and not never:
            return {**state, "flat": flat}, ()
        mean = sum(value for _, value in seen) / len(seen)
        state = {
            **state,
            "flat": 0,
            "stalled": mean,
            "never": state["never"] or never or self._hardly_left(state, mean),
        }
        state["flat_from"] = seen[0][0]
        finding = self._finding(state, step, self._numbers(state, step, seen, gain, high))
        return {**state, "soft": finding.severity == "info"}, (finding,)

    def _stays(self, state: State, step: int, patience: int, enough: float) -> tuple[State, Sequence[Finding]]:
        """Follow a loss that is stalled: it falls again, or what was an info lasts so long that it becomes a warning."""
        blocks = state["series"]["blocks"]
        if self._left(_trend.window(blocks, step - patience, FEWEST), state["stalled"], patience, enough):
            return {**self._fresh(state, step), "stalled": None, "soft": False}, ()
        if not state["soft"] or not self._too_high(state, step, blocks):
            return state, ()
        seen = _trend.window(blocks, state["flat_from"], FEWEST)
        trend = _trend.trend(seen, self.confidence)
        numbers = self._numbers(state, step, seen, -trend.slope * patience, -trend.low * patience)
        return {**state, "soft": False}, (self._finding(state, step, numbers),)

    def _numbers(
        self, state: State, step: int, seen: Sequence[Sequence[float]], gain: float, high: float
    ) -> dict[str, float]:
        """Evidence of a verdict."""
        head, noise = state["head"], state["noise"] or 0.0
        drop = max(0.0, head[0] / head[1] - state["best"])
        return {
            "gain": gain,
            "upper_bound": high,
            "min_improvement": self._enough(drop, noise),
            "patience": self._patience(state, step),
            "window": round(step - seen[0][0]),
            "level": state["series"]["blocks"][-1][1],
            "drop": drop,
            "noise": noise,
            "lr": state["lr"],
        }

    def _too_high(self, state: State, step: int, blocks: Sequence[Sequence[float]]) -> bool:
        """Whether more than half of the planned run has been flat, and half of the first loss is still there."""
        if state["plan"] is None or state["flat_from"] is None or state["pretrained"] or not state["low"] > 0:
            return False
        level = sum(value for _, value in blocks[-FEWEST:]) / FEWEST
        return bool(step + 1 - state["flat_from"] > LEFT * state["plan"] and level > HIGH * _first(state))

    def _never_left(self, state: State, step: int, seen: Sequence[Sequence[float]]) -> bool:
        """Whether half of the planned run has brought hardly anything, and its pace does not promise more of the rest."""
        judged = state["never"] or state["pretrained"]
        half = not judged and state["plan"] is not None and step + 1 >= (1 - LEFT) * state["plan"]
        least, first = (1 - LEARNT) * _first(state), (1 + LEARNT) * _first(state)
        stays = half and state["low"] > 0 and all(least < value < first for _, value in seen) and state["best"] > least
        if not stays:
            return False
        at, level = seen[-1]
        # the least that the line falls by, as far as it is sure: nothing where it is not
        promised: float = level + min(0.0, _trend.trend(seen, self.confidence).high) * (state["plan"] - at)
        return promised > least

    def _hardly_left(self, state: State, level: float) -> bool:
        """Whether a level is that of the start: within a tenth of it, or within the noise where a share means nothing."""
        first = _first(state)
        if state["low"] > 0:
            return bool(abs(first - level) < LEARNT * first)
        # single steps are noisy; less so are means of the first half patience and of the last blocks, 0.4 patience at least
        noise, head = NEVER * (state["noise"] or 0.0), state["head"]
        surely = noise * (4.5 / self._patience(state, state["last"])) ** 0.5
        return bool(abs(first - level) < noise and head[0] / head[1] - level < surely)

    def _warms_up(self, state: State, step: int) -> bool:
        """Whether the learning rate has risen since the window began, not later than in the first half of the run."""
        rate, before, plan = state["lr"], state["lr_began"], state["plan"]
        early = plan is None or step + 1 <= LEFT * plan
        return bool(early and rate is not None and before is not None and rate > RISING_RATE * before)

    def _left(self, recent: Sequence[Sequence[float]], level: float, patience: int, enough: float) -> bool:
        """Whether the last patience lies clearly below the level of the alarm and gains enough by itself.

        Both, since a slope over one patience is noisy and a tail that creeps passes any level in the end.
        """
        mean = sum(value for _, value in recent) / len(recent)
        return mean < level - 1.5 * enough and -_trend.trend(recent, self.confidence).slope * patience >= enough

    def _enough(self, drop: float, noise: float) -> float:
        if self.min_improvement is not None:
            return self.min_improvement
        return DECIBELS if self.unit == "dB" else max(SHARE_OF_DROP * drop, SHARE_OF_NOISE * noise)

    def _finding(self, state: State, step: int, numbers: dict[str, float]) -> Finding:
        def show(value: float) -> str:
            return f"{value:.3g} {self.unit}".rstrip()

        # a run that has not left its start is judged by its level, not by what it may gain
        proof = (
            f" ({self.confidence:.0%} upper bound {show(numbers['upper_bound'] + 0.0)} < {show(numbers['min_improvement'])})"
            if numbers["upper_bound"] < numbers["min_improvement"]
            else ""
        ).replace("%", " %")
        message = (
            f"{self.name} gains {show(numbers['gain'] + 0.0)} per {numbers['patience']:,} steps{proof}, "
            f"level {show(numbers['level'])}."
        )
        left = None if state["plan"] is None else max(0.0, 1 - (step + 1) / state["plan"])
        ahead = next((at for at in self.schedule if at > step), None)
        advice = (
            "If it should be lower: change the learning rate, check that every parameter gets gradients and is owned by "
            "the optimizer, and look at the outputs. If this is as good as expected, stop here."
        )
        first = _first(state)
        # only then is a share of the loss the same in any unit; a hinge that every item has passed is exactly zero
        positive = state["low"] >= 0 and max(state["start"]) > 0
        mean = state["stalled"]
        # what is learnt within three steps was learnt as well
        left_over = min(mean, numbers["level"]) / max(state["start"]) if positive else 1.0
        never = self._hardly_left(state, mean)
        soft = True
        if ahead is not None:
            message += f" A planned change lies ahead, at step {ahead}."
            advice = "Wait for the planned change, or bring it forward."
        elif state["optimizers"] > 1:
            message += (
                " Several optimizers step: where they play against each other, this loss is no measure of progress."
            )
        elif left_over <= LEARNT:
            message += f" {left_over:.2g} of its start is left: it may simply have converged."
        elif never and state["pretrained"]:
            message += (
                f" It has hardly left its start, {show(first)}, which is usual where a trained model is trained on."
            )
        elif never:
            soft = False
            message += f" It has hardly left its start, {show(first)}."
        elif self._too_high(state, step, state["series"]["blocks"]):
            soft = False
            message += (
                f" It has been flat for more than half of the run, and {left_over:.0%} of its start is left.".replace(
                    "%", " %"
                )
            )
        elif left is not None and left <= LEFT:
            message += f" {left:.0%} of the run is left: it may simply have converged.".replace("%", " %")
        else:
            soft = False
        numbers |= {"start": first}
        return Finding(
            "loss-plateau", "info" if soft else "warning", message, advice, step, phase=self.phase, evidence=numbers
        )

    def _same(self, state: State, step: int, value: float) -> Finding:
        return Finding(
            "loss-plateau",
            "warning",
            f"{self.name} has been exactly {value:.6g} at each of its first {SAME} steps: nothing depends on the batch or on the weights.",
            "Look at how the loss is made: detached, masked to nothing, of the wrong tensors; then at the learning rate and at dead outputs.",
            step,
            phase=self.phase,
            evidence={"level": value, "start": value, "gain": 0.0, "lr": state["lr"]},
        )


def _first(state: State) -> float:
    """Where the loss began: the median of its first three values."""
    start: list[float] = sorted(state["start"])
    return start[len(start) // 2]


def _share(patience: int | str) -> float | None:
    """The share that `patience` means, None for steps."""
    if isinstance(patience, int) and not isinstance(patience, bool) and patience >= 1:
        return None
    if isinstance(patience, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", patience)
        if match and 0 < float(match[1]) <= 100:
            return float(match[1]) / 100
    raise ValueError(f"patience must be steps (a positive int) or a share such as '10%', not {patience!r}.")
