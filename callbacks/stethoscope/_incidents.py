"""Where the incidents of a run go, and how many of them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._protocols import Sink
    from stethoscope.audits._incident import Incident

MOST = 10
"""Bundles of one run and rank: each may take 256 MiB and a second."""


class Kept(NamedTuple):
    """What became of a bundle.

    Args:
        folder: where it is; `""` if it was not written.
        text: a sentence for the finding.
    """

    folder: str
    text: str


class Incidents:
    """Writes bundles to `<run folder>/incidents/step<N>[-rank<R>]`, at most ten.

    Args:
        sinks: the first one with a `folder` says where.
        rank: of this process.
    """

    def __init__(self, sinks: Sequence[Sink], rank: int) -> None:
        self._sinks, self._rank, self._count = sinks, rank, 0

    def keep(self, incident: Incident) -> Kept:
        """Write one; never raises."""
        try:
            folders = [each for sink in self._sinks if isinstance(each := getattr(sink, "folder", None), Path)]
        except Exception as error:  # a sink may work it out
            return Kept("", f"The incident could not be written: a sink's folder: {error!r}.")
        if not folders:
            return Kept("", "")
        if self._count == MOST:
            return Kept("", f"It was not kept: {MOST} incidents of this run are.")
        self._count += 1
        rank = f"-rank{self._rank}" if self._rank else ""
        folder = folders[0] / "incidents" / f"step{incident.step}{rank}"
        try:
            from stethoscope.audits._incident import write

            place = write(incident, folder)
        except Exception as error:
            return Kept("", f"The incident could not be written to {folder}: {type(error).__name__}: {error}.")
        return Kept(str(place), f"Run it again on a CPU: stethoscope replay {shlex.quote(str(place))}")
