"""`Overfit`: validation gets worse, or no better, while training goes on."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._streaks import Judging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record


@dataclass(frozen=True)
class Overfit:
    """Reports a validation loss that climbs while the training loss falls, and one that has long stopped improving.

    **What it decides**, at each value that is logged for `phase`; the training level is the mean of the loss given to `step` since the value before:

    - `overfit` (warning): in `times` values in a row, the validation loss lies above its best by more than `rise` of its drop from the first
      value to the best, or of half the training loss's drop where that is more, while the training loss has fallen, since the best, by more than
      `fall` of its own drop.
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
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        names = {self.name, f"{self.phase}_{self.name}", f"{self.phase}/{self.name}"}
        for record in records:
            value = record.value
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if record.source == "step" and record.phase == "train" and record.name == self.name:
                start = float(value) if state["start"] is None else state["start"]
                return {**state, "sum": state["sum"] + float(value), "count": state["count"] + 1, "start": start}, ()
            if record.source == "log" and record.phase == self.phase and record.name in names:
                return self._judge(dict(state), record.step, float(value)) if state["count"] else (state, ())
        return state, ()

    def _judge(self, state: State, step: int, value: float) -> tuple[State, Sequence[Finding]]:
        train = state["sum"] / state["count"]
        state.update(sum=0.0, count=0)
        if state["first"] is None:
            state["first"] = value
        if state["best"] is None or value < state["best"]:
            state.update(best=value, train=train, since=0)
        else:
            state["since"] += 1
        judging = Judging(state["held"], step, self.times, 0)
        learnt = state["start"] - train
        # a validation loss that was best at first has no drop of its own
        drop = max(state["first"] - state["best"], learnt / 2)
        worse = drop > 0 and value - state["best"] > self.rise * drop
        better = learnt > 0 and state["train"] - train > self.fall * learnt
        numbers = {"best": state["best"], "now": value, "train_then": state["train"], "train_now": train}
        if judging.model("overfit", worse and better):
            judging.tell(
                Finding(
                    "overfit",
                    "warning",
                    f"{self.phase} {self.name} has climbed from its best {state['best']:.4g} to {value:.4g}, while it has fallen from "
                    f"{state['train']:.4g} to {train:.4g} in training: the model learns its training data by heart.",
                    "Go back to the best checkpoint and stop there; more data or augmentation, dropout, weight decay, a smaller model.",
                    phase=self.phase,
                ),
                values=numbers,
            )
        idle = state["since"] >= self.patience and not (worse and better)
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
