"""What the ranks of one training tell each other, without a collective and without waiting.

They meet in the store of the process group, a table of keys and values that each rank reads and writes for itself. There
they agree on the name of the run, connect for `_reduce.py`, and pass findings on to rank 0, which may be healthy and alone
has dashboards. What cannot be passed on is still in each rank's own log and file.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from stethoscope._reduce import TIMEOUT, Reduction
from stethoscope.sinks._lines import decode_finding, encode_finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record

log = logging.getLogger("stethoscope")
_c10d: Any = dist  # much of what is there has no types

LISTEN_S = 1.0
"""Seconds between two looks of rank 0 at what others have found; a look takes about 0.1 ms."""
LAST_WORDS_S = 2.0
"""Seconds for which rank 0 waits, when it closes, for ranks that have a monitor and have not closed it."""
STORE_TIMEOUT = timedelta(seconds=5)
MAX_FINDINGS = 100
"""That a rank passes on; further ones are in its own log and file."""


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
        self._store: Any = None
        self._met = False
        self._reduction: Reduction | None = None
        if self._several and (reduce or (reduce is None and run.shards)):
            self._reduction = Reduction(run, bool(reduce), (self._connect, self._all_ready), notes)
        self._post = Post() if self._several and run.rank else None
        self._listener = Listener(notes) if self._several and not run.rank else None

    def sinks(self) -> list[Post]:
        """What takes findings to rank 0."""
        return [self._post] if self._post is not None else []

    def join(self, run: Run) -> Run:
        """Meet the others, once, and return the run under a name that all of them share, unless it is resumed."""
        if self._met or not self._several:
            return run
        self._met = True
        try:
            self._store = _meeting_point(run.rank)
            if self._store is None:
                return run
            if self._post is not None:
                self._post.store = self._store
            if self._listener is not None:
                self._listener.store = self._store
            if run.resumed_from is None:
                run = replace(run, id=self._store.compare_set("id", "", run.id).decode())
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

    def _connect(self) -> Any:
        if self._store is None:
            raise RuntimeError("torch.distributed had no process group when the training began")
        if not dist.is_gloo_available():
            raise RuntimeError("this build of torch has no gloo, over which numbers cross on the host")
        gloo = _c10d.ProcessGroupGloo
        options = gloo._Options()  # noqa: SLF001  # without it, 1,024 ranks would open 1,023 connections each
        options._devices = [gloo.create_default_device(lazy_init=True)]  # noqa: SLF001
        options._timeout = TIMEOUT  # noqa: SLF001
        # a connection is shared by turns, and gloo waits on it for ranks that are late
        store = _c10d.PrefixStore("reduce", self._store.clone())
        group = gloo(store, self._run.rank, self._run.world_size, options)
        self._store.add("ready", 1)
        return group

    def _all_ready(self) -> bool:
        # a message to a rank that never comes could not be taken back
        return bool(self._store.add("ready", 0) >= self._run.world_size)


@dataclass(eq=False)
class Post:
    """The sink of ranks other than 0: leaves findings where rank 0 looks. What fails here is in this rank's log anyway."""

    store: Any = field(default=None, repr=False)
    _posted: int = field(default=0, init=False, repr=False)

    def open(self, run: Run) -> None:
        """Tell rank 0 that there may be findings."""
        self._try(lambda store: store.add("open", 1))

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Leave warnings and errors."""
        for finding in findings:
            if finding.severity != "info" and self._posted < MAX_FINDINGS:
                self._posted += 1
                text = json.dumps(encode_finding(replace(finding, evidence=_short(finding.evidence))))
                self._try(lambda store, text=text: store.set(f"finding/{store.add('findings', 1)}", text))

    def close(self) -> None:
        """Tell rank 0 that nothing more comes."""
        self._try(lambda store: store.add("closed", 1))
        self.store = None

    def _try(self, call: Any) -> None:
        if self.store is None:
            return
        try:
            call(self.store)
        except Exception as error:  # the process group is gone, or rank 0 is
            log.debug("Rank 0 is out of reach: %r", error)
            self.store = None


@dataclass(eq=False)
class Listener:
    """Rank 0's ear: what others have found becomes findings here, with their rank.

    A fault often shows on all ranks at once. Of findings with the same code, module and phase, the first is passed on, in
    order of step and rank; the others are counted, and told when the monitor closes.
    """

    notes: Notes
    store: Any = field(default=None, repr=False)
    _heard: int = field(default=0, init=False, repr=False)
    _missing: list[int] = field(default_factory=list[int], init=False, repr=False)
    _next: float = field(default=0.0, init=False, repr=False)
    _told: dict[tuple[str, str, str], tuple[int, int]] = field(
        default_factory=dict[tuple[str, str, str], "tuple[int, int]"], init=False, repr=False
    )
    _alike: dict[tuple[str, str, str], set[int]] = field(
        default_factory=dict[tuple[str, str, str], "set[int]"], init=False, repr=False
    )

    def listen(self, own: Sequence[Finding], *, now: bool = False) -> None:
        """Look for news, not more often than once in `LISTEN_S`."""
        if self.store is None or (not now and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + LISTEN_S
        try:
            news = self._news()
        except Exception as error:  # the process group is gone
            log.debug("Other ranks are out of reach: %r", error)
            self.store = None
            return
        for finding in own if news else ():
            key = finding.code, finding.module, finding.phase
            self._alike.setdefault(key, set()).add(finding.rank)
            self._told[key] = min(_when(finding), self._told.get(key, _when(finding)))
        for finding in sorted(news, key=_when):
            key = finding.code, finding.module, finding.phase
            self._alike.setdefault(key, set()).add(finding.rank)
            if key not in self._told or _when(finding)[0] < self._told[key][0]:
                self._told[key] = _when(finding)
                self.notes.pending.append(finding)

    def _news(self) -> list[Finding]:
        posted = self.store.add("findings", 0)
        numbers, self._missing = [*self._missing, *range(self._heard + 1, posted + 1)], []
        self._heard = posted
        news = []
        for number in numbers:
            key = f"finding/{number}"
            if self.store.check([key]):
                news.append(decode_finding(json.loads(self.store.get(key))))
            else:
                self._missing.append(number)  # announced, and not yet there
        return news

    def part(self, own: Sequence[Finding]) -> None:
        """Wait a moment for the last words of others, and say on how many ranks a finding was made."""
        until = time.monotonic() + LAST_WORDS_S
        try:
            while self.store is not None and self.store.add("closed", 0) < self.store.add("open", 0):
                if time.monotonic() > until:
                    break
                time.sleep(0.005)
        except Exception as error:
            log.debug("Other ranks are out of reach: %r", error)
        self.listen(own, now=True)
        self.store = None
        for (code, module, phase), ranks in self._alike.items():
            if len(ranks) > 1:
                step, first = self._told[code, module, phase]
                shown = ", ".join(map(str, sorted(ranks)[:8])) + (" ..." if len(ranks) > 8 else "")
                where = f" in {module!r}" if module else ""
                log.warning(
                    "%s%s was found on %d ranks (%s), first on rank %d at step %d.",
                    code,
                    where,
                    len(ranks),
                    shown,
                    first,
                    step,
                )


def _meeting_point(rank: int) -> Any:
    """Return a part of the process group's store for this rank's next monitor, or None where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    store = _c10d.distributed_c10d._get_default_store()  # noqa: SLF001  # there is no public way to it
    store = _c10d.PrefixStore(
        "stethoscope", store.clone()
    )  # a connection of our own: the training may wait on the other
    store.set_timeout(STORE_TIMEOUT)
    return _c10d.PrefixStore(str(store.add(f"monitors/{rank}", 1)), store)


def _when(finding: Finding) -> tuple[int, int]:
    return (-1 if finding.step is None else finding.step), finding.rank


def _short(evidence: Any) -> dict[str, Any]:
    """Evidence without what is long: the rest is in the rank's own file."""
    return {key: value for key, value in evidence.items() if len(str(value)) <= 1000}
