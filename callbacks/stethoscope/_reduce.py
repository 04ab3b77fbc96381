"""Records of all ranks become one while the training runs, and no rank ever waits for another.

Numbers cross over on the host, when they have arrived there, through connections of our own: the training's own process groups
are not used, so what happens here can neither delay nor confuse them. A delivery is held back until its message is complete; what
the ranks do not agree on stays with each rank, and is said.
"""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent import futures
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import torch

from stethoscope._message import Layout
from stethoscope._record import JSON, Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stethoscope._exchange import Answer, Exchange
    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Record

WAIT_S = 3.0
"""Seconds for which `flush` and `close` wait for other ranks, and a step's delivery at least; what is given up is not lost."""
MAX_HELD = 64
"""Deliveries held back for longer than that: with more, the oldest stays per rank. Ranks that share their gradients are one apart."""
MOST_HELD = 50 * MAX_HELD
"""Deliveries held back at all, where not even the store answers."""
GRACE_S = 5.0
"""Seconds for which the store may take to say that a message is off."""
MAX_LAYOUTS = 16
"""Kinds of deliveries that are remembered: a few per phase."""
_HEAD = 6
"""Of each message: layout, -layout, step, -step, sums wanted, peaks wanted. The largest over ranks tells whether all agree."""

_ADVICE = (
    "Make a monitor on every rank, with the same arguments, and step it equally often; look at what other ranks have said. "
    "Monitor(reduce=False) never combines."
)


class _Held(NamedTuple):
    """A delivery, what to do with its records (None where none is to be combined), and when it came."""

    records: list[Record]
    layout: Layout | None
    since: float


@dataclass(eq=False)
class _Message:
    """What is under way for the oldest delivery."""

    moment: int
    peaks: torch.Tensor
    sums: torch.Tensor
    answer: futures.Future[Answer]
    withdrawn: bool = False


class Reduction:
    """Combines the records of all ranks: two sums over all numbers of a delivery at once, one of them a maximum.

    Args:
        run: of this rank.
        everything: combine all records that have an operation; else only those of parts of a whole.
        connect: makes the way to the other ranks; called at the first delivery that needs it.
        notes: where to say what goes wrong.
    """

    def __init__(self, run: Run, everything: bool, connect: Callable[[], Exchange], notes: Notes) -> None:
        self._run, self._everything, self._connect, self._notes = run, everything, connect, notes
        self._held: deque[_Held] = deque()
        self._layouts: dict[tuple[str, int], Layout] = {}
        self._exchange: Exchange | None = None
        self._message: _Message | None = None
        self._room = (0, 0)  # sums and peaks that fit into a message, the same on all ranks
        self._off = False
        self._said: set[str] = set()

    def pass_on(self, arrived: Iterable[list[Record]], *, wait: bool) -> Iterator[list[Record]]:
        """Take deliveries in, and hand them over in the same order once they are complete.

        Args:
            arrived: from the device.
            wait: wait for other ranks, but no longer than `WAIT_S`; what is not complete then stays per rank.
        """
        for records in arrived:
            layout = None if self._off else self._lay_out(records)
            self._held.append(_Held(records, layout, time.monotonic()))
        until = time.monotonic() + WAIT_S if wait else -math.inf
        while self._held:
            head = self._held[0]
            if head.layout is None or self._off:
                yield self._held.popleft().records
                continue
            try:
                message = self._finished(head, head.layout, until)
            except Exception as error:
                self._stop(_plain(error))
                continue
            if message is None:
                return
            self._message = None
            if not self._together(message, head.records[0].step):
                yield self._held.popleft().records
                continue
            if self._make_room(message):
                continue  # the same delivery again, on all ranks
            combined = self._combined(head.records, head.layout, message)
            if combined is not None:
                self._held.popleft()
                yield combined

    def _finished(self, head: _Held, layout: Layout, until: float) -> _Message | None:
        """Get the message of a delivery on its way; return it once it has an answer. Raises what went wrong with it."""
        if self._exchange is None:
            self._exchange = self._connect()
        if self._message is None:
            self._message = self._send(self._exchange, head.records, layout)
        message, wait = self._message, until > -math.inf
        if wait:
            futures.wait([message.answer], max(until - time.monotonic(), 0))
        late = wait or (len(self._held) > MAX_HELD and time.monotonic() - head.since > WAIT_S)
        if late and not message.answer.done() and not message.withdrawn:
            message.withdrawn = True
            self._exchange.withdraw()
        if wait:
            futures.wait([message.answer], GRACE_S)
        if not message.answer.done():
            if wait or len(self._held) > MOST_HELD:
                raise TimeoutError(
                    "the store of the process group, or a rank in the middle of a message, does not answer"
                )
            return None
        message.answer.result()
        return message

    def _together(self, message: _Message, step: int) -> bool:
        """Whether all ranks have sent the message; say why not, if this rank knows."""
        answer = message.answer.result()
        if answer.fate == "closed":
            self.close()
            self._say(
                "ended",
                "info",
                f"Another rank has closed its monitor: from step {step} on the records of rank {self._run.rank} are its own. "
                "Nothing is lost.",
            )
        elif answer.fate == "apart" and answer.partners < self._run.world_size:
            self._stop(f"only {answer.partners} of the ranks take part")
        elif answer.fate == "apart" and message.withdrawn:
            held = len(self._held) > MAX_HELD
            limit = f"{MAX_HELD} deliveries and {WAIT_S:g} s" if held else f"{WAIT_S:g} s of flush() or close()"
            self._say(
                "late",
                "warning" if held else "info",
                f"At step {step} another rank was more than {limit} behind: there each rank keeps its own records, and so in "
                "later steps for which that holds. Nothing is lost; what all have sent in time is combined.",
            )
        return answer.fate == "together"

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

    def _send(self, exchange: Exchange, records: Sequence[Record], layout: Layout) -> _Message:
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
        return _Message(moment, first, second, exchange.send(first, second))

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
        if self._run.rank:
            return
        what = (
            f"some are at step {first:g} when others are at step {last:g}"
            if first != last
            else f"at step {last:g} they have measured different phases, modules or parameters"
        )
        self._say(
            "differ",
            "warning",
            f"The records of the {self._run.world_size} ranks cannot be combined: {what}. Each rank keeps its own there; what "
            "all have is combined, and the training is not affected.",
            "Give the monitor the same every=, probes and phases on all ranks. Where branches of the model depend on the "
            "data, leave them out with exclude=, or use Monitor(reduce=False).",
            first_step=first,
            last_step=last,
        )

    def _stop(self, why: str) -> None:
        """Combine nothing any more, let go of the other ranks, and say so."""
        self.close()
        self._say(
            "stopped",
            "warning",
            f"The records of the {self._run.world_size} ranks are not combined any more: {why}. From here on each rank "
            "records its own; the training is not affected.",
            why=why,
        )

    def _say(self, reason: str, severity: Severity, message: str, advice: str = _ADVICE, **evidence: JSON) -> None:
        if reason in self._said:
            return
        self._said.add(reason)
        self._notes.pending.append(
            Finding(
                "ranks-not-reduced",
                severity,
                message,
                advice,
                self._notes.step,
                evidence={"reason": reason, **evidence},
            )
        )

    def close(self) -> None:
        """Let go of the other ranks."""
        self._off, self._message = True, None
        exchange, self._exchange = self._exchange, None
        if exchange is not None:
            exchange.close()


def _plain(error: Exception) -> str:
    """What torch and gloo say, without their decoration."""
    said = str(error).partition("\n")[0]
    if "Connection closed" in said or "Connection reset" in said:
        return "the connection to another rank was lost; it has died, or its machine is out of reach"
    if "Timed out" in said or "Timeout" in said:
        return "another rank has stopped in the middle of a message"
    return f"{type(error).__name__}: {said}"
