"""Whether the mixture of a separation batch is made of its references."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.probes import Separation
from stethoscope.watches._streaks import Judging, train_values

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

MOST = 0.9
"""Share of items: a few may be silent, or have a source that is hardly in the mixture."""
FITS = 0.8
"""Share of items from which the order, not the mixing, is the matter."""


@dataclass(frozen=True)
class BatchOrder:
    """Looks whether mixtures and references belong together.

    **What it decides:** `batch-order` when 90 % of the items are unrelated to their mixture in three observed training steps in a row: the
    |cos| of the sum of the references with the mixture is below 0.1, and the courses of their levels are no more like those of their own
    mixtures than like those of other items (reverberation and other channels shift samples, not levels). The message says
    whether another item's mixture fits.
    **Cost:** host only, nothing to speak of.   **Needs:** `Separation`, given estimates, references and mixture.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> values = {"separation/unrelated_fraction": [1.0] * 3, "separation/misplaced_fraction": [1.0] * 3}
        >>> [finding.code for finding in replay(BatchOrder(), series(range(3), **values))]
        ['batch-order']
    """

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The probe that measures mixtures."""
        return (Separation(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "seen": False}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        if not any(record.name.startswith("separation/") for record in records):
            return state, ()
        values = train_values(records, "separation/unrelated_fraction", "separation/misplaced_fraction")
        unrelated, misplaced = (found.get("") for found in values.values())
        judging = Judging(state["held"], max(record.step for record in records), times=3, steps=0)
        if unrelated is not None and judging.model("batch-order", unrelated >= MOST):
            judging.tell(_finding(unrelated, misplaced or 0.0))
        return {"held": judging.held, "seen": True}, judging.findings


def _finding(unrelated: float, misplaced: float) -> Finding:
    said = f"{unrelated:.0%} of the mixtures are unrelated to the sum of their references (|cos| below 0.1), in three observed steps in a row"
    if misplaced >= FITS:
        message = f"{said}; another item's mixture fits {misplaced:.0%} of them."
        advice = "Mixtures and references are in different orders: look for a shuffle, sort or permutation of one of the two."
    else:
        message = f"{said}, and no other item's mixture fits."
        advice = "Listen to one item. Look for files paired by position, offsets drawn twice, and references of another data set."
    evidence = {"unrelated": unrelated, "misplaced": misplaced}
    return Finding("batch-order", "warning", message, advice, evidence=evidence)
