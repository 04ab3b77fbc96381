"""`Overfit`: validation gets worse, or no better, while training goes on."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches import _metric_names as names
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


@dataclass(frozen=True)
class Overfit:
    """Reports a validation loss that climbs, or stays behind, while the training loss falls, and one that has long stopped improving.

    **What it decides**, at each value that is logged for `phase`; the training level is the mean of the loss given to `step` since the value before:

    - `overfit` (warning): in `times` values in a row, the validation loss lies above its best by more than `rise` of its drop from the first
      value to the best, or of half the training loss's drop where that is more, while the training loss has fallen, since the best, by more than
      `fall` of its own drop. Or it *stays behind*: it brings no new best, and it has gained, since the first value of either loss, less
      than half of what the training loss has lost; or, of losses that were never below zero, it is ten times the training loss and
      still a twentieth of where both began.
    - `overtraining` (info): no new best in `patience` values, and not overfit: the steps since then have brought nothing.

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
            "first": None,
            "best": None,
            "since": 0,
            "train": None,
            "start": None,
            "squares": 0.0,
            "low": None,
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        known = {self.name, f"{self.phase}_{self.name}", f"{self.phase}/{self.name}"}
        for record in records:
            value = record.value
            if not isinstance(value, (int, float)) or not abs(value) < HUGE:  # the negation leaves out NaN as well
                continue
            if record.source == "step" and record.phase == "train" and record.name == self.name:
                return _trained(state, float(value)), ()
            if record.source == "log" and names.phase(record.phase) == self.phase and record.name in known:
                return self._judge(dict(state), record.step, float(value)) if state["count"] else (state, ())
        return state, ()

    def _judge(self, state: State, step: int, value: float) -> tuple[State, Sequence[Finding]]:
        train = state["sum"] / state["count"]
        spread = math.sqrt(max(0.0, state["squares"] / state["count"] - (train - state["start"]) ** 2))
        state.update(sum=0.0, count=0, squares=0.0, low=min(value, state["low"]))
        learnt = state["start"] - train
        if state["first"] is None:
            state["first"] = value
        news = state["best"] is None or value < state["best"] - NEWS * max(0.0, learnt)
        if state["best"] is None or value < state["best"]:
            state.update(best=value, train=train, since=0)
        else:
            state["since"] += 1
        behind = learnt > CLEAR * spread and not news and self._behind(state, value, train, learnt)
        judging = Judging(state["held"], step, self.times, 0)
        # a validation loss that was best at first has no drop of its own
        drop = max(state["first"] - state["best"], learnt / 2)
        worse = drop > 0 and value - state["best"] > self.rise * drop
        better = learnt > 0 and state["train"] - train > self.fall * learnt
        numbers = {"best": state["best"], "now": value, "train_then": state["train"], "train_now": train}
        if judging.model("overfit", behind or (worse and better)):
            judging.tell(self._finding(state, value, train, climbed=worse and better), values=numbers)
        idle = state["since"] >= self.patience and not behind and not (worse and better)
        if judging.model("overtraining", idle, times=1):
            judging.tell(
                Finding(
                    "overtraining",
                    "info",
                    f"{self.phase} {self.name} has had no new best ({state['best']:.4g}) in {state['since']} evaluations.",
                    "Stop here, or lower the learning rate; keep the best checkpoint.",
                    phase=self.phase,
                ),
                values=numbers,
            )
        return {**state, "held": judging.held}, judging.findings

    @staticmethod
    def _behind(state: State, value: float, train: float, learnt: float) -> bool:
        """Whether what was learnt in training is of little use to the data of validation."""
        first = max(state["start"], state["first"])
        by_heart = state["low"] > 0 and value > TENFOLD * train and value > LEFT * first
        return bool(first - value < HALF * learnt or by_heart)

    def _finding(self, state: State, value: float, train: float, *, climbed: bool) -> Finding:
        if climbed:
            said = (
                f"{self.phase} {self.name} has climbed from its best {state['best']:.4g} to {value:.4g}, while it has fallen from "
                f"{state['train']:.4g} to {train:.4g} in training: the model learns its training data by heart."
            )
            advice = "Go back to the best checkpoint and stop there; more data or augmentation, dropout, weight decay, a smaller model."
        else:
            said = (
                f"{self.phase} {self.name} is {value:.4g} and no longer improves (best {state['best']:.4g}, first {state['first']:.4g}), while it "
                f"has fallen from {state['start']:.4g} to {train:.4g} in training."
            )
            advice = (
                "Validate on a few training batches: if the loss is high there, too, look at the validation path (other weights, other "
                "preparation, other labels). Else the training data are learnt by heart: more of them, or a smaller model."
            )
        return Finding("overfit", "warning", said, advice, phase=self.phase)


def _trained(state: State, value: float) -> State:
    """Take in one training loss."""
    start = value if state["start"] is None else state["start"]
    low = value if state["low"] is None else min(value, state["low"])
    # around the start, so that nothing is lost to rounding where the loss has a large constant
    squares = state["squares"] + (value - start) ** 2
    return {
        **state,
        "sum": state["sum"] + value,
        "count": state["count"] + 1,
        "start": start,
        "squares": squares,
        "low": low,
    }
