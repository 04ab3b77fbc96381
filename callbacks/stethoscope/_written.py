"""Tells from the files of a run whether it is still being written."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FRESH = 120
"""Seconds since the last write in which a run may still be written on another machine, whose lock is not seen here."""


def state_of(files: Sequence[Path], *, finished: bool) -> str:
    """Tell whether a run goes on.

    Args:
        files: of one run, the first one first; a sink holds its lock while it writes.
        finished: whether all planned steps were made.

    Returns:
        `writing`; `finished`, all planned steps were made; `just written`, within two minutes, but no lock is seen, since
        the run has just ended or is on another machine; or `ended`.
    """
    if files and _locked(files[0]):
        return "writing"
    if finished:
        return "finished"
    return "just written" if any(time.time() - file.stat().st_mtime < FRESH for file in files) else "ended"


def age(seconds: float) -> str:
    """Write a duration in its largest unit.

    Example:
        >>> age(3), age(200), age(90_000)
        ('3 s', '3 min', '25 h')
    """
    for size, unit in ((172_800, 86_400), (5400, 3600), (100, 60)):
        if seconds >= size:
            return f"{seconds / unit:.0f} {({86_400: 'days', 3600: 'h', 60: 'min'})[unit]}"
    return f"{max(0.0, seconds):.0f} s"


def _locked(file: Path) -> bool:
    """Whether somebody on this machine holds the file's lock.

    Asking must not take the lock, or a sink that opens now would go elsewhere; so the kernel's list is read.
    """
    try:
        locks = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:  # not on Linux
        return False
    held = {line.split()[-3].rpartition(":")[2] for line in locks.splitlines() if " FLOCK " in line}
    return str(file.stat().st_ino) in held
