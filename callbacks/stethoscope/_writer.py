"""One sink at work: on the training's thread, or on a thread of its own that the training never waits for."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope._record import Finding
from stethoscope._secrets import trace_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._parts import Notes
    from stethoscope._protocols import Run, Sink
    from stethoscope._record import Record

log = logging.getLogger("stethoscope")

MAX_WAITING = 100_000
"""Records that wait for a slow sink, about 20 MB; with more, records are dropped and counted. Findings are never dropped."""

PATIENCE = 30.0
"""Seconds that `flush` waits for a sink that gets nothing done, before it goes on without it; once, until it moves again."""

IDLE = 1.0
"""Seconds without work after which the thread ends, so that a monitor that nobody closes leaves none behind."""


class _Delivery(NamedTuple):
    run: Run
    step: int
    records: Sequence[Record]
    findings: Sequence[Finding]


_FLUSH: Any = object()
"""In the queue: ask the sink for what it holds back itself."""


class Writer:
    """Brings deliveries to one sink, in order, and survives its failures.

    A sink with a true attribute `background` is written from a thread of its own: a slow disk or a service that hangs
    holds up neither the training nor other sinks. All others are written at once, since many logging libraries keep
    their current run in the thread that started it. Under `strict` all are written at once.

    Args:
        sink: opened at the first delivery, when it is known whether a run is resumed.
        notes: where to say that the sink has failed.

    Attributes:
        lost: records and findings that were not written.
    """

    def __init__(self, sink: Sink, notes: Notes) -> None:
        self.sink, self.lost = sink, 0
        self._notes = notes
        self._apart = bool(getattr(sink, "background", False)) and not notes.strict
        self._opened = self._broken = self._late = False
        self._queue: deque[_Delivery] = deque()  # what is being written stays in it until it is written
        self._flushes = callable(getattr(type(sink), "flush", None))
        self._fresh = False  # whether anything came since the sink was flushed
        self._waiting = self._written = 0
        self._given_up = -1  # what was written when `flush` had waited in vain
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._process = os.getpid()

    def put(self, run: Run, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Write, now or soon. Never waits for a sink with a thread of its own."""
        if self._process != os.getpid():
            # The thread did not come along through the fork, and files are shared with the parent, which writes them.
            if not self.lost:
                log.warning("This process is forked from the monitor's: give it a monitor of its own to be observed.")
            self.lost += len(records) + len(findings)
            return
        delivery = _Delivery(run, step, records, findings)
        self._fresh = True
        if not self._apart:
            self._write(delivery)
            return
        with self._changed:
            if self._queue and self._waiting + len(records) > MAX_WAITING:
                self.lost += len(records)
                self._say_late(step)
                delivery = delivery._replace(records=())
            if not delivery.records and not findings:
                return
            self._queue.append(delivery)
            self._waiting += len(delivery.records)
            self._changed.notify_all()
            self._start()
        _at_work.add(self)
        if not self._apart:
            self._work()

    def flush(self) -> bool:
        """Wait until all is written, also what the sink holds back itself, where it has a method `flush`.

        Returns:
            False if the sink has got nothing done for `PATIENCE` seconds, or in a forked process.
        """
        if self._process != os.getpid():
            return False
        if self._fresh and self._flushes and not self._apart:
            self._fresh = False
            self._write(_FLUSH)
        with self._changed:
            if self._fresh and self._flushes and self._apart:
                self._fresh = False
                self._queue.append(_FLUSH)
                self._changed.notify_all()
            while self._queue:
                self._start()
                if not self._apart:
                    self._work()
                    return True
                written = self._written
                if written == self._given_up:
                    return False  # findings and checkpoints come again and again; the training does not wait each time
                if not self._changed.wait(PATIENCE) and written == self._written:
                    self._given_up = written
                    log.warning("%s did not answer for %g s: nothing waits for it until it does.", self._name, PATIENCE)
                    return False
        return True

    def close(self) -> None:
        """Write out what waits and close the sink; say what was lost. Does nothing in a forked process."""
        if self._process != os.getpid():
            return  # its thread may have held the lock at the fork
        if not self.flush():
            with self._changed:
                waiting = [each for each in self._queue if each is not _FLUSH]
                self.lost += sum(len(each.records) + len(each.findings) for each in waiting)
        elif self._opened:
            self._opened = False
            try:
                self.sink.close()
            except Exception as error:
                if self._notes.strict:
                    raise
                tell = log.debug if self._broken else log.error  # of a broken sink enough was said
                tell("Closing %s failed; what it wrote last may be missing.\n%s", self._name, trace_of(error))
        _at_work.discard(self)
        if self.lost:
            log.warning("%s: %d records and findings were not written.", self._name, self.lost)

    @property
    def _name(self) -> str:
        return type(self.sink).__name__

    def _start(self) -> None:
        """Have a thread at work, with the lock held: an interrupt may have come between making one and starting it."""
        if self._apart and (self._thread is None or not self._thread.is_alive()):
            self._thread = threading.Thread(target=self._run, name=f"stethoscope-{self._name}", daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # the interpreter is shutting down, or there are too many threads
                self._thread, self._apart = None, False

    def _run(self) -> None:
        try:
            self._work()
        except (
            BaseException
        ) as error:  # of ours, since a sink's are caught: nothing more can be said of what was written
            with self._changed:
                self._thread = None
                if self._queue:
                    self._fail(self._queue.popleft(), error)
                self._waiting = sum(len(each.records) for each in self._queue if each is not _FLUSH)
                self._written += 1
                self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._queue and (not self._apart or not self._changed.wait_for(lambda: self._queue, IDLE)):
                    self._thread = None
                    return
                delivery = self._queue[0]
            self._write(delivery)
            with self._changed:
                self._queue.popleft()
                self._waiting -= 0 if delivery is _FLUSH else len(delivery.records)
                self._written += 1
                self._changed.notify_all()

    def _write(self, delivery: _Delivery) -> None:
        if delivery is _FLUSH:
            self._flush_sink()
            return
        run, step, records, findings = delivery
        if not self._broken:
            try:
                if not self._opened:
                    self._opened = True
                    self.sink.open(run)
                self.sink.write(step, records, findings)
            except Exception as error:
                self._fail(delivery, error)
        else:
            self.lost += len(records) + len(findings)

    def _flush_sink(self) -> None:
        if self._opened and not self._broken:
            try:
                self.sink.flush()  # type: ignore[attr-defined]  # an offer of the protocol, not a duty
            except Exception as error:
                self._fail(_FLUSH, error)

    def _fail(self, delivery: _Delivery, error: BaseException) -> None:
        self._broken = True
        self.lost += 0 if delivery is _FLUSH else len(delivery.records) + len(delivery.findings)
        self._notes.disabled(self.sink, "sink", error)

    def _say_late(self, step: int) -> None:
        if self._late:
            return
        self._late = True
        self._notes.pending.append(
            Finding(
                "records-lost",
                "warning",
                f"{self._name} is {MAX_WAITING} records behind the training: what comes now is dropped until it catches up. "
                "Findings are kept.",
                "The disk or the service behind it is too slow: observe more rarely (every=), or wrap the sink in "
                "sinks.Every. Other sinks have everything.",
                step,
                evidence={"sink": self._name, "waiting": MAX_WAITING},
            )
        )


_at_work: weakref.WeakSet[Writer] = weakref.WeakSet()


@atexit.register
def _finish() -> None:
    """Write out what a monitor that nobody closed has left."""
    for writer in list(_at_work):
        if writer._process == os.getpid() and not writer.flush():  # noqa: SLF001 - a fork's parent writes itself
            log.warning("%s did not answer; what it had to write is lost.", type(writer.sink).__name__)
