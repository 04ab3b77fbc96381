"""`Jumps`: a loss that leaps, climbs away, or sits at a telling value."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope._record import Finding, Severity
from stethoscope.watches._streaks import told

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

WINDOW = 51  # values whose median is the level: 25 outliers do not move it beyond the others
FEWEST = 20  # values before anything is judged
SPIKE = 8.0  # upper-tail standard deviations: batches of four in cross entropy pass 5 all the time
SHARE_OF_DROP = 0.25
CLIMB = 2.0  # standard deviations of one step: the median of 51 moves by 0.18 of them
HOLD = 50  # steps
NONFINITE = 3  # steps in a row: an fp16 scaler skips one or two as a matter of course
QUIET = 100  # steps between two infos about single spikes
RATE = 5  # spikes within PERIOD steps; more of them warn
PERIOD = 1000
FAR = 10.0  # times the bar, or 80 deviations: no tail of a loss reaches so far, but a batch on another scale does
FAR_OFTEN = 2  # of these within PERIOD steps; more of them warn, however usual they are in this run
NEWS = 6.0  # times the rate of spikes before: six equally rare events come so much later than expected in one of fifty runs
BEATS = 6  # equal distances in a row: spikes that come by chance repeat one distance of 20 steps four times once in ten million runs
MISSED = 3  # beats; of two spikes in a row, the one between may have stayed below the bar
FALLING = 0.1  # share of a leap, per HOLD steps: with less it stays up
RECOVERED = 0.5  # share of a leap: what has fallen by as much learns again
CEILING = 80.0  # -10 log10(1e-8): what SI-SDR losses return for a ratio of zero
CEILING_WIDTH = 0.05  # dB
CEILING_HOLD = 3  # steps in a row


class Jump(NamedTuple):
    """What is to be said about one step."""

    code: str
    severity: Severity
    message: str
    advice: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Jumps:
    """Reports a loss that leaps (spike), climbs away from its best (divergence), or sits at exactly +80 dB.

    **What it decides:** against the median of the last 51 values, its deviation `sd` (`sd+` in the upper tail) and the `drop` from the
    first level (or the median of the first three values, where that is higher) to the best one:
    a *spike* is a value above `median + max(8 sd+, 25 % of drop)`; single ones are infos, at most one per 100 steps, and
    more than 5 within 1000 steps are a warning, unless they came at more than a sixth of that rate before, from the start: then the loss
    has heavy tails; more than 2 that go 10 times as far as the bar are one always, and so are 7 and more at one distance in steps
    that go above the level at which the run began and do not fall: what comes there, the same file or shard in each round, is not learnt. *Diverged*: the median lies above its best by more than
    `25 % of drop + 2 sd` for 50 steps and does not fall again (a tenth of the leap per 50 steps; what has lost half of it, such as a
    harder stage of a curriculum, is compared with its new level), or three values in a row are NaN or Inf. *+80 dB*: three values in a row within
    0.05 of 80, which is what an SI-SDR loss with eps 1e-8 returns for a zero output or a silent target. Differences
    only, never ratios: negative losses are fine. Where several optimizers step, a climb is an info: in a game of two, the loss of one
    player climbs while the other wins.
    **Findings:** `loss-spike`, `loss-diverged`, `loss-at-80-db`. **Cost:** host only, one sort of 51 numbers per step.
    **Needs:** no probe.

    Args:
        name: record to follow, a loss: lower is better.
        phase: `"train"`, `"val"`, ...
        schedule: steps at which the loss may change its level by plan (curriculum, data, loss weights); the best
            level is forgotten there.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> print(replay(Jumps(), series(loss=[1.0, 1.1] * 30 + [float("nan")] * 3))[0])
        error loss-diverged at step 62: loss is NaN or Inf for 3 steps in a row. Try: Go back to a checkpoint before \
step 60, lower the learning rate, and let audits.nonfinite name the origin.
    """

    name: str = "loss"
    _: KW_ONLY
    phase: str = "train"
    schedule: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", tuple(sorted(self.schedule)))

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """An empty run."""
        return {
            "last": None,
            "values": [],
            "first": None,
            "best": None,
            "best_sd": 0.0,
            "spikes": [],
            "told": None,
            "often": False,
            "began": None,
            "spiked": 0,
            "far": [],
            "beat": None,
            "inside": False,
            "high_since": None,
            "peak": 0.0,
            "checked": [0, 0.0],
            "diverged": False,
            "bad_since": None,
            "bad": 0,
            "ceiling": 0,
            "optimizers": 1,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the records of one step."""
        if (optimizers := told(records, "plan/optimizers", None)) is not None:
            state = {**state, "optimizers": optimizers}
        for record in records:
            if record.name == self.name and record.phase == self.phase and isinstance(record.value, (int, float)):
                if state["last"] is not None and record.step <= state["last"]:
                    continue
                state = {**state}  # ours from here on; lists in it are replaced, never changed
                planned = state["last"] is not None and any(state["last"] < at <= record.step for at in self.schedule)
                if planned:
                    state.update(values=[], first=None, best=None, high_since=None, inside=False)
                state["last"] = record.step
                found = self._take(state, record.step, float(record.value))
                return state, [
                    Finding(*jump[:4], record.step, phase=self.phase, evidence=jump.evidence) for jump in found
                ]
        return state, ()

    def _take(self, state: dict[str, Any], step: int, value: float) -> list[Jump]:
        found = [*self._nonfinite(state, step, value), *self._ceiling(state, value)]
        if not math.isfinite(value):
            return found
        if len(state["values"]) >= FEWEST:
            level, sd, upper = _level(state["values"])
            if state["began"] is None:
                state["began"] = step
            if state["first"] is None:
                # small problems are learnt before a level is known: what was lost by then counts as well
                state["first"] = max(level, sorted(state["values"][:3])[1])
            if state["best"] is None or level < state["best"]:
                state.update(best=level, best_sd=sd)
            drop = max(0.0, state["first"] - state["best"])
            found += self._spike(state, step, value, level, max(SPIKE * upper, SHARE_OF_DROP * drop))
            found += self._climb(state, step, level, sd, SHARE_OF_DROP * drop + CLIMB * state["best_sd"])
        state["values"] = [*state["values"], value][-WINDOW:]
        return found

    def _nonfinite(self, state: dict[str, Any], step: int, value: float) -> list[Jump]:
        if math.isfinite(value):
            if state["bad"] >= NONFINITE:
                state["diverged"] = False
            state.update(bad=0, bad_since=None)
            return []
        state["bad"] += 1
        if state["bad"] == 1:
            state["bad_since"] = step
        if state["bad"] != NONFINITE or state["diverged"]:
            return []
        state["diverged"] = True
        since = state["bad_since"]
        message = f"{self.name} is NaN or Inf for {NONFINITE} steps in a row."
        advice = f"Go back to a checkpoint before step {since}, lower the learning rate, and let audits.nonfinite name the origin."
        return [Jump(code="loss-diverged", severity="error", message=message, advice=advice, evidence={"since": since})]

    def _ceiling(self, state: dict[str, Any], value: float) -> list[Jump]:
        state["ceiling"] = state["ceiling"] + 1 if abs(value - CEILING) < CEILING_WIDTH else 0
        if state["ceiling"] != CEILING_HOLD:
            return []
        message = (
            f"{self.name} is {value:.4g} for {CEILING_HOLD} steps in a row: +80 dB is what an SI-SDR loss returns for an "
            "output of zeros or a silent target."
        )
        advice = (
            "Look at the output level and at silent sources in the data; a dead output stays dead, so go back to an earlier "
            "checkpoint and lower the learning rate."
        )
        evidence = {"value": value}
        return [Jump(code="loss-at-80-db", severity="error", message=message, advice=advice, evidence=evidence)]

    def _spike(self, state: dict[str, Any], step: int, value: float, level: float, bar: float) -> list[Jump]:
        spikes = [at for at in state["spikes"] if at > step - PERIOD]
        inside, state["inside"] = state["inside"], value > level + bar and bar > 0
        if not state["inside"] or inside or state["diverged"] or state["high_since"] is not None:
            if len(spikes) <= RATE // 2:
                state["often"] = False
            state["spikes"] = spikes
            return []
        state["spikes"] = spikes = [*spikes, step][-RATE - 1 :]
        state["spiked"] += 1
        far = [at for at in state["far"] if at > step - PERIOD]
        state["far"] = far = [*far, step][-FAR_OFTEN - 1 :] if value > level + FAR * bar else far
        state["beat"] = beat = _beat(state["beat"], step, value, state["first"])
        numbers = {"value": value, "level": level, "bar": level + bar, "spikes": len(spikes)}
        if beat["told"] == step and not state["often"]:
            state.update(often=True, told=step)
            return [self._regular(state, beat, numbers)]
        text = f"{self.name} leaps to {value:.4g}, from a level of {level:.4g} (bar {level + bar:.4g})"
        frequent = len(spikes) > RATE and self._new_rate(state, spikes)
        often = frequent or len(far) > FAR_OFTEN
        if state["often"] or (not often and state["told"] is not None and step < state["told"] + QUIET):
            return []
        state.update(often=often, told=step)
        if frequent:
            text += f"; more than {RATE} spikes within {PERIOD:,} steps."
        elif often:
            text += f"; {len(far)} within {PERIOD:,} steps were {FAR:.0f} times as far from the level as the bar."
        else:
            text += "."
        advice = "Look at the batch of that step (a bad sample?); clip gradients, or lower the learning rate."
        severity: Severity = "warning" if often else "info"
        return [Jump(code="loss-spike", severity=severity, message=text, advice=advice, evidence=numbers)]

    def _regular(self, state: dict[str, Any], beat: dict[str, Any], numbers: dict[str, Any]) -> Jump:
        message = (
            f"{self.name} leaps every {beat['every']} steps, {len(beat['heights'])} times so far, to {numbers['value']:.4g} now from a level of "
            f"{numbers['level']:.4g}, and to {_median(beat['heights'][:3]):.4g} at first, above its start: what comes there is not learnt."
        )
        advice = (
            "Look at the batches of these steps: a shard or file that is damaged, not decoded or of another kind, labels of another version. "
            "If another task or loss has its turn there by plan, log it under a name of its own."
        )
        severity: Severity = "info" if state["optimizers"] > 1 else "warning"
        return Jump("loss-spike", severity, message, advice, {**numbers, "every": beat["every"]})

    @staticmethod
    def _new_rate(state: dict[str, Any], spikes: Sequence[int]) -> bool:
        """Whether spikes are more frequent than they were before: one that is yet to come counts there as well."""
        before = (state["spiked"] - len(spikes) + 1) / max(1, spikes[0] - state["began"])
        return bool((len(spikes) - 1) / (spikes[-1] - spikes[0]) > NEWS * before)

    def _climb(self, state: dict[str, Any], step: int, level: float, sd: float, bar: float) -> list[Jump]:
        high = level > state["best"] + bar + 1e-12 * abs(level)
        if not high:
            state["high_since"] = None
            if level <= state["best"] + bar / 2:
                state["diverged"] = False
            return []
        if state["high_since"] is None:
            state.update(high_since=step, peak=level, checked=[step, math.inf])
        state["peak"] = max(level, state["peak"])
        at, before = state["checked"]
        if state["diverged"] or step - at < HOLD:
            return []
        leap = state["peak"] - state["best"]
        if min(before, state["peak"]) - level > max(FALLING * leap, sd / 2):
            state["checked"] = [step, level]
            if state["peak"] - level > RECOVERED * leap:
                state.update(first=max(state["first"], state["peak"]), best=level, best_sd=sd, high_since=None)
            return []
        state["diverged"] = True
        spike = state["spikes"][-1] if state["spikes"] else None
        message = (
            f"{self.name} has climbed from its best level {state['best']:.4g} to {level:.4g} and stays more than "
            f"{bar:.3g} above it since step {state['high_since']}."
        )
        if spike is not None and spike > state["high_since"] - HOLD:
            message += f" It began with a spike at step {spike}."
        numbers = {"level": level, "best": state["best"], "bar": bar, "since": state["high_since"]}
        advice = (
            "Go back to the best checkpoint and lower the learning rate or clip gradients. If data, loss or curriculum "
            "changed by plan there, name the step in schedule."
        )
        severity: Severity = "info" if state["optimizers"] > 1 else "warning"
        return [Jump(code="loss-diverged", severity=severity, message=message, advice=advice, evidence=numbers)]


def _level(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, standard deviation `(q75 - q25) / 1.349`, and that of the upper tail `(q90 - q50) / 1.2816` if larger."""
    ordered = sorted(values)
    n = len(ordered)
    middle = ordered[n // 2]
    sd = (ordered[(3 * n) // 4] - ordered[n // 4]) / 1.349
    return middle, sd, max(sd, (ordered[(9 * n) // 10] - middle) / 1.2816)


def _beat(before: dict[str, Any] | None, step: int, value: float, start: float) -> dict[str, Any]:
    """Take in one spike: the distance at which they come, and how high they reach; `told` is the step at which that is news."""
    if before is None:
        return {"last": step, "every": 0, "heights": [value], "told": None}
    gap, every, told = step - before["last"], before["every"], before["told"]
    heights = [*before["heights"], value]
    if not every or gap % every or gap > MISSED * every:
        every, heights, told = gap, heights[-2:], None  # the spike before is the first of a new series
    lately, first = _median(heights[-3:]), _median(heights[:3])
    if told is None and len(heights) > BEATS and lately >= first and lately > start:
        told = step
    if len(heights) > 2 * BEATS:
        heights = [*heights[:3], *heights[4:]]
    return {"last": step, "every": every, "heights": heights, "told": told}


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
