"""Numbers of all ranks become one message, once all ranks have come: nobody starts what another may never take part in.

A message of gloo cannot be taken back: with a rank that never comes, it would hold its connection, and whoever closes that, for
minutes. So each rank announces in the process group's store that it has come to message n, and the fate of that message is
decided there, once and for all ranks: the last one to come says `together`, one that cannot wait any longer says `apart`,
one that closes its monitor says `closed`; whoever is first is right.
"""

from __future__ import annotations

import atexit
import weakref
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch.distributed as dist

from stethoscope import _gloo
from stethoscope._errands import Errands

if TYPE_CHECKING:
    from torch import Tensor

Fate: TypeAlias = Literal["together", "apart", "closed"]
TIMEOUT = timedelta(seconds=60)
"""For a message to which all ranks have come; their threads need the interpreter's lock to send it."""
WAIT = timedelta(minutes=10)
"""How long one look at the store waits, before the next; torch writes a line to standard error then."""
PARTING_S = 1.0
"""Seconds for which closing waits for the store."""


class Answer(NamedTuple):
    """What became of a message.

    Args:
        fate: see above.
        partners: how many ranks have ever sent a message.
    """

    fate: Fate
    partners: int


class Exchange:
    """Messages numbered alike on all ranks, one at a time.

    Args:
        store: of the process group, a part of it for this monitor alone.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._deciding = Errands("stethoscope-decide")
        self._number = -1
        self._old: list[int] = []  # messages that leave keys in the store
        self._group: Any = None
        self._closed = self._hurried = False
        _open.add(self)

    def send(self, largest: Tensor, sums: Tensor) -> Answer:
        """Wait until the fate of the next message is known; where it is `together`, both tensors hold those of all ranks then.

        Args:
            largest: of which the maximum over ranks is wanted.
            sums: to be added up over ranks.

        Raises:
            RuntimeError: the store or a rank is gone.
        """
        if self._closed:
            return Answer("closed", self._ranks)
        if self._group is None:
            self._connect()
        store, number = self._connection, self._number + 1
        self._number = number
        fate: Fate | None = None
        if store.add(f"came/{number}", 1) == self._ranks:
            fate = _decide(store, number, "together")
        elif self._hurried:
            fate = _decide(store, number, "apart")
        while fate is None:
            try:
                store.wait([f"decided/{number}"], WAIT)
            except Exception:
                # a look at the store raises where it is gone
                if self._closed or not store.check([f"came/{number}"]):
                    raise
            else:
                fate = cast("Fate", store.get(f"fate/{number}").decode())
        self._old.append(number)
        self._closed |= fate == "closed"
        if fate != "together":
            return Answer(fate, int(store.add("partners", 0)))
        works = [_gloo.combine(self._group, largest, dist.ReduceOp.MAX)]
        if sums.numel():
            works.append(_gloo.combine(self._group, sums, dist.ReduceOp.SUM))
        for work in works:
            work.wait(TIMEOUT)
        if self._rank == 0:
            for old in self._old[:-1]:  # whoever has come to this message has read the fates of those before
                for key in ("came", "fate", "decided"):
                    store.delete_key(f"{key}/{old}")
        self._old = [number]
        return Answer(fate, self._ranks)

    # -- from another thread -----------------------------------------------------------------------------------------

    def hurry(self, on: bool) -> None:
        """Wait for no rank: the message under way, and later ones until told otherwise, are `apart` unless all have come."""
        if on and not self._hurried:
            self._hurried = on
            number = self._number
            self._deciding.run(lambda: _decide(self._store, number, "apart"))
        self._hurried = on

    def close(self) -> None:
        """Take part in nothing any more, and tell those who come to a message. Waits a moment for the store at most."""
        if self._closed:
            return
        self._closed = True
        with suppress(Exception):  # the store is gone, or slow
            self._deciding.run(self._tell).result(PARTING_S)

    def _tell(self) -> None:
        number = max(self._number, 0)
        while _decide(self._store, number, "closed") in ("apart", "together"):
            number += 1

    def _connect(self) -> None:
        self._connection = self._store.clone()  # on a connection one call waits for another
        self._connection.set_timeout(TIMEOUT)
        self._group = _gloo.connect(self._store.clone(), "gloo", self._rank, self._ranks, TIMEOUT)
        self._connection.add("partners", 1)


_open: weakref.WeakSet[Exchange] = weakref.WeakSet()


@atexit.register
def _close() -> None:
    """Let no thread of a monitor that nobody closed wait in a dying interpreter."""
    for each in list(_open):
        each.close()


def _decide(store: Any, number: int, fate: Fate) -> Fate:
    """Say what is to become of a message; return what does: the first word counts."""
    decided = cast("Fate", store.compare_set(f"fate/{number}", "", fate).decode())
    store.set(f"decided/{number}", "")  # not every store wakes those that wait for what compare_set has set
    return decided
