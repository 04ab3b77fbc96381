"""Keeps everything in lists."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stethoscope._record import Finding, Record

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Run


@dataclass(eq=False)
class Memory:
    """Keeps all records and findings, for tests and notebooks. Grows without limit; readable after `close` as well.

    Args:
        records: what was written, in order.
        findings: what was written, in order.

    Examples:
        >>> from stethoscope import Record
        >>> memory = Memory()
        >>> memory.write(0, [Record("loss", 2.0, step=0, source="step")], [])
        >>> memory.records[0].value
        2.0
    """

    records: list[Record] = field(default_factory=list[Record])
    findings: list[Finding] = field(default_factory=list[Finding])

    def open(self, run: Run) -> None:
        """Do nothing."""

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Append to the lists."""
        self.records.extend(records)
        self.findings.extend(findings)

    def close(self) -> None:
        """Do nothing."""
