"""Records of all ranks become one while the training runs, and no rank ever waits for another.

Numbers cross over on the host, when they have arrived there, through connections of our own (gloo): the training's own
process groups are not used, so what happens here can neither delay nor confuse them. A delivery is held back until its
message is complete; what the ranks do not agree on stays with each rank, and is said.
"""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
import torch.distributed as dist

from stethoscope._message import Layout
from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Record

MAX_HELD = 64
"""Deliveries held back, as many as may be on their way from the device: a rank that is further behind does not come."""
MAX_LAYOUTS = 16
"""Kinds of deliveries that are remembered: a few per phase."""
WAIT_S = 10.0
"""Seconds for which `flush` and `close` wait for other ranks. Ranks of one training are milliseconds apart."""
TIMEOUT = timedelta(minutes=10)
"""For a message: a rank may write a checkpoint meanwhile."""
_HEAD = 6
"""Of each message: layout, -layout, step, -step, sums wanted, peaks wanted. The largest over ranks tells whether all agree."""


@dataclass(eq=False)
class _Held:
    """A delivery, and what to do with its records; nothing where none is to be combined."""

    records: list[Record]
    layout: Layout | None


@dataclass(eq=False)
class _Message:
    """What is under way for the oldest delivery."""

    moment: int
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
        self._layouts: dict[tuple[str, int], Layout] = {}
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
            self._held.append(_Held(records, None if self._off else self._lay_out(records)))
        until = time.monotonic() + WAIT_S if wait else -math.inf
        while self._held:
            head = self._held[0]
            if head.layout is None or self._off:
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
                closed = (
                    "another rank has closed its monitor or has ended: " if "Connection closed" in str(error) else ""
                )
                self.stop(f"{closed}{type(error).__name__}: {error}")
                continue
            message, self._message = self._message, None
            assert message is not None
            if self._make_room(message):
                continue  # the same delivery again, on all ranks
            combined = self._combined(head.records, head.layout, message)
            if combined is not None:
                self._held.popleft()
                yield combined

    def _done(self, head: _Held) -> bool:
        """Get the message of a delivery on its way, and see whether it is complete. Raises what went wrong with it."""
        if self._group is None:
            self._group = self._connect()
        if not self._ready:
            self._ready = self._all_ready()
            if not self._ready:
                return False
        if self._message is None:
            assert head.layout is not None
            self._message = self._send(head.records, head.layout)
        if not all(work.is_completed() for work in self._message.works):
            return False
        for work in self._message.works:
            work.wait()
        return True

    def _lay_out(self, records: Sequence[Record]) -> Layout | None:
        """The layout of a delivery, made anew when another kind of delivery comes by; None where nothing is combined."""
        if not records:
            return None
        kind = records[0].phase, len(records)
        layout = self._layouts.get(kind)
        if layout is None or not layout.fits(records):
            layout = Layout(records, self._everything, self._run.world_size, self._run.shards)
            self._layouts[kind] = layout
            if len(self._layouts) > MAX_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        return layout if layout.sums else None

    def _send(self, records: Sequence[Record], layout: Layout) -> _Message:
        # a validation after step 50 and step 50 itself are told apart by the phase
        moment = crc32(records[0].phase.encode()) % 1024 + 1024 * records[0].step
        first = torch.full((_HEAD + self._room[1],), -math.inf, dtype=torch.float64, device="cpu")
        second = torch.zeros(self._room[0], dtype=torch.float64, device="cpu")
        head = [layout.checksum, -layout.checksum, moment, -moment, layout.sums, layout.peaks]
        first[:_HEAD] = torch.tensor(head, dtype=torch.float64, device="cpu")
        if layout.sums <= self._room[0] and layout.peaks <= self._room[1]:
            sums, peaks = layout.pack(records)
            second[: layout.sums] = torch.from_numpy(sums)
            first[_HEAD : _HEAD + layout.peaks] = torch.from_numpy(peaks)
        works = [self._group.allreduce([first], _over_ranks(dist.ReduceOp.MAX))]
        if second.numel():
            works.append(self._group.allreduce([second], _over_ranks(dist.ReduceOp.SUM)))
        return _Message(moment, first, second, works)

    def _make_room(self, message: _Message) -> bool:
        """Whether a rank had more to send than fits: all ranks see the same, so all make the same room."""
        wanted = [int(number) for number in message.peaks[4:6].tolist()]
        if wanted[0] <= self._room[0] and wanted[1] <= self._room[1]:
            return False
        self._room = max(wanted[0], self._room[0]), max(wanted[1], self._room[1])
        return True

    def _combined(self, records: list[Record], layout: Layout, message: _Message) -> list[Record] | None:
        """The records to hand over; None where another rank has sent an earlier delivery: it keeps that, and catches up."""
        checksum, minus_checksum, last, minus_first = message.peaks[:4].tolist()
        if checksum != -minus_checksum or last != -minus_first:
            self._differ(-minus_first // 1024, last // 1024)
            return records if message.moment == -minus_first else None
        sums, peaks = message.sums[: layout.sums], message.peaks[_HEAD : _HEAD + layout.peaks]
        return layout.unpack(records, sums.numpy(), peaks.numpy())

    def _differ(self, first: float, last: float) -> None:
        if self._said or self._run.rank:
            return
        self._said = True
        what = (
            f"some are at step {first:g} when others are at step {last:g}"
            if first != last
            else f"at step {last:g} they have measured different phases, modules or parameters"
        )
        self._notes.pending.append(
            Finding(
                "ranks-not-reduced",
                "warning",
                f"The records of the {self._run.world_size} ranks cannot be combined: {what}. Each rank keeps its own there; what "
                "all have is combined, and the training is not affected.",
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
