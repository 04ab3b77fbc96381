"""`ClassHealth`: a classifier that answers with one class, and rare classes that it never learns."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding, Histogram
from stethoscope.probes import Classes
from stethoscope.watches._streaks import Judging

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

KEEP = 10
"""Observed steps whose counts are added up."""

TIMES, SPAN = 5, 50  # observed steps in a row, and steps that they span: every network begins with one answer


@dataclass(frozen=True)
class ClassHealth:
    """Reports a classifier that gives nearly all items one class, and rare classes that are hardly ever recognised.

    **What it decides**, from the counts of the last ten observed steps in training, `items` of them at least:

    - `prediction-collapse`: one class gets `collapsed` of the answers, though at most half of the items are of it, for five observed steps
      in a row and 50 steps: every network begins like that.
    - `class-imbalance`: a class is `imbalance` times rarer than the most frequent one, with `rare` items at least, and less than
      `recalled` of them are recognised, while more than half of all items are.

    **Cost:** host only, O(classes) per observed step. **Needs:** `probes.Classes`: `step(loss=loss, logits=..., targets=...)`.

    Args:
        items: items that must have been counted.
        rare: items of a rare class that must have been counted.
        collapsed: share of all answers.
        imbalance: a factor.
        recalled: share of the items of a class that are answered rightly.

    Examples:
        >>> from stethoscope._record import Histogram, Record
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> def step(at):
        ...     for name, counts in (("predicted", (40.0, 0.0)), ("target", (20.0, 20.0)), ("right", (20.0, 0.0))):
        ...         yield Record(f"classes/{name}", Histogram((0.0, 1.0, 2.0), counts), at, kind="histogram")
        >>> [f.code for f in replay(ClassHealth(), [r for at in range(0, 1000, 50) for r in step(at)])]
        ['prediction-collapse']
    """

    _: KW_ONLY
    items: int = 200
    rare: int = 10
    collapsed: float = 0.95
    imbalance: float = 10.0
    recalled: float = 0.3

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Counts per class."""
        return (Classes(),)

    def init(self) -> State:
        """Nothing counted."""
        return {"held": {}, "counts": []}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        now = {
            r.name: list(r.value.counts)
            for r in records
            if r.phase == "train" and r.name.startswith("classes/") and isinstance(r.value, Histogram)
        }
        if len(now) < 3:
            return state, ()
        latest = [now["classes/predicted"], now["classes/target"], now["classes/right"]]
        same = [each for each in state["counts"] if len(each[0]) == len(latest[0])]
        counts = [*same, latest][-KEEP:]
        answers, targets, right = (
            [sum(column) for column in zip(*rows, strict=True)] for rows in zip(*counts, strict=True)
        )
        judging = Judging(state["held"], records[0].step, TIMES, SPAN)
        total = sum(targets)
        if total >= self.items:
            self._collapse(judging, answers, targets, total)
            self._imbalance(judging, targets, right, total)
        return {"held": judging.held, "counts": counts}, judging.findings

    def _collapse(self, judging: Judging, answers: list[float], targets: list[float], total: float) -> None:
        most = max(range(len(answers)), key=answers.__getitem__)
        share, meant = answers[most] / total, targets[most] / total
        if judging.model("prediction-collapse", share >= self.collapsed and meant <= 0.5):
            judging.tell(
                Finding(
                    "prediction-collapse",
                    "warning",
                    f"{share:.0%} of the answers are class {most}, and only {meant:.0%} of the items are: the model ignores its input.",
                    "Look at whether labels belong to their inputs, at the learning rate, the bias of the last layer, and dead units.",
                ),
                values={"class": most, "share": share, "meant": meant},
            )

    def _imbalance(self, judging: Judging, targets: list[float], right: list[float], total: float) -> None:
        most, works = max(targets), sum(right) > 0.5 * total
        hits = [
            str(i)
            for i, (count, hit) in enumerate(zip(targets, right, strict=True))
            if works and count >= self.rare and self.imbalance * count <= most and hit < self.recalled * count
        ]
        news = judging.hold("class-imbalance", hits, [str(i) for i in range(len(targets))], times=3)
        if news:
            first = int(news[0])
            judging.tell(
                Finding(
                    "class-imbalance",
                    "warning",
                    f"Class {first} is {most / targets[first]:.0f} times rarer than the most frequent one, and {right[first] / targets[first]:.0%} "
                    f"of it is recognised, where {sum(right) / total:.0%} of all items are.",
                    "Weigh the loss or draw rare classes more often, and watch a balanced metric; look at the sampler.",
                ),
                values={"class": first, "count": targets[first], "most": most, "recall": right[first] / targets[first]},
            )
