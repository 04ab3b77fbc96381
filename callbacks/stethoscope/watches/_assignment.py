"""`Assignment`: permutation invariant training that cannot tell its assignments apart."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.probes import Separation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

KEEP = 0.9
FEWEST = 20  # observations, and WARM_UP_STEPS
WARM_UP_STEPS = 100
LEAVE = 4.0
REVISITS = 200  # before the share of flips means something: its standard error is then below 3.5 %
FLIPS = 0.15  # chance is 0.5 for two sources; sound small runs stay below 0.02 after their first quarter


@dataclass(frozen=True)
class Assignment:
    """Reports that PIT cannot tell which output belongs to which reference.

    **What it decides:** the running mean (factor 0.9) of the margin, best less second-best assignment, lies below
    `margin_db` for `hold` observations, after 20 observations and 100 steps. It ends above four times that: 3 dB. The share of
    samples that changed their assignment since their last visit supports it; alone, at 15 % or more of at least 200
    visits, it is an info, since flips between two near-equal assignments are harmless.
    **Finding:** `assignment-ambiguous`. **Cost:** host only, per observation. **Needs:** `probes.Separation`, given
    references or pairwise losses.

    Args:
        phase: of the observations.
        margin_db: in dB, or in the unit of the pairwise losses.
        hold: observations in a row.

    Raises:
        ValueError: a number out of its range.

    Examples:
        >>> from stethoscope.testing import replay, series
        >>> found = replay(Assignment(), series(range(0, 2000, 50), **{"separation/margin_db": 40 * [0.1]}))
        >>> print(found[0].message)
        The best assignment beats the second-best by 0.1 dB only (a sound run reaches several dB).

    References:
        Permutation invariant training: Yu et al. 2017, arXiv:1607.00325.
    """

    _: KW_ONLY
    phase: str = "train"
    margin_db: float = 0.75
    hold: int = 5

    def __post_init__(self) -> None:
        if not self.margin_db > 0 or self.hold < 1:
            raise ValueError(f"margin_db must be > 0 and hold >= 1, not {self.margin_db!r} and {self.hold!r}.")

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The probe that measures the margin."""
        return (Separation(),)

    def init(self) -> State:
        """Nothing seen."""
        return {"seen": 0, "first_step": None, "margin": None, "streak": 0, "active": False, "flips": [0.0, 0.0, False]}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in one step's records; judge where they hold a margin."""
        now = {
            record.name.removeprefix("separation/"): record
            for record in records
            if record.phase == self.phase and record.name.startswith("separation/")
        }
        margin = now.get("margin_db")
        if margin is None or not isinstance(margin.value, (int, float)) or not math.isfinite(margin.value):
            return state, ()
        step, value = margin.step, float(margin.value)
        first = step if state["first_step"] is None else state["first_step"]
        mean = value if state["margin"] is None else KEEP * state["margin"] + (1 - KEEP) * value
        warm = state["seen"] + 1 >= FEWEST and step >= first + WARM_UP_STEPS
        streak = state["streak"] + 1 if warm and mean < self.margin_db else 0
        state = {**state, "seen": state["seen"] + 1, "first_step": first, "margin": mean, "streak": streak}
        flips, found = self._flips(state, now, step) if warm else (state["flips"], [])
        state = {**state, "flips": flips}
        if state["active"]:
            return {**state, "active": mean <= LEAVE * self.margin_db}, found
        if streak < self.hold:
            return state, found
        share = flips[0] / flips[1] if flips[1] else None
        text = f"The best assignment beats the second-best by {mean:.2g} dB only (a sound run reaches several dB)."
        if share is not None and flips[1] >= REVISITS:
            text += f" {100 * share:.0f} % of the samples changed theirs since their last visit."
        evidence = {"margin_db": mean, "flips": share, "revisits": flips[1]}
        advice = (
            "Check the loss wiring: the minimum over permutations of the mean over sources, per item, on references in "
            "one fixed order. Outputs that are alike have no margin either: see separation/out_cos."
        )
        finding = Finding("assignment-ambiguous", "warning", text, advice, step, phase=self.phase, evidence=evidence)
        return {**state, "active": True}, [*found, finding]

    def _flips(self, state: State, now: dict[str, Record], step: int) -> tuple[list[float | bool], list[Finding]]:
        """Flips among the last few hundred visits, weighted by how recent they are."""
        flipped, visits, told = state["flips"]
        share, count = (getattr(now.get(name), "value", None) for name in ("flips", "revisits"))
        if not isinstance(share, (int, float)) or not isinstance(count, (int, float)):
            return state["flips"], []
        if not (math.isfinite(share) and math.isfinite(count) and count > 0):
            return state["flips"], []
        if visits > 2 * REVISITS:
            flipped, visits = flipped / 2, visits / 2
        flipped, visits = flipped + share * count, visits + count
        rate = flipped / visits
        if told or visits < REVISITS or rate < FLIPS:
            return [flipped, visits, told and rate >= FLIPS / 2], []
        text = f"{100 * rate:.0f} % of the samples changed their assignment since their last visit."
        finding = Finding(
            "assignment-ambiguous",
            "info",
            text,
            "Harmless while the margin is small because sources are alike; else lower the learning rate.",
            step,
            phase=self.phase,
            evidence={"flips": rate, "revisits": visits, "margin_db": state["margin"]},
        )
        return [flipped, visits, True], [finding]
