"""`stethoscope report RUN [RUN2]`: what a run comes to, or where two runs part."""

from __future__ import annotations

import os
import tempfile
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from stethoscope.cli._show import say

if TYPE_CHECKING:
    from stethoscope._record import Severity


class Format(str, Enum):
    """What to write."""

    html = "html"
    markdown = "markdown"
    json = "json"


class FailOn(str, Enum):
    """The least severity that ends the command with 1."""

    error = "error"
    warning = "warning"
    info = "info"
    never = "never"


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a .jsonl file.", metavar="RUN")],
    second: Annotated[Path | None, typer.Argument(help="Another one, to compare with.", metavar="RUN2")] = None,
    form: Annotated[Format, typer.Option("--format", help="Markdown and JSON are printed.")] = Format.html,
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default report.html in the run folder, or beside the file.")
    ] = None,
    fail_on: Annotated[
        FailOn,
        typer.Option(help="Exit with 1 where a finding is this severe, or more. Of two runs, one that RUN lacks."),
    ] = FailOn.warning,
    open_it: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
) -> None:
    """Write a run, or the comparison of two, as one page that can be read offline and sent to somebody.

    Exit code 0: no finding of severity warning or above, 1: there is one (see --fail-on), 2: the run cannot be read, or
    the page cannot be written.

    Example: stethoscope report runs/today --open
    """
    try:
        text, worst, line = _compared(run, second, form) if second is not None else _reported(run, form)
        if output is not None or form is Format.html:
            target = output or (run.parent if run.suffix == ".jsonl" else run) / "report.html"
            try:
                size = _write(target, text)
            except OSError as error:
                _fail(f"The page cannot be written: {error}. Name another place with --output.", error)
            say(line)
            say(f"Report: {target} ({size / 1e6:.1f} MB)")
        else:
            say(text)
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is not installed: pip install "stethoscope[report]".', error)
    except (OSError, ValueError) as error:
        _fail(f"{error}{_hint(run)}" if isinstance(error, FileNotFoundError) else str(error), error)
    if open_it and (output is not None or form is Format.html):
        _show(target)
    order = ("info", "warning", "error")
    failed = worst is not None and fail_on is not FailOn.never and order.index(worst) >= order.index(fail_on.value)
    raise typer.Exit(1 if failed else 0)


def _reported(run: Path, form: Format) -> tuple[str, Severity | None, str]:
    from stethoscope import report as reports
    from stethoscope.report._causes import worst
    from stethoscope.report._facts import verdict

    summary = reports.summarise(run)
    write = {"html": reports.to_html, "markdown": reports.to_markdown, "json": reports.to_json}[form.value]
    said = verdict(summary, reports.causes(summary.findings))
    line = f"{said.severity}: {said.sentence}{f' ({said.place})' if said.place else ''}"
    return write(summary), worst(summary.findings), line


def _compared(run: Path, second: Path, form: Format) -> tuple[str, Severity | None, str]:
    from stethoscope import report as reports
    from stethoscope.report._difference import new_severity, sentence

    comparison = reports.compare(reports.summarise(run), reports.summarise(second))
    write = {
        "html": reports.compared_html,
        "markdown": reports.compared_markdown,
        "json": reports.compared_json,
    }[form.value]
    return write(comparison), new_severity(comparison), sentence(comparison)


def _write(target: Path, text: str) -> int:
    """Write all or nothing: a page that is being looked at is never half there."""
    data = text.encode("utf-8", "replace")
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        Path(name).chmod(0o666 & ~mask)
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return len(data)


def _show(page: Path) -> None:
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        say("No browser could be opened here: open the file yourself.")


def _hint(run: Path) -> str:
    return f" `stethoscope runs {run}` lists the runs below a folder." if run.is_dir() else ""


def _fail(message: str, error: Exception) -> NoReturn:
    say(f"Error: {message}", err=True)
    raise typer.Exit(2) from error
