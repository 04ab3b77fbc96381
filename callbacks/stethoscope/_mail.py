"""Findings of all ranks on their way to rank 0, through the store of the process group, which no training waits for."""

from __future__ import annotations

import json
import logging
import time
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from stethoscope.sinks._lines import decode_finding, encode_finding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from concurrent.futures import Future

    from stethoscope._errands import Errands
    from stethoscope._parts import Notes
    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record

log = logging.getLogger("stethoscope")

LISTEN_S = 1.0
"""Seconds between two looks of rank 0 at what others have found."""
LAST_WORDS_S = 2.0
"""Seconds for which rank 0 waits, when it closes, for ranks that have a monitor and have not closed it."""
MAX_FINDINGS = 100
"""That a rank passes on; further ones are in its own log and file."""


@dataclass(eq=False)
class Post:
    """The sink of ranks other than 0: leaves findings where rank 0 looks. What fails here is in this rank's log anyway."""

    errands: Errands = field(repr=False)
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
                self._try(partial(_leave, text))

    def close(self) -> None:
        """Tell rank 0 that nothing more comes."""
        done = self._try(lambda store: store.add("closed", 1))
        with suppress(Exception):  # the process may end next
            done.result(LAST_WORDS_S)

    def _try(self, call: Callable[[Any], object]) -> Future[Any]:
        return self.errands.run(lambda: self._call(call))

    def _call(self, call: Callable[[Any], object]) -> None:
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
    errands: Errands = field(repr=False)
    store: Any = field(default=None, repr=False)
    _look: Future[list[Finding]] | None = field(default=None, init=False, repr=False)
    _heard: int = field(default=0, init=False, repr=False)
    _missing: list[int] = field(default_factory=list[int], init=False, repr=False)
    _next: float = field(default=0.0, init=False, repr=False)
    _told: dict[tuple[str, str, str], tuple[int, int]] = field(
        default_factory=dict[tuple[str, str, str], "tuple[int, int]"], init=False, repr=False
    )
    _alike: dict[tuple[str, str, str], set[int]] = field(
        default_factory=dict[tuple[str, str, str], "set[int]"], init=False, repr=False
    )

    def listen(self, own: Sequence[Finding]) -> None:
        """Take what a look has brought, and send for the next, not more often than once in `LISTEN_S`."""
        look = self._look
        if look is not None and look.done():
            self._look = None
            self._take(look, own)
        if self.store is not None and self._look is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + LISTEN_S
            self._look = self.errands.run(self._news)

    def _take(self, look: Future[list[Finding]], own: Sequence[Finding]) -> None:
        try:
            news = look.result(0)
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

    def _last_news(self) -> list[Finding]:
        until = time.monotonic() + LAST_WORDS_S
        while self.store.add("closed", 0) < self.store.add("open", 0) and time.monotonic() < until:
            time.sleep(0.005)
        return self._news()

    def part(self, own: Sequence[Finding]) -> None:
        """Wait a moment for the last words of others, and say on how many ranks a finding was made."""
        if self.store is not None:
            for look in filter(None, [self._look, self.errands.run(self._last_news)]):
                wait([look], LAST_WORDS_S + 1)
                self._take(look, own)
        self.store = self._look = None
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


def _leave(text: str, store: Any) -> None:
    store.set(f"finding/{store.add('findings', 1)}", text)


def _when(finding: Finding) -> tuple[int, int]:
    return (-1 if finding.step is None else finding.step), finding.rank


def _short(evidence: Any) -> dict[str, Any]:
    """Evidence without what is long: the rest is in the rank's own file."""
    return {key: value for key, value in evidence.items() if len(str(value)) <= 1000}
