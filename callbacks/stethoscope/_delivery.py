"""The host side of one monitor: what has arrived goes to watches, to the diagnosis, to sinks, to `on_finding`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stethoscope._diagnosis import Relate
from stethoscope._parts import Notes, asked, by_severity, check_finding, together
from stethoscope._record import JSON, Finding, Record
from stethoscope._secrets import redacted
from stethoscope._writer import Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from stethoscope._protocols import Run, Sink, State, Watch

log = logging.getLogger("stethoscope")

_LEVELS = {"info": logging.DEBUG, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(eq=False)
class _Watching:
    """A watch and its memory."""

    watch: Watch
    key: str
    state: State

    @property
    def urgent(self) -> bool:
        return bool(getattr(self.watch, "urgent", False))


class Delivery:
    """Takes records in and brings findings out.

    Args:
        watches: in the order in which they are asked.
        sinks: opened at the first delivery, when it is known whether a run is resumed.
        on_finding: called last; what it raises propagates.
        rank: of this process, for findings.
        notes: what other parts have to say.
    """

    def __init__(
        self,
        watches: Sequence[Watch],
        sinks: Sequence[Sink],
        on_finding: Callable[[Finding], object] | None,
        rank: int,
        notes: Notes,
    ) -> None:
        self.findings: list[Finding] = []
        self._watching: list[_Watching] = []
        for watch in watches:
            twins = sum(each.watch == watch for each in self._watching)
            self._watching.append(_Watching(watch, f"{watch!r}#{twins}" if twins else repr(watch), watch.init()))
        self._writers = [Writer(sink, notes) for sink in sinks]
        self._on_finding, self._rank, self._notes = on_finding, rank, notes
        self._diagnosis = Relate()
        self._diagnosis_state: State = self._diagnosis.init()
        self._ahead = False  # whether urgent watches are asked before all others

    def ahead(self, arrived: Iterable[list[Record]]) -> Iterator[list[Record]]:
        """Pass on deliveries that may be held back; what is urgent is judged now, and told in this call of `deliver`."""
        self._ahead = True
        for records in arrived:
            self._notes.pending += self._judge(tuple(records), [each for each in self._watching if each.urgent])
            yield records

    def deliver(self, arrived: Iterable[list[Record]], run: Run) -> None:
        """Conclude and write, delivery by delivery, then call `on_finding` for all that was found."""
        told: list[Finding] = []
        for records in arrived:
            if records:
                told += self._conclude(records, run)
        while self._notes.pending:
            told += self._conclude([], run)
        if told and self._on_finding is not None:
            for writer in self._writers:
                writer.flush()  # what it raises may end the process
            for finding in told:
                try:
                    self._on_finding(finding)
                except BaseException as error:
                    asked(error)
                    raise

    def flush(self, run: Run) -> None:
        """Wait until sinks have written everything, and deliver what they had to say meanwhile."""
        for writer in self._writers:
            writer.flush()
        if self._notes.pending:
            self.deliver((), run)
            self.flush(run)

    def _conclude(self, arrived: Sequence[Record], run: Run) -> Sequence[Finding]:
        records = tuple(arrived)  # no part can take anything from what the next one sees
        found = self._judge(records, [each for each in self._watching if not (self._ahead and each.urgent)])
        found = [_redacted(finding) for finding in (*found, *self._notes.take())]
        if self._rank:
            found = [replace(finding, rank=self._rank) for finding in found]
        try:
            self._diagnosis_state, related = self._diagnosis.update(self._diagnosis_state, records, found)
        except Exception as error:
            # a finding without its cause is better than none; what it remembers may come from a damaged checkpoint
            self._diagnosis_state, related = self._diagnosis.init(), found
            self._notes.disabled(self._diagnosis, "diagnosis", error)
        self.findings += related
        for finding in related:
            log.log(_LEVELS[finding.severity], "%s", finding)
        step = records[0].step if records else self._notes.step
        # what all ranks have in common is written once, by rank 0
        own = tuple(record for record in records if record.rank == self._rank) if self._rank else records
        related = tuple(related)
        for writer in self._writers:
            writer.put(run, step, own, related)
        return related

    def _judge(self, records: Sequence[Record], watches: Sequence[_Watching]) -> list[Finding]:
        found: list[Finding] = []
        for watching in watches if records else ():
            try:
                watching.state, new = watching.watch.update(watching.state, records)
                found += [check_finding(each) for each in new]
            except Exception as error:
                self._watching.remove(watching)
                self._notes.disabled(watching.watch, "watch", error)
        return found

    def judge_watches(self, steps: int) -> None:
        """Say which watches have never seen a record of theirs: their state is what it was at the start."""
        starved: list[Watch] = []
        for watch, state in ((each.watch, each.state) for each in self._watching):
            try:
                if steps and state is not None and state == watch.init():
                    starved.append(watch)
            except Exception as error:
                self._notes.disabled(watch, "watch", error)
        for severity, those in by_severity(starved).items():
            names = [type(watch).__name__ for watch in those]
            self._notes.pending.append(
                Finding(
                    "watch-starved",
                    severity,
                    f"{steps} steps have shown none of the records that {together(names)} need{'s' if len(names) == 1 else ''}.",
                    "Give step() or log() what they name, e.g. step(loss=loss, outputs=..., targets=...), where this training has it."
                    + (f" Set up: {', '.join(map(repr, those))}." if severity == "warning" else ""),
                    self._notes.step,
                    evidence={"watches": names},
                )
            )

    def close(self) -> None:
        """Close the sinks, and say what was lost."""
        for writer in self._writers:
            with self._notes.going_on(writer.sink, "closing of the sink"):
                writer.close()
        for finding in self._notes.take():  # nothing comes after
            self.findings.append(finding)
            log.log(_LEVELS[finding.severity], "%s", finding)
        if self._notes.unsaid:
            log.warning("stethoscope itself failed %d times more than it has said in findings.", self._notes.unsaid)

    def state_dict(self) -> dict[str, JSON]:
        """Return what watches and diagnosis remember, as JSON."""
        return {
            "watches": {watching.key: watching.state for watching in self._watching},
            "diagnosis": self._diagnosis_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take that up again; watches that the state does not know start anew."""
        for watching in self._watching:
            watching.state = state["watches"].get(watching.key, watching.state)
        self._diagnosis_state = state["diagnosis"]


def _redacted(finding: Finding) -> Finding:
    """Return it without secrets. One that cannot be searched for them, since what it holds is odd, is told without its text."""
    try:
        return redacted(finding)
    except Exception as error:
        said = f"Its text could not be searched for secrets ({type(error).__name__}) and is left out."
        return replace(finding, message=said, advice="", evidence={})
