"""What the ranks of one training tell each other, without a collective of the training and without holding it up.

They meet in the store of the process group, a table of keys and values that each rank reads and writes for itself. There
they agree on the name of the run, pass findings on to rank 0 (`_mail.py`), which may be healthy and alone has dashboards, and
combine records (`_reduce.py`). What cannot be passed on is still in each rank's own log and file.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from stethoscope._errands import Errands
from stethoscope._exchange import Exchange
from stethoscope._mail import Listener, Post
from stethoscope._reduce import Reduction

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record

log = logging.getLogger("stethoscope")
_c10d: Any = dist  # much of what is there has no types

MEET_TIMEOUT = timedelta(seconds=5)
"""For the store at the first step, which waits for it."""
STORE_TIMEOUT = timedelta(seconds=60)
"""For the store later on, when nobody waits."""


class Ranks:
    """One rank among several; alone, it does nothing.

    Args:
        run: of this rank.
        reduce: combine all records (True), only parts of a whole (None), or none (False).
        notes: where to say what goes wrong.
    """

    def __init__(self, run: Run, reduce: bool | None, notes: Notes) -> None:
        self._run, self._notes = run, notes
        self._several = run.world_size > 1
        self.store: Any = None
        """A part of the process group's store for this monitor alone; None before `join`, or where there is none."""
        self._met = False
        self._reduction: Reduction | None = None
        if self._several and (reduce or (reduce is None and run.shards)):
            self._reduction = Reduction(run, bool(reduce), self._connect, notes)
        errands = Errands("stethoscope-ranks")
        self._post = Post(errands) if self._several and run.rank else None
        self._listener = Listener(notes, errands) if self._several and not run.rank else None

    def sinks(self) -> list[Post]:
        """What takes findings to rank 0."""
        return [self._post] if self._post is not None else []

    @property
    def hold_back(self) -> bool:
        """Whether deliveries may have to wait for other ranks."""
        return self._reduction is not None

    def join(self, run: Run) -> Run:
        """Meet the others, once, and return the run under a name that all of them share, unless it is resumed."""
        if self._met or not self._several:
            return run
        self._met = True
        try:
            store = _meeting_point(run.rank)
            if store is None:
                return run
            if run.resumed_from is None:
                run = replace(run, id=store.compare_set("id", "", run.id).decode())
            store.set_timeout(STORE_TIMEOUT)
            self.store = store
            if self._post is not None:
                self._post.store = store
            if self._listener is not None:
                self._listener.store = store
        except Exception as error:  # without each other, ranks observe themselves all the same
            log.debug("The ranks do not meet: %r", error)
        return run

    def pass_on(self, arrived: Iterable[list[Record]], own: Sequence[Finding], *, wait: bool) -> Iterator[list[Record]]:
        """Combine the records of all ranks, see `Reduction`; then, on rank 0, ask what other ranks have found.

        Args:
            arrived: from the device.
            own: what this monitor has found so far.
            wait: for other ranks, a moment.
        """
        yield from arrived if self._reduction is None else self._reduction.pass_on(arrived, wait=wait)
        if self._listener is not None:
            self._listener.listen(own)

    def part(self, own: Sequence[Finding]) -> None:
        """Say the last words, and hear those of others."""
        if self._reduction is not None:
            self._reduction.close()
        if self._listener is not None:
            self._listener.part(own)

    def _connect(self) -> Exchange:
        if self.store is None:
            raise RuntimeError("torch.distributed had no process group when the training began")
        return Exchange(_c10d.PrefixStore("reduce", self.store), self._run.rank, self._run.world_size)


def _meeting_point(rank: int) -> Any:
    """Return a part of the process group's store for this rank's next monitor, or None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    store = _c10d.distributed_c10d._get_default_store()  # noqa: SLF001  # there is no public way to it
    # a connection of our own: the training may wait on the other
    store = _c10d.PrefixStore("stethoscope", store.clone())
    store.set_timeout(MEET_TIMEOUT)
    return _c10d.PrefixStore(str(store.add(f"monitors/{rank}", 1)), store)
