"""`ResultHealth`: results of validation that contradict its loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches import _metric_names as names
from stethoscope.watches._metric_stuck import is_quality
from stethoscope.watches._streaks import Judging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

LEARNT = 0.5  # share of the first training loss that the one of validation must be below: before, an accuracy may be anything
HALF = 0.5  # share of what the loss promises: calibration is no law
TIMES = 2  # evaluations in a row
SAME = 3  # evaluations in a row in which a quality is the loss, each another number
ROUNDED = 1e-5  # relative: float32, and a mean over batches in another order

_ACCURACY = frozenset({"acc", "accuracy", "accuracies", "top1"})
_WHOLE = frozenset({"exact", "sentence", "sent", "seq", "sequence", "utt", "utterance", "subset", "joint"})
"""All of many decisions must be right: their loss says little of that."""


@dataclass(frozen=True)
class ResultHealth:
    """Reports an accuracy that is no percentage, and a quality that is minimised, by comparing them with the loss that is logged along with them.

    **What it decides**, of dictionaries logged outside of training:

    - `metric-range`: an accuracy above 1 would be a percentage, and is less than half of what the loss promises, in two evaluations in a row: a model that
      gives what is right `exp(-loss)` of the probability (a lower bound, by Jensen) is right about as often. Only once the loss, never below zero, is less
      than half of the first training loss. Counts, and sums that nobody divided, look like that.
    - `loss-sign`: a quality by its name (SI-SDR, PSNR, accuracy, correlation: larger is better) is the loss itself, in three evaluations in a row, each another
      number: a missing minus.

    **Cost:** host only, O(1) per dictionary. **Needs:** no probe; `monitor.log({"loss": ..., "accuracy": ...}, phase="val")`.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> def log(at, **values):
        ...     return [Record(name, value, at, phase="val", source="log") for name, value in values.items()]
        >>> run = [log(at, loss=-20.0 - at, si_sdr=-20.0 - at) for at in range(3)]
        >>> [finding.code for finding in replay(ResultHealth(), [record for each in run for record in each])]
        ['loss-sign']

    References: Guo et al. 2017 (calibration: how far confidence and accuracy differ).
    """

    @property
    def needs(self) -> tuple[Probe, ...]:
        """No probe."""
        return ()

    def init(self) -> State:
        """Nothing logged."""
        return {"held": {}, "start": None, "positive": True, "echoes": {}}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        logged: dict[str, float] = {}
        for record in records:
            value = record.value
            if not isinstance(value, (int, float)) or not math.isfinite(value):
                continue
            if record.source == "step" and record.phase == "train" and record.name == "loss":
                start = float(value) if state["start"] is None else state["start"]
                return {**state, "start": start, "positive": state["positive"] and value >= 0}, ()
            if record.source == "log" and names.phase(names.split(record.name).phase or record.phase) != "train":
                logged[names.split(record.name).bare] = float(value)
        loss = logged.get("loss")
        if loss is None:
            return state, ()
        judging = Judging(state["held"], records[0].step, times=TIMES, steps=0)
        phase = records[0].phase
        learnt = state["positive"] and state["start"] is not None and 0 <= loss < LEARNT * state["start"]
        shares = {name: value for name, value in logged.items() if _ACCURACY & {*names.tokens(name)}}
        promised = 100 * HALF * math.exp(-max(0.0, loss))
        hits = [
            name
            for name, value in shares.items()
            if learnt and 1 < value < promised and _WHOLE.isdisjoint(names.tokens(name))
        ]
        for name in judging.hold("metric-range", hits, shares):
            judging.tell(_no_percentage(name, shares[name], loss, phase))
        echoes = {
            name: _echoes(state["echoes"].get(name, []), value, loss)
            for name, value in logged.items()
            if is_quality(name, rate=names.rate(name))
        }
        same = [name for name, values in echoes.items() if len(values) >= SAME]
        for name in judging.hold("loss-sign", same, echoes, times=1):
            judging.tell(_minimised(name, loss, phase))
        return {**state, "held": judging.held, "echoes": echoes}, judging.findings


def _echoes(before: list[float], value: float, loss: float) -> list[float]:
    """Values in a row that were the loss, each another number."""
    if not math.isclose(value, loss, rel_tol=ROUNDED):
        return []
    return before if value in before else [*before, value][-SAME:]


def _no_percentage(name: str, value: float, loss: float, phase: str) -> Finding:
    return Finding(
        "metric-range",
        "warning",
        f"{name!r} in the {phase} metrics is {value:.4g}: too much for a share, and as a percentage it contradicts the loss of {loss:.3g}, at which about "
        f"{math.exp(-max(0.0, loss)):.0%} should be right.",
        "Look at the denominator: a count of hits, a sum over batches, or hits per sentence where hits per word are meant. Divide by what was counted.",
        phase=phase,
        evidence={"metric": name, "value": value, "loss": loss},
    )


def _minimised(name: str, loss: float, phase: str) -> Finding:
    return Finding(
        "loss-sign",
        "warning",
        f"{name!r} in the {phase} metrics, larger is better, is the loss itself ({loss:.4g}), number by number: training makes it smaller.",
        "Return its negative as the loss. If the metric was logged with the wrong sign, name it for what it is.",
        phase=phase,
        evidence={"metric": name, "value": loss},
    )
