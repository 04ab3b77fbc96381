"""`stethoscope audit checkpoint`: does a file fit a model?"""

from __future__ import annotations

import json
from pathlib import Path  # noqa: TC003  # typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stethoscope.cli._show import show

if TYPE_CHECKING:
    from stethoscope.audits import CheckpointReport


def checkpoint(
    file: Annotated[Path, typer.Argument(help="Checkpoint: .pt .pth .ckpt .bin .safetensors, or a folder of shards.")],
    model: Annotated[
        str | None, typer.Option(help="package.module:name of a model, or of what makes one. Without: the file alone.")
    ] = None,
    arguments: Annotated[str, typer.Option(help="Keyword arguments that make the model, as JSON.")] = "{}",
    config: Annotated[
        str | None, typer.Option(help="Facts about the model, as JSON: compared with the file's.")
    ] = None,
    partial: Annotated[
        list[str] | None, typer.Option(help="Module or pattern left out on purpose. May be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Say what a checkpoint would load, what it lacks and whether it is damaged. Never runs code from the file."""

    def audit() -> CheckpointReport:
        from stethoscope import audits
        from stethoscope.cli._model import make

        facts: Any = json.loads(config) if config else None
        made = make(model, arguments) if model else None
        return audits.checkpoint(made, file, config=facts, partial=partial or ())

    show(audit, as_json=as_json)
