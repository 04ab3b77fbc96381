"""Relates findings with one cause."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Finding, Record


@dataclass(frozen=True)
class Relate:
    """Placeholder until the rules land."""

    def init(self) -> State:
        """See `Diagnosis`."""
        return {}

    def update(
        self, state: State, records: Sequence[Record], findings: Sequence[Finding]
    ) -> tuple[State, Sequence[Finding]]:
        """See `Diagnosis`."""
        return state, findings
