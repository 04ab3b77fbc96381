"""Records of all ranks become one while the training runs, and no rank ever waits for another.

Numbers cross over on the host, when they have arrived there, through connections of our own (gloo): the training's own
process groups are not used, so what happens here can neither delay nor confuse them. A delivery is held back until its
message is complete; what the ranks do not agree on stays with each rank, and is said.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist

from stethoscope import _combine
from stethoscope._record import Finding, Histogram, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stethoscope._parts import Notes
    from stethoscope._protocols import Run

MAX_HELD = 64
"""Deliveries held back, as many as may be on their way from the device: a rank that is further behind does not come."""
WAIT_S = 10.0
"""Seconds for which `flush` and `close` wait for other ranks. Ranks of one training are milliseconds apart."""
TIMEOUT = timedelta(minutes=10)
"""For a message: a rank may write a checkpoint meanwhile."""
_HEAD = 6
"""Of each message: layout, -layout, step, -step, sums wanted, peaks wanted. The largest over ranks tells whether all agree."""


@dataclass(eq=False)
class _Held:
    """A delivery, and which of its records are to be combined."""

    records: list[Record]
    chosen: list[int]
    terms: list[_combine.Terms] = field(default_factory=list[_combine.Terms])


@dataclass(eq=False)
class _Message:
    """What is under way for the oldest delivery."""

    peaks: torch.Tensor
    sums: torch.Tensor
    works: Sequence[Any]


class Reduction:
    """Combines the records of all ranks: two sums over all numbers of a delivery at once, one of them a maximum.

    Args:
        run: of this rank.
        everything: combine all records that have an operation; else only those of parts of a whole.
        connect: makes the connection to the other ranks, and tells whether all of them have; called from the first
            delivery on that needs it.
        notes: where to say what goes wrong.
    """

    def __init__(
        self, run: Run, everything: bool, connect: tuple[Callable[[], Any], Callable[[], bool]], notes: Notes
    ) -> None:
        self._run, self._everything, self._notes = run, everything, notes
        self._connect, self._all_ready = connect
        self._held: deque[_Held] = deque()
        self._group: Any = None
        self._ready = False
        self._message: _Message | None = None
        self._room = (0, 0)  # sums and peaks that fit into a message, the same on all ranks
        self._off = self._said = False

    def pass_on(self, arrived: Iterable[list[Record]], *, wait: bool) -> Iterator[list[Record]]:
        """Take deliveries in, and hand them over in the same order once they are complete.

        Args:
            arrived: from the device.
            wait: wait for other ranks, but no longer than `WAIT_S`; what is not complete then stays per rank.
        """
        for records in arrived:
            self._held.append(_Held(records, [] if self._off else self._choose(records)))
        until = time.monotonic() + WAIT_S if wait else -math.inf
        while self._held:
            head = self._held[0]
            if not head.chosen or self._off:
                yield self._held.popleft().records
                continue
            try:
                while not (done := self._done(head)) and time.monotonic() < until:
                    time.sleep(0.001)
                if not done:
                    if not wait and len(self._held) <= MAX_HELD:
                        return
                    limit = f"{WAIT_S:g} s" if wait else f"{MAX_HELD} deliveries"
                    self.stop(f"other ranks have not sent theirs within {limit}")
                    continue
            except Exception as error:
                self.stop(f"{type(error).__name__}: {error}")
                continue
            message, self._message = self._message, None
            assert message is not None
            if self._make_room(message):
                continue  # the same delivery again, on all ranks
            self._held.popleft()
            yield self._combined(head, message)

    def _done(self, head: _Held) -> bool:
        """Get the message of a delivery on its way, and see whether it is complete. Raises what went wrong with it."""
        if self._group is None:
            self._group = self._connect()
        if not self._ready:
            self._ready = self._all_ready()
            if not self._ready:
                return False
        if self._message is None:
            self._message = self._send(head)
        if not all(work.is_completed() for work in self._message.works):
            return False
        for work in self._message.works:
            work.wait()
        return True

    def _choose(self, records: Sequence[Record]) -> list[int]:
        """Indices, in an order that is the same on all ranks."""
        chosen = [
            i
            for i, record in enumerate(records)
            if record.source == "probe"
            and (self._everything or _combine.is_part(record))
            and not _combine.is_lone(record)
            and _combine.operation(record)
        ]
        return sorted(chosen, key=lambda i: (records[i].name, records[i].module, records[i].call))

    def _send(self, held: _Held) -> _Message:
        if not held.terms:
            held.terms = [_combine.terms(held.records[i]) for i in held.chosen]
        sums = [number for each in held.terms for number in each.sums]
        peaks = [number for each in held.terms for number in each.peaks]
        named = [held.records[i] for i in held.chosen]
        sizes = (len(record.value.counts) if isinstance(record.value, Histogram) else 1 for record in named)
        layout = crc32(repr([(r.name, r.module, r.call, size) for r, size in zip(named, sizes, strict=True)]).encode())
        # a validation after step 50 and step 50 itself are told apart by the phase
        moment = crc32(named[0].phase.encode()) % 1024 + 1024 * named[0].step
        fits = len(sums) <= self._room[0] and len(peaks) <= self._room[1]
        first = torch.full((_HEAD + self._room[1],), -math.inf, dtype=torch.float64, device="cpu")
        second = torch.zeros(self._room[0], dtype=torch.float64, device="cpu")
        head = [layout, -layout, moment, -moment, len(sums), len(peaks), *(peaks if fits else ())]
        first[: len(head)] = torch.tensor(head, dtype=torch.float64, device="cpu")
        if fits:
            second[: len(sums)] = torch.tensor(sums, dtype=torch.float64, device="cpu")
        works = [self._group.allreduce([first], _over_ranks(dist.ReduceOp.MAX))]
        if second.numel():
            works.append(self._group.allreduce([second], _over_ranks(dist.ReduceOp.SUM)))
        return _Message(first, second, works)

    def _make_room(self, message: _Message) -> bool:
        """Whether a rank had more to send than fits: all ranks see the same, so all make the same room."""
        wanted = [int(number) for number in message.peaks[4:6].tolist()]
        if wanted[0] <= self._room[0] and wanted[1] <= self._room[1]:
            return False
        self._room = max(wanted[0], self._room[0]), max(wanted[1], self._room[1])
        return True

    def _combined(self, held: _Held, message: _Message) -> list[Record]:
        layout, minus_layout, moment, minus_moment = message.peaks[:4].tolist()
        if layout != -minus_layout or moment != -minus_moment:
            self._differ(-minus_moment // 1024, moment // 1024)
            return held.records
        peaks, sums = iter(message.peaks[_HEAD:].tolist()), iter(message.sums.tolist())
        made: dict[int, Record] = {}
        shards = self._run.shards
        for i, each in zip(held.chosen, held.terms, strict=True):
            total = _combine.Terms(tuple(next(sums) for _ in each.sums), tuple(next(peaks) for _ in each.peaks))
            record = held.records[i]._replace(rank=0)
            parts = shards.get(record.module, shards.get("", 1))
            made[i] = _combine.combined(record, total, self._run.world_size, parts)
        return _combine.with_ratios([made.get(i, record) for i, record in enumerate(held.records)])

    def _differ(self, first: float, last: float) -> None:
        if self._said or self._run.rank:
            return
        self._said = True
        what = (
            f"some are at step {first:g} when others are at step {last:g}"
            if first != last
            else f"at step {last:g} they have measured different modules or parameters"
        )
        self._notes.pending.append(
            Finding(
                "ranks-not-reduced",
                "warning",
                f"The records of the {self._run.world_size} ranks cannot be combined: {what}. Each rank keeps its own there; the "
                "training is not affected.",
                "Give the monitor the same every=, probes and phases on all ranks. Where branches of the model depend on the "
                "data, leave them out with exclude=, or use Monitor(reduce=False).",
                self._notes.step,
                evidence={"reason": "differ", "first_step": first, "last_step": last},
            )
        )

    def stop(self, why: str) -> None:
        """Combine nothing any more, let go of the other ranks, and say so."""
        if self._off:
            return
        self._off, self._message = True, None
        group, self._group = self._group, None
        if group is not None:
            group.abort()
        self._notes.pending.append(
            Finding(
                "ranks-not-reduced",
                "warning",
                f"The records of the {self._run.world_size} ranks are not combined any more: {why}. From here on each rank "
                "records its own; the training is not affected.",
                "Make a monitor on every rank, with the same arguments, and step it equally often; look at what other ranks "
                "have said. Monitor(reduce=False) never combines.",
                self._notes.step,
                evidence={"reason": "stopped", "why": why},
            )
        )

    def close(self) -> None:
        """Let go of the other ranks."""
        self._off = True
        group, self._group, self._message = self._group, None, None
        if group is not None:
            group.abort()


def _over_ranks(operation: Any) -> Any:
    options = dist.AllreduceOptions()
    options.reduceOp = operation
    return options
