"""Records of all ranks become one while the training runs, and no rank ever waits for another.

Numbers cross over on the host, when they have arrived there, through connections of our own: the training's own process groups
are not used, so what happens here can neither delay nor confuse them. A delivery is held back until its message is complete; what
the ranks do not agree on stays with each rank, and is said.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from concurrent import futures
from functools import partial
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

import torch

from stethoscope._errands import Errands
from stethoscope._message import Layout
from stethoscope._record import JSON, Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from stethoscope._exchange import Answer, Exchange
    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Record

WAIT_S = 5.0
"""Seconds for which `flush` and `close` wait for other ranks, and a step's delivery at least; what is given up is not lost."""
HASTE_S = 0.5
"""The same where this rank ends by an error: whoever has started the ranks may kill them all next, with what they hold back."""
MAX_HELD = 64
"""Deliveries held back for longer than that: with more, the oldest stays per rank. Ranks that share their gradients are one apart."""
MAX_WAIT_S = 60.0
"""Seconds that a delivery is held back however few they are: a rank that is killed takes them along."""
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
    """A delivery, when it came, and the one to hand over in its place; None where nothing of it is combined."""

    records: list[Record]
    since: float
    settled: futures.Future[list[Record]] | None


class _Message(NamedTuple):
    """Numbers of one rank; in the end, of all."""

    moment: int
    peaks: torch.Tensor
    sums: torch.Tensor


class Reduction:
    """Combines the records of all ranks: two sums over all numbers of a delivery at once, one of them a maximum.

    Deliveries are settled one after another on a thread of their own, which may wait for other ranks.

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
        self._errands = Errands("stethoscope-reduce")
        self._room = (0, 0)  # sums and peaks that fit into a message, the same on all ranks
        self._off = False
        self._late = ""  # why this rank waits no longer, if it does not
        self._said: set[str] = set()

    def pass_on(self, arrived: Iterable[list[Record]], *, wait: bool) -> Iterator[list[Record]]:
        """Take deliveries in, and hand them over in the same order once they are complete.

        Args:
            arrived: from the device.
            wait: wait for other ranks, but no longer than `WAIT_S`, or `HASTE_S` where this one ends by an error; what is not complete
                then stays per rank.
        """
        for records in arrived:
            layout = None if self._off else self._lay_out(records)
            settled = None if layout is None else self._begin(records, layout)
            self._held.append(_Held(records, time.monotonic(), settled))
        until = time.monotonic() + _patience() if wait else None
        while self._held and self._ready(self._held[0], until):
            head = self._held.popleft()
            yield head.settled.result() if head.settled is not None and head.settled.done() else head.records
        if self._late and len(self._held) <= MAX_HELD and not self._is_old():
            self._hurry("")

    def _begin(self, records: list[Record], layout: Layout) -> futures.Future[list[Record]] | None:
        try:
            self._exchange = exchange = self._exchange or self._connect()
        except Exception as error:
            self._stop(str(error))
            return None
        return self._errands.run(partial(self._settle, exchange, records, layout))

    def _ready(self, head: _Held, until: float | None) -> bool:
        """Whether the oldest delivery is settled, or to be handed over as it is. Waits until then, if at all."""
        settled, age = head.settled, time.monotonic() - head.since
        if settled is None or self._off:
            return True
        many = len(self._held) > MAX_HELD
        limit = WAIT_S if many else MAX_WAIT_S
        if until is not None:
            futures.wait([settled], max(until - time.monotonic(), 0))
        elif age < limit:
            return settled.done()
        if settled.done():
            return True
        if until is not None:
            self._hurry(f"{_patience():g} s")
            futures.wait([settled], HASTE_S if _is_ending() else GRACE_S)
        else:
            self._hurry(f"{MAX_HELD} deliveries and {limit:g} s" if many else f"one delivery and {limit:g} s")
            if age < limit + GRACE_S:
                return settled.done()
        if not settled.done():
            self._stop("neither the store of the process group nor a rank in the middle of a message answers")
        return True

    def _is_old(self) -> bool:
        return bool(self._held) and time.monotonic() - self._held[0].since >= MAX_WAIT_S

    def _hurry(self, late: str) -> None:
        self._late = late
        if self._exchange is not None:
            self._exchange.hurry(bool(late))

    # -- on a thread of its own --------------------------------------------------------------------------------------

    def _settle(self, exchange: Exchange, records: list[Record], layout: Layout) -> list[Record]:
        """Return what to hand over: those of all ranks, or this rank's own where others have no such delivery."""
        try:
            while not self._off:
                message = self._pack(records, layout)
                answer = exchange.send(message.peaks, message.sums)
                if answer.fate != "together":
                    self._apart(answer, records[0].step)
                    return records
                if self._make_room(message):
                    continue  # the same delivery again, on all ranks
                combined = self._combined(records, layout, message)
                if combined is not None:
                    return combined
        except Exception as error:
            self._stop(_plain(error))
        return records

    def _apart(self, answer: Answer, step: int) -> None:
        """Say why a delivery stays per rank, if this rank knows."""
        if answer.fate == "closed":
            self.close()
            self._say(
                "ended",
                "info",
                f"Another rank has closed its monitor: from step {step} on the records of rank {self._run.rank} are its own. "
                "Nothing is lost.",
            )
        elif answer.partners < self._run.world_size:
            self._stop(f"only {answer.partners} of the ranks take part")
        elif self._late:
            self._say(
                "late",
                "warning" if "deliver" in self._late else "info",
                f"At step {step} another rank was more than {self._late} behind: there each rank keeps its own records, and so "
                "wherever that happens again. Nothing is lost; what all send in time is combined.",
            )

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

    def _pack(self, records: Sequence[Record], layout: Layout) -> _Message:
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
        return _Message(moment, first, second)

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
        self._off = True
        if self._exchange is not None:
            self._exchange.close()


def _patience() -> float:
    """Seconds to wait for other ranks where somebody waits for this one."""
    return min(HASTE_S, WAIT_S) if _is_ending() else WAIT_S


def _is_ending() -> bool:
    """Whether an error is on its way through this call, or has ended the program, which hands over what is left."""
    return sys.exc_info()[0] is not None or hasattr(sys, "last_value")


def _plain(error: Exception) -> str:
    """What torch and gloo say, without their decoration."""
    said = str(error).partition("\n")[0]
    if "Connection closed" in said or "Connection reset" in said:
        return "the connection to another rank was lost; it has died, or its machine is out of reach"
    if "Timed out" in said or "Timeout" in said:
        return "another rank has stopped in the middle of a message"
    return f"{type(error).__name__}: {said}"
