"""`stethoscope replay`: runs an incident again, on this machine's CPU."""

from __future__ import annotations

import traceback
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stethoscope.cli._show import show

if TYPE_CHECKING:
    from stethoscope.audits import ReplayReport


def replay(
    incident: Annotated[Path, typer.Argument(help="Folder of an incident, e.g. runs/today/incidents/step3.")],
    model: Annotated[
        str | None,
        typer.Option(help="package.module:name of a model, or of what makes one. Without: what the incident names."),
    ] = None,
    arguments: Annotated[str, typer.Option(help="Keyword arguments that make the model, as JSON.")] = "{}",
    forward: Annotated[str | None, typer.Option(help="Method that was called instead of the model itself.")] = None,
    step: Annotated[
        str | None, typer.Option(help="module:function(model, batch) that returns the loss, for a fault in the loss.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Run an incident again. Exit code 0: the same culprit, 1: the replay differed, 2: it could not be run."""

    def audit() -> ReplayReport:
        from stethoscope import audits
        from stethoscope.cli._model import find, make

        made = make(model, arguments) if model else None
        function: Any = find(step) if step else None
        try:
            return audits.replay(incident, made, forward=forward, step=function)
        except (ValueError, TypeError, OSError, ImportError):
            raise
        except Exception as error:  # of the user's code; Python's own exit code, 1, would say that the replay differed
            traceback.print_exc()
            raise typer.Exit(2) from error

    show(audit, as_json=as_json)
