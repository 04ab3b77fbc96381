"""Calls that may have to wait for another process, made on a thread of their own: the training never waits for them."""

from __future__ import annotations

import atexit
import weakref
from concurrent.futures import Future, wait
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

_Queue: TypeAlias = "SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]"

PARTING_S = 2.0
"""Seconds for which the end of the process waits for errands: a thread that wakes up in a dying interpreter aborts it."""


class Errands:
    """Makes calls one after another on one daemon thread, which ends when this object is let go of.

    `concurrent.futures` would keep the process alive until the last call has returned.

    Args:
        name: of the thread.

    Examples:
        >>> Errands("stethoscope-example").run(lambda: 6 * 7).result()
        42
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: _Queue = SimpleQueue()
        self._thread: Thread | None = None

    def run(self, call: Callable[[], Any]) -> Future[Any]:
        """Make a call soon; what it returns or raises is in the future."""
        errand: Future[Any] = Future()
        self._queue.put((errand, call))
        if self._thread is None:
            self._thread = Thread(target=_work, args=(self._queue,), name=self._name, daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the interpreter is shutting down
                self._thread = None
                errand.set_exception(error)
                return errand
            # at the end of the process somebody may yet have an errand: `stethoscope run` closes its monitors late
            weakref.finalize(self, self._queue.put, None).atexit = False
            _at_work.add(self)
        return errand


_at_work: weakref.WeakSet[Errands] = weakref.WeakSet()


def _work(queue: _Queue) -> None:
    while (item := queue.get()) is not None:
        errand, call = item
        try:
            result = call()
        except BaseException as error:
            errand.set_exception(error)
        else:
            errand.set_result(result)
        del item, errand, call  # what they hold would live until the next errand


@atexit.register
def _finish() -> None:
    """Let what is under way end; what closes its monitor later at exit still finds its thread."""
    wait([each.run(lambda: None) for each in list(_at_work)], PARTING_S)
