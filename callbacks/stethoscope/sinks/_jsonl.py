"""Writes a run as lines of JSON, and knows how its files are named."""

from __future__ import annotations

import errno
import logging
import os
import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, ClassVar

from stethoscope.sinks._lines import encode, encode_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from io import FileIO

    from stethoscope._protocols import Run
    from stethoscope._record import Finding, Record


@dataclass(eq=False)
class Jsonl:
    """Writes everything, one line per step or log call, and can be read back by `sinks.read`.

    The first line tells the run (`{"run": {...}}`), each other one is a delivery: `{"step": 50, "records": [{"name":
    "activation/rms", "values": [["enc.0", 0.12], ["enc.1", 0.5, 1]]}], "findings": [...]}` with `[module, value]` or
    `[module, value, call]`. Group fields `phase`, `source`, `kind`, `rank` are left out where they are `train`,
    `probe`, `float`, 0; `step` where it is the line's; `edges` are there for histograms, and the value is then the list
    of counts; `at` gives places in the delivery where groups were interleaved. Strict ASCII JSON: NaN and Inf are the
    strings `"NaN"`, `"Infinity"`, `"-Infinity"`; None is null. In a finding's evidence a string that reads like one of
    these three gets a backslash in front.

    Each line is handed to the operating system before `write` returns, so a killed process loses at most the line that
    it was writing, and what was still on its way here: milliseconds, unless the disk is slow. An existing file is never overwritten: a resumed run goes on, another run follows after it, and a
    second sink that writes to the same place at the same time gets a file of its own, named in the log.

    **Cost:** about 1 ms for 1000 scalars (`tests/benchmarks/bench_sinks.py`), on a thread of its own under a monitor.

    Args:
        path: a name that ends with `.jsonl` is the file, anything else a run folder that gets `records.jsonl`. Ranks
            other than 0 write `<stem>.rank<N>.jsonl`.
        max_bytes: begin the next part, `<stem>.001.jsonl`, `<stem>.002.jsonl` ..., when a file has grown beyond this
            many bytes; None never does. Nothing is deleted.

    Raises:
        ValueError: `max_bytes` is below 1.
        OSError: from `open`, the path cannot be written; from `write`, the disk is full, or the file was deleted.

    Examples:
        >>> from stethoscope._protocols import Run
        >>> from stethoscope.sinks import read
        >>> from stethoscope.testing import series
        >>> folder = "runs/today"
        >>> sink = Jsonl(folder)
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(0, series(loss=[2.0]), [])
        >>> sink.close()
        >>> [delivery.records[0].value for delivery in read(folder)]
        [2.0]
    """

    background: ClassVar[bool] = True

    path: str | Path
    max_bytes: int | None = None
    _run: Run | None = field(default=None, init=False, repr=False)
    _first: Path = field(default=Path(), init=False, repr=False)
    _claim: IO[bytes] | None = field(default=None, init=False, repr=False)
    _file: FileIO | None = field(default=None, init=False, repr=False)
    _part: int = field(default=0, init=False, repr=False)
    _torn: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(
                f"max_bytes={self.max_bytes!r} must be a number of bytes, at least 1, or None for no limit."
            )

    @property
    def folder(self) -> Path | None:
        """The run folder, where further files of the run belong; None where `path` is a file."""
        path = Path(self.path)
        return None if path.suffix == ".jsonl" else path

    def open(self, run: Run) -> None:
        """Create or go on with the file, and write the run's line."""
        self.close()
        wanted = file_of(self.path, run.rank)
        wanted.parent.mkdir(parents=True, exist_ok=True)
        self._first, self._claim = _claim(wanted)
        if self._first != wanted:
            logging.getLogger("stethoscope").warning(
                "%s is being written by another sink; this one writes %s. Give each monitor a folder of its own.",
                wanted,
                self._first,
            )
        self._run = run
        self._part = len(parts_of(self._first)) - 1
        self._open_part()
        self._append(encode_run(run))

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Write one line; nothing where there is nothing to write."""
        if self._file is None or self._run is None:
            raise RuntimeError(f"Jsonl({str(self.path)!r}) is not open: call open(run) before write(...).")
        if not records and not findings:
            return
        line = encode(step, records, findings)
        if self.max_bytes is not None and self._file.tell() >= self.max_bytes:
            self._file.close()
            self._part += 1
            self._open_part()
            self._append(encode_run(self._run, self._part))
        self._append(line)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
        if self._claim is not None:
            _release(self._claim)
        self._file = self._claim = self._run = None

    def _open_part(self) -> None:
        path = part_of(self._first, self._part)
        self._file = path.open("ab", buffering=0)
        self._torn = _ends_inside_a_line(path)

    def _append(self, line: str) -> None:
        assert self._file is not None
        if not os.fstat(self._file.fileno()).st_nlink and not Path(self._file.name).exists():
            raise FileNotFoundError(errno.ENOENT, "The file was deleted while it was being written", self._file.name)
        # After a line that was cut short, by a crash or a full disk, the next one must begin on a line of its own.
        data = ("\n" if self._torn else "").encode() + line.encode("ascii") + b"\n"
        self._torn = True
        if self._file.write(data) != len(data):
            raise OSError(errno.ENOSPC, "Only a part of the line could be written", self._file.name)
        self._torn = False


def file_of(path: str | Path, rank: int = 0) -> Path:
    """Name the first file of a rank.

    Examples:
        >>> file_of("runs/demo").as_posix(), file_of("a.jsonl", rank=2).as_posix()
        ('runs/demo/records.jsonl', 'a.rank2.jsonl')
    """
    path = Path(path)
    file = path if path.suffix == ".jsonl" else path / "records.jsonl"
    return file.with_name(f"{file.stem}.rank{rank}.jsonl") if rank else file


def ranks_of(path: str | Path) -> list[int]:
    """Return the ranks that have written below a path."""
    first = file_of(path)
    name = re.compile(re.escape(first.stem) + r"\.rank(\d+)\.jsonl\Z")
    others = [int(match[1]) for file in first.parent.glob("*.jsonl") if (match := name.match(file.name))]
    return sorted([*others, 0] if first.is_file() else others)


def part_of(first: Path, part: int) -> Path:
    """Name a part; part 0 is the first file itself."""
    return first.with_name(f"{first.stem}.{part:03d}.jsonl") if part else first


def parts_of(first: Path) -> list[Path]:
    """Return the files that exist of one rank, in the order in which they were written; the first one is always listed."""
    name = re.compile(re.escape(first.stem) + r"\.(\d{3,})\.jsonl\Z")
    found = [(int(match[1]), file) for file in first.parent.iterdir() if (match := name.match(file.name))]
    return [first, *(file for _, file in sorted(found))]


def _claim(wanted: Path) -> tuple[Path, IO[bytes] | None]:
    # The lock goes with the process, so a crashed run never blocks the one that resumes it.
    try:
        import fcntl
    except ImportError:  # Windows: two sinks append to one file, line by line
        return wanted, None
    path = wanted
    for number in count(2):
        file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            path = wanted.with_name(f"{wanted.stem}.writer{number}.jsonl")
        except OSError:  # a file system without locks
            file.close()
            return wanted, None
        else:
            break
    return path, file


def _release(file: IO[bytes]) -> None:
    import fcntl

    # A forked worker may still hold the file; closing it here would then leave it locked.
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


def _ends_inside_a_line(path: Path) -> bool:
    if not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) != b"\n"
