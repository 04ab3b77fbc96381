"""Numbers of all ranks become one message, once all ranks have come: nobody starts what another may never take part in.

A message of gloo cannot be taken back: with a rank that never comes, it would hold its connection, and whoever closes that, for
minutes. So each rank announces in the process group's store that it has come to message n, and the fate of that message is
decided there, once and for all ranks: the last one to come says `together`, one that cannot wait any longer says `apart`,
one that closes its monitor says `closed`; whoever is first is right.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

import torch.distributed as dist

from stethoscope._errands import Errands, leaving

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch import Tensor

_c10d: Any = dist  # much of what is there has no types

Fate: TypeAlias = Literal["together", "apart", "closed"]
TIMEOUT = timedelta(seconds=60)
"""For a message to which all ranks have come; their threads need the interpreter's lock to send it."""
NAP = timedelta(seconds=1)
"""How long one look at the store waits; the thread sees in between whether it is to end."""


class Answer(NamedTuple):
    """What became of a message.

    Args:
        fate: see above.
        partners: how many ranks have ever sent a message.
    """

    fate: Fate
    partners: int


class Exchange:
    """Messages numbered alike on all ranks, one at a time, on a thread of their own.

    Args:
        store: of the process group, a part of it for this monitor alone.
        rank: of this process.
        ranks: how many there are.
    """

    def __init__(self, store: Any, rank: int, ranks: int) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._waiting, self._deciding = Errands("stethoscope-exchange"), Errands("stethoscope-decide")
        self._number = -1
        self._old: list[int] = []  # messages that leave keys in the store
        self._group: Any = None
        self._ended = False

    def send(self, largest: Tensor, sums: Tensor) -> Future[Answer]:
        """Begin the next message; where its fate is `together`, both tensors hold those of all ranks in the end.

        Args:
            largest: of which the maximum over ranks is wanted.
            sums: to be added up over ranks.
        """
        self._number += 1
        number = self._number
        return self._waiting.run(lambda: self._send(number, largest, sums))

    def withdraw(self) -> None:
        """Wait no longer for the message under way: `apart`, unless all have come meanwhile."""
        number = self._number
        self._deciding.run(lambda: _decide(self._store, number, "apart"))

    def close(self) -> None:
        """Take part in nothing any more, and tell those who come to a message. Waits a moment for the store at most."""
        self._ended = True
        told = self._deciding.run(self._tell)
        self._waiting.run(self._leave)
        with suppress(Exception):  # the store is gone, or slow
            told.result(NAP.total_seconds())

    # -- on threads of their own -------------------------------------------------------------------------------------

    def _send(self, number: int, largest: Tensor, sums: Tensor) -> Answer:
        if self._group is None:
            self._connect()
        store = self._connection
        fate = _decide(store, number, "together") if store.add(f"came/{number}", 1) == self._ranks else None
        while fate is None:
            try:
                store.wait([f"fate/{number}"], NAP)
            except Exception:
                # a look at the store raises where it is gone
                if self._ended or leaving.is_set() or not store.check([f"came/{number}"]):
                    raise
            else:
                fate = cast("Fate", store.get(f"fate/{number}").decode())
        self._old.append(number)
        if fate != "together":
            return Answer(fate, int(store.add("partners", 0)))
        works = [self._group.allreduce([largest], _over_ranks(dist.ReduceOp.MAX))]
        if sums.numel():
            works.append(self._group.allreduce([sums], _over_ranks(dist.ReduceOp.SUM)))
        for work in works:
            work.wait(TIMEOUT)
        if self._rank == 0:
            for old in self._old[:-1]:  # whoever has come to this message has read the fates of those before
                store.delete_key(f"came/{old}")
                store.delete_key(f"fate/{old}")
        self._old = [number]
        return Answer(fate, self._ranks)

    def _tell(self) -> None:
        number = max(self._number, 0)
        while _decide(self._store, number, "closed") in ("apart", "together"):
            number += 1

    def _connect(self) -> None:
        if not dist.is_gloo_available():
            raise RuntimeError("this build of torch has no gloo, over which numbers cross on the host")
        self._connection = self._store.clone()  # on a connection one call waits for another
        self._connection.set_timeout(TIMEOUT)
        gloo = _c10d.ProcessGroupGloo
        options = gloo._Options()  # noqa: SLF001  # without it, 1,024 ranks would open 1,023 connections each
        options._devices = [gloo.create_default_device(lazy_init=True)]  # noqa: SLF001
        options._timeout = TIMEOUT  # noqa: SLF001
        store = _c10d.PrefixStore("gloo", self._store.clone())
        self._group = gloo(store, self._rank, self._ranks, options)
        self._connection.add("partners", 1)

    def _leave(self) -> None:
        self._group = None  # its destructor waits for what is under way


def _decide(store: Any, number: int, fate: Fate) -> Fate:
    """Say what is to become of a message; return what does: the first word counts."""
    return cast("Fate", store.compare_set(f"fate/{number}", "", fate).decode())


def _over_ranks(operation: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    return options
