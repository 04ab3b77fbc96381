"""Prints a report and ends the command with its verdict."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from stethoscope._record import strict

if TYPE_CHECKING:
    from stethoscope._record import Report


def show(audit: Callable[[], Report], *, as_json: bool) -> NoReturn:
    """Run an audit, print what it returns, exit with 0 (fine), 1 (findings) or 2 (it could not be run)."""
    try:
        report = audit()
    except (ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        shown = {field.name: getattr(report, field.name) for field in fields(report) if field.repr}
        typer.echo(json.dumps({"ok": report.ok, **_plain(shown)}, indent=2, allow_nan=False))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(report)
    raise typer.Exit(0 if report.ok else 1)


def say(text: str, *, err: bool = False) -> None:
    """Print, also where the terminal cannot show all letters."""
    code = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    typer.echo(text.encode(code, "replace").decode(code), err=err)


def _plain(value: Any) -> Any:
    """JSON, strict: what is not finite becomes a string, as in run files."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return strict(value)
