"""`Overfit`: validation gets worse, or no better, while training goes on."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches import _metric_names as names
from stethoscope.watches._evaluations import SCARE, SHARE, Block, climbs, push, scare
from stethoscope.watches._streaks import Judging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record


HALF = 0.5  # share of what training has learnt: with less, most of it is of no use to data that was not seen
NEWS = 0.02  # share of what training has learnt that a new best must be better by: less is the draw of the batches
TENFOLD = 10.0  # the loss in validation over that in training, where both are positive
LEFT = 0.05  # share of the first losses: below, the task is as good as solved, whatever the ratio
HUGE = 1e100  # left out as infinite: squares of it would overflow
CLEAR = 3.0  # standard deviations of one step: what training must have learnt before it is compared
FALLS = 2.0  # standard errors of the difference between two training levels, in each of `times` blocks
MEMORY = 50  # steps over which the noise of the training loss is averaged
ONE_STEP = (
    0.5117  # sqrt(pi / 2) / sqrt(6): mean absolute second difference of independent normal values to their deviation
)
GOOD = 0.9  # of an accuracy: of what is right this often, a loss that climbs is a matter of confidence
BETTER = 0.02  # of an accuracy of at least a half, since the best loss: of one near chance it is the draw of the items


@dataclass(frozen=True)
class Overfit:
    """Reports a validation loss that climbs, or stays behind, while the training loss falls, and one that has long stopped improving.

    **What it decides**, at each value that is logged for `phase`; the training level is the mean of the loss given to `step` since the value
    before. Where there are many values, means over 2 % of the planned run or 1/32 of the values so far take their place:

    - `overfit` (warning): in `times` values in a row, the validation loss lies above its best by more than `rise` of its drop from the first
      value to the best, or of half the training loss's drop where that is more, while the training loss has fallen, since the best, by more than
      `fall` of its own drop, and goes on falling by more than two standard errors after it. Noise of small validation sets is none: the climb must be larger than four
      standard deviations of the values since the best, and than one and a half times any climb that the run has come back from. Or it
      *stays behind*: it brings no new best, and it has gained, since the first value of either loss, less
      than half of what the training loss has lost; or, of losses that were never below zero, it is ten times the training loss and
      still a twentieth of where both began. It is an info where an accuracy that is logged along with it is at least 0.9 and no lower than at the best
      loss, or at least 0.5 and has risen by 0.02 since: what changes then is how sure the model is, not what it says.
    Differences only, no ratios: negative losses are fine. **Cost:** host only, O(1) per step. **Needs:** no probe;
    `monitor.log({"loss": ...}, phase="val")`.

    Args:
        name: of the loss, given to `step` in training and logged in `phase`, there also as `val_loss` or `val/loss`.
        phase: of the logged values.
        times: values in a row.
        rise: share of the drop.
        fall: share of the drop of the training loss.
        patience: values without a new best.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> train, val = [4, 2, 1, 0.5, 0.2, 0.1], [4, 2.5, 2, 2.6, 2.9, 3.2]
        >>> both = [Record("loss", x, i, source="step") for i, x in enumerate(train)]
        >>> logged = [Record("loss", x, i, phase="val", source="log") for i, x in enumerate(val)]
        >>> replay(Overfit(), [r for pair in zip(both, logged) for r in pair])[0].code
        'overfit'

    References: Prechelt 1998 (early stopping).
    """

    name: str = "loss"
    _: KW_ONLY
    phase: str = "val"
    times: int = 3
    rise: float = 0.25
    fall: float = 0.05
    patience: int = 10

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """Nothing logged."""
        return {
            "held": {},
            "sum": 0.0,
            "count": 0,
            "plan": 0,
            "start": None,
            "low": None,
            "lately": [],
            "noise": [0.0, 0],
            "blocks": [],
            "size": 1,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        known = {self.name, f"{self.phase}_{self.name}", f"{self.phase}/{self.name}"}
        for record in records:
            value = record.value
            if not isinstance(value, (int, float)) or not abs(value) < HUGE:  # the negation leaves out NaN as well
                continue
            if record.name == "plan/steps":
                state = {**state, "plan": value}
            elif record.source == "step" and record.phase == "train" and record.name == self.name:
                return _trained(state, float(value)), ()
            elif record.source == "log" and names.phase(record.phase) == self.phase and record.name in known:
                if not state["count"]:
                    return state, ()
                return self._take(dict(state), record.step, float(value), _accuracy(records))
        return state, ()

    def _take(self, state: State, step: int, value: float, rate: float | None) -> tuple[State, Sequence[Finding]]:
        count = state["count"]
        new = Block(step, step, 1, value, state["sum"] / count, count, rate)
        before = [Block(*block) for block in state["blocks"]]
        blocks, size, complete = push(before, state["size"], SHARE * state["plan"], new)
        state.update(
            sum=0.0, count=0, low=min(value, state["low"]), size=size, blocks=[list(block) for block in blocks]
        )
        return self._judge(state, step, blocks) if complete else (state, ())

    def _judge(self, state: State, step: int, blocks: Sequence[Block]) -> tuple[State, Sequence[Finding]]:
        values, now = [block.value for block in blocks], blocks[-1]
        best = blocks[values.index(min(values))]
        after = blocks[values.index(best.value) + 1 :]
        noise = ONE_STEP * state["noise"][0]
        learnt = state["start"] - now.train
        news = len(values) == 1 or now.value < min(values[:-1]) - NEWS * max(0.0, learnt)
        behind = learnt > CLEAR * noise and not news and self._behind(state, values, now, learnt)
        # a validation loss that was best at first has no drop of its own
        drop = max(values[0] - best.value, learnt / 2)
        told = bool(state["held"].get("overfit", {}).get("told"))  # then neither noise nor half a way back ends it
        bar = self.rise * drop / 2 if told else max(self.rise * drop, SCARE * scare(values))
        worse = drop > 0 and now.value - best.value > bar
        better = learnt > 0 and best.train - now.train > self.fall * learnt
        falls = better and all(_clear(block, now, noise) for block in (best, *after[:1]))
        climbed = worse and (told or (falls and climbs([block.value for block in after], best.value)))
        judging = Judging(state["held"], step, self.times, 0)
        numbers = {"best": best.value, "now": now.value, "train_then": best.train, "train_now": now.train}
        if judging.model("overfit", behind or climbed):
            judging.tell(self._finding(state, best, now, values[0], climbed=climbed), values=numbers)
        seen = sum(block.seen for block in after)
        idle = len(after) >= self.patience and not behind and not (worse and better)
        if judging.model("overtraining", idle, times=1):
            judging.tell(
                Finding(
                    "overtraining",
                    "info",
                    f"{self.phase} {self.name} has had no new best ({best.value:.4g}) in {seen} evaluations.",
                    "Stop here, or lower the learning rate; keep the best checkpoint.",
                    phase=self.phase,
                ),
                values=numbers,
            )
        return {**state, "held": judging.held}, judging.findings

    @staticmethod
    def _behind(state: State, values: Sequence[float], now: Block, learnt: float) -> bool:
        """Whether what was learnt in training is of little use to the data of validation."""
        first = max(state["start"], values[0])
        by_heart = state["low"] > 0 and now.value > TENFOLD * now.train and now.value > LEFT * first
        return bool(first - now.value < HALF * learnt or by_heart)

    def _finding(self, state: State, best: Block, now: Block, first: float, *, climbed: bool) -> Finding:
        if climbed:
            said = (
                f"{self.phase} {self.name} has climbed from its best {best.value:.4g} to {now.value:.4g}, while it has fallen from "
                f"{best.train:.4g} to {now.train:.4g} in training: the model learns its training data by heart."
            )
            advice = "Go back to the best checkpoint and stop there; more data or augmentation, dropout, weight decay, a smaller model."
        else:
            said = (
                f"{self.phase} {self.name} is {now.value:.4g} and no longer improves (best {best.value:.4g}, first {first:.4g}), while it "
                f"has fallen from {state['start']:.4g} to {now.train:.4g} in training."
            )
            advice = (
                "Validate on a few training batches: if the loss is high there, too, look at the validation path (other weights, other "
                "preparation, other labels). Else the training data are learnt by heart: more of them, or a smaller model."
            )
        if _as_right(best.rate, now.rate):
            said += f" The accuracy is as good as it was, {now.rate:.3g}: the model is too sure of itself rather than wrong."
            return Finding("overfit", "info", said, advice, phase=self.phase)
        return Finding("overfit", "warning", said, advice, phase=self.phase)


def _trained(state: State, value: float) -> State:
    """Take in one training loss."""
    lately, (noise, seen) = [*state["lately"], value], state["noise"]
    if len(lately) > 2:
        seen = min(seen + 1, MEMORY)
        # second differences: the fall itself is no noise
        noise += (abs(lately[0] - 2 * lately[1] + lately[2]) - noise) / seen
    return {
        **state,
        "sum": state["sum"] + value,
        "count": state["count"] + 1,
        "start": value if state["start"] is None else state["start"],
        "low": value if state["low"] is None else min(value, state["low"]),
        "lately": lately[-2:],
        "noise": [noise, seen],
    }


def _clear(then: Block, now: Block, noise: float) -> bool:
    """Whether the training loss has fallen from one block to another by more than the noise of their means."""
    return then.train - now.train > FALLS * noise * math.sqrt(1 / then.steps + 1 / now.steps)


def _accuracy(records: Sequence[Record]) -> float | None:
    """Return the accuracy, in [0, 1], that is logged along with a loss: the first, if there are several."""
    for record in records:
        if record.source == "log" and record.name and names.rate(names.split(record.name).bare):
            value = record.value
            if isinstance(value, (int, float)) and 0 <= value <= 100:
                return value / 100 if value > 1 else float(value)
    return None


def _as_right(then: float | None, now: float | None) -> bool:
    """Whether the model says what is right as often as at its best loss."""
    if then is None or now is None:
        return False
    return (now >= GOOD and now >= then) or (now >= HALF and now > then + BETTER)
