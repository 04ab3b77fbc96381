"""Does the loop still turn? A clock beside the training, for it cannot say itself that it hangs."""

from __future__ import annotations

import logging
from threading import Event, Thread
from time import monotonic
from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("stethoscope")


class Heartbeat:
    """Says that no step has ended for a while; once, until the loop turns again.

    The message goes to `logging` at once, from a thread of its own, since a training that hangs delivers nothing; the finding goes the way of all
    findings when the next step ends. One thread that sleeps; a step costs one assignment.

    Args:
        tell: takes the finding; called on the clock's thread.
        seconds: between two signs of life. SageMaker's StalledTraining has the same 1800.

    Examples:
        >>> heartbeat = Heartbeat(print, seconds=1800)
        >>> heartbeat.beat(0)
        >>> heartbeat.close()
    """

    def __init__(self, tell: Callable[[Finding], object], seconds: float = 1800.0) -> None:
        if not seconds > 0:
            raise ValueError(f"seconds must be above 0, got {seconds}.")
        self._tell, self._seconds = tell, seconds
        self._last, self._step = monotonic(), -1
        self._told = False
        self._closed = Event()
        self._thread: Thread | None = None

    def beat(self, step: int) -> None:
        """A step has ended, or something else has shown that the loop turns. The first beat starts the clock."""
        self._last, self._step, self._told = monotonic(), step, False
        if self._thread is None:
            self._thread = Thread(target=self._watch, name="stethoscope-heartbeat", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while not self._closed.wait(self._seconds / 10):
            silent = monotonic() - self._last
            if silent > self._seconds and not self._told:
                self._told = True
                finding = Finding(
                    "training-stalled",
                    "warning",
                    f"No step has ended for {silent:.0f} s; the last one was step {self._step}.",
                    "Look at the data loader's workers, at other ranks that wait in a collective (NCCL timeouts), at a full disk; "
                    "`py-spy dump --pid` shows where it hangs.",
                    self._step,
                    evidence={"seconds": silent},
                )
                log.warning("%s", finding)
                self._tell(finding)

    def close(self) -> None:
        """Stop the clock. May be called twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=1)
