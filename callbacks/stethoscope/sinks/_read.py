"""Reads back what `Jsonl` wrote."""

from __future__ import annotations

import json
import logging
import math
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.sinks._jsonl import file_of, parts_of, ranks_of
from stethoscope.sinks._lines import FORMAT, Delivery, decode, decode_run
from stethoscope.sinks._merge import of_one_run, together

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from stethoscope._protocols import Run


HEAD = b'{"run":'
MAX_LINE = 256 * 2**20
"""Bytes; a step of 100,000 modules takes a quarter. A crash may leave a hole of zeros of any size, without an end of line."""


class _Section(NamedTuple):
    """One opening of the sink: a run, or a run that was resumed."""

    run: Run
    upto: float
    """Records of later steps are made again by the resumed run that follows."""


def read(path: str | Path, *, rank: int | None = 0) -> Iterator[Delivery]:
    """Iterate over a run's deliveries as they were written, without holding more than one of them.

    Where the place was used by several runs, the last one is read. Where that run was resumed, steps that it made twice
    are read once, in their second form; findings are all kept. Lines that cannot be read are skipped, counted and
    reported in the log, so a file that is still being written, or was torn by a crash, can be read as well.

    Args:
        path: what was given to `Jsonl`: a run folder or a `.jsonl` file.
        rank: whose file to read. None reads those of all ranks as one run: what a step or a log call has brought on
            each of them is one delivery, the records combined as docs/distributed.md says, the findings in order of step
            and rank, so that the first one tells where it began. What has no operation stays a record per rank.

    Returns:
        An iterator over `Delivery(step, records, findings)`; of one rank, record for record equal to what was written.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: the file was written by a newer stethoscope.

    Examples:
        >>> from stethoscope._protocols import Run
        >>> from stethoscope.sinks import Jsonl
        >>> from stethoscope.testing import series
        >>> file = "today.jsonl"
        >>> sink = Jsonl(file)
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(7, series([7], loss=[0.5]), [])
        >>> sink.close()
        >>> next(read(file)).step
        7
    """
    if rank is None:
        runs = {each: read_run(path, rank=each) for each in ranks_of(path)}
        if not runs:
            _files(path, 0)  # says what is missing
        chosen = of_one_run(runs)
        return together({each: read(path, rank=each) for each in chosen}, runs[chosen[0]])
    files = _files(path, rank)
    return _deliveries(files, _sections(files))


def read_run(path: str | Path, *, rank: int = 0) -> Run:
    """Read the facts about the run that `read` would iterate over, as they were when it was last opened.

    Args:
        path: a run folder or a `.jsonl` file.
        rank: whose file to read.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: no line tells about a run, or the file was written by a newer stethoscope.
    """
    sections = _sections(_files(path, rank))
    if not sections:
        raise ValueError(f"{file_of(path, rank)} has no line that tells about a run: it was not written by Jsonl.")
    return sections[-1].run


def read_lines(path: str | Path, *, rank: int = 0) -> tuple[Run | None, Iterator[tuple[bytes, float]]]:
    """Find the run and iterate over the lines that `read` would decode, for those who need to be faster than that.

    Returns:
        The run, None where no line tells about one; and an iterator over each line and the step up to which its records
        count: those of later steps were made again by a resumed run. Findings always count. Lines may be torn.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: the file was written by a newer stethoscope.
    """
    files = _files(path, rank)
    sections = _sections(files)
    return sections[-1].run if sections else None, _current(files, sections)


def _files(path: str | Path, rank: int) -> list[Path]:
    first = file_of(path, rank)
    if not first.is_file():
        raise FileNotFoundError(
            f"No records at {str(first)!r}. Give the folder or the .jsonl file that was given to sinks.Jsonl, and a rank that ran."
        )
    return parts_of(first)


def _lines(files: Sequence[Path]) -> Iterator[bytes]:
    """Lines; of one that is too long the beginning, which cannot be read and is counted."""
    for file in files:
        with file.open("rb") as lines:
            while line := lines.readline(MAX_LINE):
                whole = len(line) < MAX_LINE or line.endswith(b"\n")
                yield line if whole else line[:80]
                while not whole:
                    line = lines.readline(2**20)
                    whole = not line or line.endswith(b"\n")


def _sections(files: Sequence[Path]) -> list[_Section]:
    heads = (_parse(text) for text in _lines(files) if text.startswith(HEAD))
    runs = [run for line in heads if line is not None and (run := _opening(line)) is not None]
    sections: list[_Section] = []
    upto = math.inf
    for run in reversed(runs):
        sections.append(_Section(run, upto if run.id == runs[-1].id else -1))
        if run.id == runs[-1].id and run.resumed_from is not None:
            upto = min(upto, run.resumed_from)
    return sections[::-1]


def _deliveries(files: Sequence[Path], sections: Sequence[_Section]) -> Iterator[Delivery]:
    skipped = 0
    for text, upto in _current(files, sections):
        line = _parse(text)
        try:
            delivery = decode(line or {})
            late = delivery.step > upto
        except (LookupError, TypeError, ValueError, AttributeError):
            skipped += 1
            continue
        if not late:
            yield delivery
        elif delivery.findings:
            yield delivery._replace(records=())
    if skipped:
        logging.getLogger("stethoscope").warning("%s: %d lines could not be read and were skipped.", files[0], skipped)


def _current(files: Sequence[Path], sections: Sequence[_Section]) -> Iterator[tuple[bytes, float]]:
    """The lines of the last run but for those that open it, each with the step up to which its records count."""
    last = sections[-1].run.id if sections else ""
    coming = iter(sections)
    section: _Section | None = None
    for text in _lines(files):
        if text.isspace():
            continue
        if text.startswith(HEAD):
            line = _parse(text)
            if line is not None:
                section = next(coming, section) if _opening(line) is not None else section
                continue
        if section is None:
            yield text, math.inf
        elif section.run.id == last:
            yield text, section.upto


def _opening(line: dict[str, Any]) -> Run | None:
    """The run that begins or goes on here; None where a file is only continued in its next part."""
    try:
        return None if line.get("part") else decode_run(line)
    except (LookupError, TypeError, ValueError, AttributeError):
        return None


def _parse(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    if line.get("format", FORMAT) != FORMAT:
        raise ValueError(f"This file has format {line['format']!r}; this stethoscope reads format {FORMAT}. Update it.")
    return line
