"""`AnswerHealth`: answers that have nothing to do with their own targets, or do the opposite."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.probes import Agreement
from stethoscope.watches._streaks import Judging, told, train_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

KEEP = 10  # observed steps that are looked at together
PAIRS = 1000  # of items that they hold at least: the share of so many, of batches of eight, has a standard deviation of 0.03
SPAN, SHARE = 50, 0.2  # steps, and share of the planned run, that they span at least
HALF, ENDLESS = 0.5, 5000  # share of the planned run, steps without a plan, that a training has to begin with


@dataclass(frozen=True)
class AnswerHealth:
    """Reports a model whose answers are as near to the targets of other items as to their own.

    **What it decides**, from `answer/concordance` (0.5: no relation, 1: answers follow their targets, see `Agreement`), as the mean over the last ten observed steps and
    more, 1000 pairs of items at least:

    - `stalled-optimisation`: below `related`, from the half of a planned run on (5000 steps without a plan), over a fifth of the run: what makes
      one item differ from another has not been learnt at all. Where targets belong to other items, or the input does not reach the output, this is all that can be learnt,
      however far the loss has fallen. An info where several optimizers step (a game).
    - `loss-sign`: below `opposite`, over 50 steps, of answers of several numbers (signals, pictures, vectors): they move away from their targets. A single number may
      run against what it is held against by right: a distance, a risk.

    **Cost:** host only, O(1) per observed step. **Needs:** `probes.Agreement`: `step(loss=loss, outputs=..., targets=...)` or `logits=`.

    Args:
        related: share of pairs. A correlation of 0.16 makes 0.55 of normal numbers.
        opposite: share of pairs. A correlation of -0.59 makes 0.3.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> records = series(range(0, 10_000, 50), **{"answer/concordance": [0.5] * 200, "answer/pairs": [496.0] * 200})
        >>> [finding.code for finding in replay(AnswerHealth(), records)]
        ['stalled-optimisation']
    """

    _: KW_ONLY
    related: float = 0.55
    opposite: float = 0.3

    @property
    def needs(self) -> tuple[Probe, ...]:
        """How answers and targets agree."""
        return (Agreement(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "plan": None, "optimizers": 1, "lately": []}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        known = told(records, "plan/steps", state["plan"]), told(records, "plan/optimizers", state["optimizers"])
        if known != (state["plan"], state["optimizers"]):
            state = {**state, "plan": known[0], "optimizers": known[1]}
        found = train_values(records, "answer/concordance", "answer/pairs", "answer/values")
        share, pairs, width = (values.get("") for values in found.values())
        if share is None or pairs is None:
            return state, ()
        step, plan = records[0].step, state["plan"]
        judging = Judging(state["held"], step, times=1, steps=0)
        if pairs:
            state = {**state, "lately": _latest([*state["lately"], [step, share, pairs]], SHARE * (plan or 0))}
        held = _mean(state["lately"])
        if held is not None:
            mean, span = held
            late = step + 1 >= (HALF * plan if plan else ENDLESS) and span >= SHARE * (plan or 0)
            opposite = mean < self.opposite and (width or 1.0) > 1
            if judging.model("opposite", opposite):
                judging.tell(_opposite(mean), values={"concordance": mean})
            again = bool(judging.held.get("unrelated", {}).get("told"))
            bar = (1 + self.related) / 2 if again else self.related  # noise around the bar is no news
            if judging.model("unrelated", late and self.opposite <= mean < bar):
                judging.tell(_unrelated(mean, span, state["optimizers"]), values={"concordance": mean})
        return {**state, "held": judging.held}, judging.findings


def _latest(rows: list[list[float]], span: float) -> list[list[float]]:
    """The fewest last rows that are enough; older ones are of another model."""
    while len(rows) > KEEP and _enough(rows[1:], span):
        rows = rows[1:]
    return rows


def _enough(rows: Sequence[Sequence[float]], span: float) -> bool:
    pairs = sum(count for _, _, count in rows)
    return len(rows) >= KEEP and pairs >= PAIRS and rows[-1][0] - rows[0][0] >= max(SPAN, span)


def _mean(rows: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """The mean share of pairs and the steps that it spans, None while there is too little."""
    if not _enough(rows, 0):
        return None
    pairs = sum(count for _, _, count in rows)
    return sum(share * count for _, share, count in rows) / pairs, rows[-1][0] - rows[0][0]


def _unrelated(mean: float, span: float, optimizers: float) -> Finding:
    return Finding(
        "stalled-optimisation",
        "info" if optimizers > 1 else "warning",
        f"Answers follow their own targets in {mean:.0%} of the pairs of items, over the last {span:,.0f} steps; chance gives 50%: nothing that makes one item "
        "differ from another has been learnt.",
        "Print some inputs with their targets: do they belong together (a shuffle, sort or shift of one of the two)? If so, look for what keeps the input from the "
        "output (dead units, a detached or frozen part, a mean over the batch), then at the learning rate.",
    )


def _opposite(mean: float) -> Finding:
    return Finding(
        "loss-sign",
        "warning",
        f"Answers follow their own targets in {mean:.0%} of the pairs of items, where chance gives 50%: they do the opposite of what they should.",
        "Look at the sign of the loss: a similarity, correlation, likelihood or SNR is to be maximised, and enters a loss with a minus.",
    )
