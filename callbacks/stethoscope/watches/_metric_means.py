"""Whether the mean that was logged is the mean of the batches that were logged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from stethoscope._record import Finding
from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Record
    from stethoscope.watches._metric_contract import Contract

TOLERANCE = 1e-4
"""Largest honest error of a mean, relative to the largest batch: float32 sums over 1000 batches are off by up to 6e-5."""


class Tally(NamedTuple):
    """What a mean of batches consists of.

    Args:
        batches: finite ones.
        total: sum of value times weight over them.
        weight: sum of their weights; their number where weights are not known.
        low: smallest of them.
        high: largest of them.
        lost: batches that were not finite.
        lost_weight: the sum of the weights of those.
        weighted: whether weights are known.
    """

    batches: int = 0
    total: float = 0.0
    weight: float = 0.0
    low: float = 0.0
    high: float = 0.0
    lost: int = 0
    lost_weight: float = 0.0
    weighted: bool = False

    def add(self, value: float, weight: float | None) -> Tally:
        """Return the tally with one more batch."""
        by = 1.0 if weight is None else weight
        if value - value != 0.0:
            return self._replace(lost=self.lost + 1, lost_weight=self.lost_weight + by)
        return self._replace(
            batches=self.batches + 1,
            total=self.total + value * by,
            weight=self.weight + by,
            low=min(self.low, value) if self.batches else value,
            high=max(self.high, value) if self.batches else value,
            weighted=weight is not None,
        )

    def disagreement(self, shown: float) -> str:
        """Return how a mean that was shown differs from the batches, and why if a known fault explains it; `""` if not.

        With weights it must be the weighted mean to `TOLERANCE`. Without them batches may be of any size, so it must
        only lie between the smallest and the largest, and must not be what a known fault would give. Half a unit of the
        last decimal that is shown is rounding.
        """
        if not self.batches or not self.weight:
            return ""
        allowed = TOLERANCE * max(abs(self.low), abs(self.high), 1e-30)
        decimals = len(repr(shown).partition(".")[2]) if "e" not in repr(shown) else 17
        mean = self.total / self.weight
        if abs(shown - mean) <= max(allowed, 0.5 * 10.0**-decimals) or (self.lost and math.isnan(shown)):
            return ""
        both = self.weight + self.lost_weight
        faults = {
            "its denominator starts at 1": self.total / (self.weight + 1),
            f"its denominator counts {self.lost} non-finite batches that its sum leaves out": self.total / both,
            f"its denominator starts at 1 and counts {self.lost} non-finite batches that its sum leaves out": self.total
            / (both + 1),
            "it is the sum": self.total,
        }
        why, value = min(faults.items(), key=lambda fault: abs(shown - fault[1]))
        exactly = abs(shown - value) <= allowed
        if not exactly and not self.weighted and self.low - allowed <= shown <= self.high + allowed:
            return ""
        # What is shown is often rounded: a fault that explains nine tenths of the gap explains it.
        if not exactly and abs(shown - value) > 0.1 * abs(shown - mean):
            why = ""
        of = f"the mean of the {self.batches} finite batches is {mean:.6g}, shown is {shown:.6g}"
        return f"{of}: {why}" if why else of


def update(contract: Contract, state: State, records: Sequence[Record]) -> tuple[State, list[Finding]]:
    """Take in batches and compare means that are declared with `mean_of`; a mean that was shown begins a new epoch."""
    logged = [record for record in records if record.source == "log" and isinstance(record.value, float)]
    found: list[Finding] = []
    tallies = dict(state.get("means", {}))
    for mean in contract.means:
        field = contract.fields[mean]
        weights = [record.value for record in logged if field.weight and record.name == field.weight]
        for record in logged:
            phase = names.split(record.name).phase or names.phase(record.phase)
            if contract.phases(mean) != ("*",) and phase not in contract.phases(mean):
                continue
            key = f"{mean}|{phase}"
            tally = Tally(*tallies.get(key, ()))
            if record.name == mean:
                if said := tally.disagreement(float(record.value)):  # type: ignore[arg-type]  # a float, see above
                    found.append(disagrees(mean, said, record.step, record.phase, record.rank))
                tallies[key] = list(Tally())
            elif record.name == field.mean_of or names.split(record.name).bare == names.split(field.mean_of).bare:
                tallies[key] = list(tally.add(float(record.value), weights[0] if weights else None))  # type: ignore[arg-type]  # see above
    return {**state, "means": tallies}, found


def disagrees(name: str, said: str, step: int | None, phase: str, rank: int = 0) -> Finding:
    """Say that a mean is not that of its batches."""
    return Finding(
        "metric-aggregate",
        "warning",
        f"{name!r} in the {phase} metrics is not the mean of its batches: {said}.",
        "Start sum and count at 0, leave a non-finite batch out of both and report how many were; "
        "stethoscope.aggregate.Mean does.",
        step,
        phase=phase,
        rank=rank,
        evidence={"metric": name, "said": said},
    )
