"""Reads a run folder once, line by line, down to tables of bounded size."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import numpy as np

from stethoscope._protocols import Run
from stethoscope._record import Finding
from stethoscope.report._curve import Curve
from stethoscope.report._distribution import Distribution
from stethoscope.report._grid import Grid
from stethoscope.sinks._jsonl import file_of, parts_of
from stethoscope.sinks._lines import decode
from stethoscope.sinks._read import HEAD, read_lines

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T")

MAX_CURVES, MAX_GRIDS, MAX_DISTRIBUTIONS, MAX_FINDINGS = 500, 64, 8, 5000
"""Series, statistics of layers, histograms, findings that are kept; of the rest, the number is."""

Series = tuple[str, str]
"""Name and phase."""

_Step = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class _Group(msgspec.Struct):
    """Records that share all but module, call and value. Values stay text until somebody wants them."""

    name: str
    values: msgspec.Raw
    phase: str = "train"
    source: str = "probe"
    step: _Step | None = None
    edges: msgspec.Raw = msgspec.Raw(b"")


class _Line(msgspec.Struct):
    step: _Step
    records: list[_Group] = msgspec.field(default_factory=list)
    findings: msgspec.Raw = msgspec.Raw(b"")


_INPUTS, _INPUT_RMS = "activation/input_", "activation/input_rms"
"""What a layer takes is what another one has returned: of inputs the rms is enough, and a third of the time is saved."""

_LINE = msgspec.json.Decoder(_Line)
_PLAIN_VALUES = msgspec.json.Decoder(list[tuple[str, float]])
_VALUES = msgspec.json.Decoder(list[list[str | float | None]])


@dataclass
class Summary:
    """A run, small enough to be shown.

    Args:
        path: what was read: a run folder or a file.
        run: facts about the run, of its lowest rank.
        ranks: whose files were read.
        curves: numbers of the whole model, by name and phase.
        grids: numbers of layers, by name and phase.
        distributions: histograms of layers, by name and phase; those of the lowest rank.
        findings: in the order of steps.
        left_out: values of series, and findings, that there was no room for.
        skipped: lines, or parts of lines, that could not be read.
        last_step: the last step that anything was written for; None where nothing was.
        written: when the file was last written to, seconds since 1970.
        ends: the last step of each rank that has written any.
    """

    path: Path
    run: Run
    ranks: tuple[int, ...]
    curves: dict[Series, Curve] = field(default_factory=dict[Series, Curve])
    grids: dict[Series, Grid] = field(default_factory=dict[Series, Grid])
    distributions: dict[Series, Distribution] = field(default_factory=dict[Series, Distribution])
    findings: list[Finding] = field(default_factory=list[Finding])
    left_out: int = 0
    skipped: int = 0
    last_step: int | None = None
    written: float = 0.0
    ends: dict[int, int] = field(default_factory=dict[int, int])


def summarise(path: str | Path) -> Summary:
    """Read a run of any length, all of its ranks, into tables whose size does not grow with it.

    What is joined keeps its smallest and its largest value. Of a folder that several runs were written to, the last
    one is read. Host only; 150 to 300 MB/s, memory up to some hundred MB for very large models.

    Args:
        path: what was given to `sinks.Jsonl`: a run folder or a `.jsonl` file.

    Raises:
        FileNotFoundError: nothing was written there.
        ValueError: the file was written by a newer stethoscope, or nothing in it can be read.

    Examples:
        >>> from stethoscope import sinks, testing
        >>> sink = sinks.Jsonl("runs/summary")
        >>> sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
        >>> sink.write(7, testing.series([7], loss=[0.5]), [])
        >>> sink.close()
        >>> summarise("runs/summary").curves["loss", "train"].points()[0].value
        0.5
    """
    path = Path(path)
    ranks = ranks_of(path)
    # where the first line is damaged, the rest is still worth being read
    run, lines = read_lines(path, rank=ranks[0])
    summary = Summary(path, run or Run("unknown", ""), tuple(ranks))
    for rank in ranks:
        if rank != ranks[0]:
            _, lines = read_lines(path, rank=rank)
        for text, upto in lines:
            step = _take(summary, text, upto, leads=rank == ranks[0])
            if step is not None:
                summary.ends[rank] = max(step, summary.ends.get(rank, 0))
    if summary.skipped and run is None and summary.last_step is None and not summary.findings:
        _refuse_what_is_no_run(file_of(path, ranks[0]))
    summary.findings.sort(key=lambda finding: -1 if finding.step is None else finding.step)
    summary.written = max(file.stat().st_mtime for rank in ranks for file in parts_of(file_of(path, rank)))
    return summary


def ranks_of(path: str | Path) -> list[int]:
    """Find out whose files there are; rank 0 where there are none, so that reading says what is missing."""
    first = file_of(path)
    name = re.compile(re.escape(first.stem) + r"\.rank(\d{1,9})\.jsonl\Z")
    there = first.parent.iterdir() if first.parent.is_dir() else ()
    others = sorted(int(match[1]) for file in there if (match := name.match(file.name)))
    return [0, *others] if first.is_file() or not others else others


def _refuse_what_is_no_run(file: Path) -> None:
    """Raise where nothing could be read, unless the first line is being written at this moment."""
    with file.open("rb") as start:
        if start.read(len(HEAD)) != HEAD:
            raise ValueError(
                f"No line of {str(file)!r} can be read: it was not written by sinks.Jsonl, or is destroyed."
            )


def _take(summary: Summary, text: bytes, upto: float, *, leads: bool) -> int | None:
    """Take a line in; return its step, None where it does not count."""
    try:
        line = _decoded(_LINE, text)
    except (ValueError, RecursionError):
        summary.skipped += 1
        return None
    if line.findings:
        _take_findings(summary, line.findings)
    if line.step > upto:
        return None
    summary.last_step = max(line.step, summary.last_step or 0)
    for group in line.records:
        try:
            _take_group(summary, group, line.step if group.step is None else group.step, leads=leads)
        except (ValueError, TypeError, OverflowError, RecursionError):
            summary.skipped += 1
    return line.step


def _decoded(decoder: msgspec.json.Decoder[_T], text: bytes | msgspec.Raw) -> _T:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:  # names may hold halves of surrogate pairs, which JSON knows and UTF-8 does not
        whole = json.dumps(json.loads(bytes(text)), ensure_ascii=False)
        return decoder.decode(whole.encode("utf-8", "replace"))


def _take_findings(summary: Summary, text: msgspec.Raw) -> None:
    try:
        found = decode({"step": 0, "findings": json.loads(bytes(text))}).findings
        found = tuple(finding for finding in found if _is_sound(finding))
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        summary.skipped += 1
        return
    for finding in found:
        # errors are not crowded out by what is less severe
        room = len(summary.findings) < MAX_FINDINGS * (2 if finding.severity == "error" else 1)
        summary.findings += [finding] if room else []
        summary.left_out += not room
    for finding in found:
        for grid in summary.grids.values():
            grid.want(finding.module)


def _is_sound(finding: Finding) -> bool:
    """Whether the fields have their types, which a damaged line may not hold to."""
    texts = (finding.code, finding.message, finding.advice, finding.module, finding.phase, finding.cause)
    return (
        all(isinstance(text, str) for text in texts)
        and (finding.step is None or (isinstance(finding.step, int) and 0 <= finding.step <= 2**53))
        and isinstance(finding.rank, int)
    )


def _take_group(summary: Summary, group: _Group, step: int, *, leads: bool) -> None:
    key = (group.name, group.phase)
    if group.name.startswith(_INPUTS) and not group.name.startswith(_INPUT_RMS):
        return
    if group.edges:
        if leads and _has_room(summary, summary.distributions, key, MAX_DISTRIBUTIONS):
            summary.distributions.setdefault(key, Distribution()).add(step, group.values, group.edges)
        return
    rows = _rows(group.values)
    if not rows:
        return
    modules, cells, *_ = zip(*rows, strict=False)  # a third cell, the call, is there for some
    if None in cells:
        known = [index for index, cell in enumerate(cells) if cell is not None]
        modules, cells = tuple(modules[i] for i in known), tuple(cells[i] for i in known)
    values: NDArray[np.float64] = np.array(cells, dtype=np.float64)
    if "" in modules:
        # what is given to step(), the loss first of all, is not crowded out by what was logged before it
        if _has_room(summary, summary.curves, key, MAX_CURVES * (2 if group.source == "step" else 1)):
            curve = summary.curves.setdefault(key, Curve())
            for module, value in zip(modules, values.tolist(), strict=True):
                if module == "":
                    curve.add(step, value, leads=leads)
        if len(modules) == 1:
            return
        inner = [index for index, module in enumerate(modules) if module]
        modules, values = tuple(modules[index] for index in inner), values[inner]
    if modules and _has_room(summary, summary.grids, key, MAX_GRIDS):
        summary.grids.setdefault(key, Grid()).add(step, modules, values)


def _rows(values: msgspec.Raw) -> list[tuple[str, float]] | list[list[str | float | None]]:
    try:
        return _decoded(_PLAIN_VALUES, values)
    except msgspec.ValidationError:  # calls, None, NaN or Inf among them: a quarter slower
        return _decoded(_VALUES, values)


def _has_room(
    summary: Summary,
    kept: dict[Series, Curve] | dict[Series, Grid] | dict[Series, Distribution],
    key: Series,
    most: int,
) -> bool:
    there = key in kept or len(kept) < most
    summary.left_out += not there
    return there
