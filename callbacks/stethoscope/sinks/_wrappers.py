"""Sinks around a sink: they let through less of the records and all of the findings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stethoscope._protocols import Run, Sink
    from stethoscope._record import Finding, Record


@dataclass(eq=False)
class OnRank:
    """Lets records through on some ranks only, and findings on every rank.

    On the other ranks the sink inside is opened when the first finding comes, so that a healthy process leaves no
    empty file.

    Args:
        sink: where to write.
        ranks: ranks whose records are written.

    Examples:
        >>> from stethoscope.sinks import Memory
        >>> OnRank(Memory(), ranks=(0, 8)).ranks
        (0, 8)
    """

    sink: Sink
    ranks: tuple[int, ...] = (0,)
    _run: Run | None = field(default=None, init=False, repr=False)
    _opened: bool = field(default=False, init=False, repr=False)

    @property
    def background(self) -> bool:
        """As the sink inside."""
        return bool(getattr(self.sink, "background", False))

    @property
    def folder(self) -> Path | None:
        """Where the sink inside puts further files."""
        return getattr(self.sink, "folder", None)

    def open(self, run: Run) -> None:
        """Open the sink inside, on the ranks that were asked for."""
        self._run = run
        if run.rank in self.ranks:
            self._open_inside(run)

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Pass on what this rank may write."""
        if self._run is None:
            raise RuntimeError("OnRank is not open: call open(run) before write(...).")
        kept = records if self._run.rank in self.ranks else ()
        if not kept and not findings:
            return
        if not self._opened:
            self._open_inside(self._run)
        self.sink.write(step, kept, findings)

    def flush(self) -> None:
        """Have the sink inside write what it holds back."""
        if self._opened:
            _flush(self.sink)

    def close(self) -> None:
        """Close the sink inside, if it was opened."""
        if self._opened:
            self._opened = False
            self.sink.close()
        self._run = None

    def _open_inside(self, run: Run) -> None:
        self.sink.open(run)
        self._opened = True


@dataclass(eq=False)
class Every:
    """Thins out the training's records, and lets all findings through.

    Only records of phase `train` are thinned. A validation is stamped with the last closed step, 99 after 100 steps,
    and would never hit a multiple of anything; what other phases record or log is rare, and always passes.

    Args:
        sink: where to write.
        every: records of phase `train` pass when `step % every == 0`.

    Raises:
        ValueError: `every` is below 1.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.sinks import Memory
        >>> memory = Memory()
        >>> thinned = Every(memory, every=10)
        >>> for step in range(20):
        ...     thinned.write(step, [Record("loss", 1.0, step, source="step")], [])
        >>> [record.step for record in memory.records]
        [0, 10]
    """

    sink: Sink
    every: int

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every={self.every!r} must be a number of steps, at least 1.")

    @property
    def background(self) -> bool:
        """As the sink inside."""
        return bool(getattr(self.sink, "background", False))

    @property
    def folder(self) -> Path | None:
        """Where the sink inside puts further files."""
        return getattr(self.sink, "folder", None)

    def open(self, run: Run) -> None:
        """Open the sink inside."""
        self.sink.open(run)

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Pass on what is due."""
        if step % self.every:
            records = [record for record in records if record.phase != "train"]
        if records or findings:
            self.sink.write(step, records, findings)

    def flush(self) -> None:
        """Have the sink inside write what it holds back."""
        _flush(self.sink)

    def close(self) -> None:
        """Close the sink inside."""
        self.sink.close()


def _flush(sink: Sink) -> None:
    flush = getattr(type(sink), "flush", None)  # an offer of the protocol, not a duty
    if callable(flush):
        flush(sink)
