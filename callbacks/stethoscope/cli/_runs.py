"""`stethoscope runs [DIR]`: which runs there are, and what is wrong with them."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from stethoscope.cli._show import say

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stethoscope._protocols import Run
    from stethoscope._record import Finding

_FURTHER = re.compile(r"\.(rank\d+|\d{3,})\.jsonl\Z|\.rank\d+\.\d{3,}\.jsonl\Z")
"""Files that belong to another one: further ranks, further parts."""
_STEP = re.compile(rb'\{"step":(\d{1,16})[,}]')
_FINDINGS = b'"findings":['


class _Row(NamedTuple):
    path: Path
    run: Run
    last_step: int | None
    findings: tuple[Finding, ...]
    state: str
    written: float


def runs(
    folder: Annotated[Path, typer.Argument(help="Where to look, with all that is below it.", metavar="DIR")] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List runs, the newest first: their steps, their age, whether they go on, and their worst finding.

    Exit code 0; 2 where DIR is no folder.
    """
    if not folder.is_dir():
        say(f"Error: {str(folder)!r} is no folder.", err=True)
        raise typer.Exit(2)
    rows = sorted((row for file in _files(folder) if (row := _row(file)) is not None), key=lambda row: -row.written)
    if as_json:
        typer.echo(json.dumps([_plain(row) for row in rows], indent=2))
    elif rows:
        _print(rows, folder)
    else:
        say(f"No runs below {str(folder)!r}. A run is written by Monitor(..., sinks=['runs/today']).")


def _files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            Path(where, name) for name in sorted(names) if name.endswith(".jsonl") and not _FURTHER.search(name)
        )


def _row(file: Path) -> _Row | None:
    from stethoscope._written import state_of
    from stethoscope.sinks._jsonl import file_of, parts_of
    from stethoscope.sinks._read import HEAD, read_lines

    if not file.is_file():  # opening a pipe waits for somebody who writes
        return None
    try:
        with file.open("rb") as start:
            if start.read(len(HEAD)) != HEAD:  # some other JSON lines
                return None
        ranks = re.compile(re.escape(file.stem) + r"\.rank(\d{1,9})\.jsonl\Z")
        others = (int(match[1]) for other in file.parent.iterdir() if (match := ranks.match(other.name)))
        run, last, findings, files = None, None, [], []
        for rank in (0, *sorted(others)):
            found, lines = read_lines(file, rank=rank)
            run = run or found
            files += parts_of(file_of(file, rank))
            for text, upto in lines:
                step = _STEP.match(text)
                if step and int(step[1]) <= upto:
                    last = max(last or 0, int(step[1]))
                if _FINDINGS in text:
                    findings += _decoded(text)
        written = max(each.stat().st_mtime for each in files)
    except (OSError, ValueError):  # gone meanwhile, not to be read, or written by a newer version
        return None
    if run is None:
        return None
    finished = run.planned_steps is not None and last is not None and last + 1 >= run.planned_steps
    path = file.parent if file.name == "records.jsonl" else file
    return _Row(path, run, last, tuple(findings), state_of(files, finished=finished), written)


def _decoded(text: bytes) -> list[Finding]:
    """The findings of a line; its records, which come before them, are not looked at."""
    from stethoscope.sinks._lines import decode

    try:
        return list(decode({"step": 0, **json.loads(b"{" + text[text.rindex(_FINDINGS) :])}).findings)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return []


def _worst(row: _Row) -> Finding | None:
    from stethoscope._record import SEVERITIES

    roots = [finding for finding in row.findings if not finding.cause] or row.findings
    return max(roots, key=lambda finding: (SEVERITIES.index(finding.severity), -(finding.step or 0)), default=None)


def _plain(row: _Row) -> dict[str, object]:
    worst = _worst(row)
    return {
        "path": str(row.path),
        "id": row.run.id,
        "started": row.run.started,
        "steps": 0 if row.last_step is None else row.last_step + 1,
        "planned_steps": row.run.planned_steps,
        "state": row.state,
        "seconds_since_written": round(time.time() - row.written),
        "findings": len(row.findings),
        "worst": worst and {"code": worst.code, "severity": worst.severity, "step": worst.step, "module": worst.module},
    }


def _print(rows: list[_Row], folder: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stethoscope._written import age

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("state", no_wrap=True)
    table.add_column("written", justify="right", no_wrap=True)
    table.add_column("worst finding", overflow="fold")
    styles = {"error": "bold red", "warning": "yellow", "info": "cyan"}
    for row in rows:
        worst = _worst(row)
        steps = "-" if row.last_step is None else f"{row.last_step + 1:,}"
        planned = f" of {row.run.planned_steps:,}" if row.run.planned_steps else ""
        told = Text("none", style="green")
        if worst is not None:
            where = f" in {worst.module}" if worst.module else ""
            when = "" if worst.step is None else f" at step {worst.step:,}"
            more = f" (+{len(row.findings) - 1})" if len(row.findings) > 1 else ""
            told = Text(f"{worst.severity} {worst.code}{when}{where}{more}", style=styles[worst.severity])
        name = Text(os.path.relpath(row.path, folder))  # names come from the user: no markup in them
        table.add_row(name, f"{steps}{planned}", row.state, f"{age(time.time() - row.written)} ago", told)
    console = Console(highlight=False)
    with console.capture() as captured:
        console.print(table)
    say(captured.get().rstrip("\n"))
