"""Does the loop still turn? A clock beside the training, for it cannot say itself that it hangs."""

from __future__ import annotations

import logging
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakSet

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("stethoscope")

SECONDS = 1800.0
"""Without a sign of life; SageMaker's StalledTraining has the same."""


class Heartbeat:
    """Says that no step has ended for a while although steps are planned; once, until a step ends.

    Without a plan it says nothing: a loop that hangs and one that is over look alike from here, and in a notebook nobody
    closes the monitor. The message goes to `logging` at once, from a thread of its own, since a training that hangs
    delivers nothing; the finding goes the way of all findings when the next step ends. One thread that sleeps, for all monitors of the
    process; a step costs one look at the clock.

    Args:
        tell: takes the finding; called on the clock's thread.
        seconds: between two signs of life; None takes `SECONDS`.

    Raises:
        ValueError: `seconds` is not above 0.

    Examples:
        >>> heartbeat = Heartbeat(print, seconds=1800)
        >>> heartbeat.beat(0, planned=100)
        >>> heartbeat.close()
    """

    def __init__(self, tell: Callable[[Finding], object], seconds: float | None = None) -> None:
        self._tell, self.seconds = tell, SECONDS if seconds is None else seconds
        if not self.seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds}.")
        self._last, self._step, self._told, self._more = monotonic(), -1, False, False

    def beat(self, step: int | None = None, planned: int | None = None) -> None:
        """A step has ended; or without one: something else shows that the loop turns, such as a metric.

        Args:
            step: that has ended.
            planned: steps of the run; None where unknown.
        """
        self._last, self._told = monotonic(), False
        if step is None:
            return
        self._step, self._more = step, planned is not None and step + 1 < planned
        if self._more and self not in _beating:
            _start(self)

    def look(self) -> None:
        """Tell if it is time to. Called by the clock."""
        silent = monotonic() - self._last
        if self._told or not self._more or silent <= self.seconds:
            return
        self._told = True
        finding = Finding(
            "training-stalled",
            "warning",
            f"No step has ended for {silent:.0f} s; the last one was step {self._step}, and more are planned.",
            "Look at the data loader's workers, at other ranks that wait in a collective (NCCL timeouts), at a full disk; "
            "`py-spy dump --pid` shows where it hangs.",
            self._step,
            evidence={"seconds": silent},
        )
        log.warning("%s", finding)
        self._tell(finding)

    def close(self) -> None:
        """Stop. May be called twice."""
        _beating.discard(self)


_beating: WeakSet[Heartbeat] = WeakSet()
_clock: list[Thread] = []
_sooner = Event()
"""Set when a heartbeat begins, whose limit may be shorter than the clock's nap."""


def _start(heartbeat: Heartbeat) -> None:
    _beating.add(heartbeat)
    _sooner.set()
    if not _clock or not _clock[0].is_alive():
        _clock[:] = [Thread(target=_run, name="stethoscope-heartbeat", daemon=True)]
        _clock[0].start()


def _run() -> None:
    while seconds := [each.seconds for each in list(_beating)]:
        _sooner.wait(min(seconds) / 10)
        _sooner.clear()
        for each in list(_beating):
            each.look()
