"""The command line: one file per command, gathered here."""

from __future__ import annotations

import typer

from stethoscope.cli._audio import audio
from stethoscope.cli._causality import causality
from stethoscope.cli._checkpoint import checkpoint
from stethoscope.cli._demo import demo
from stethoscope.cli._explain import explain
from stethoscope.cli._plan import plan
from stethoscope.cli._run import run

app = typer.Typer(
    name="stethoscope",
    help="Sees inside a PyTorch model while it trains.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
audit = typer.Typer(
    help="Checks that run once, before or beside a training. Exit code 0: fine, 1: findings.", no_args_is_help=True
)
app.add_typer(audit, name="audit")
audit.command()(causality)
audit.command()(checkpoint)
audit.command()(audio)
audit.command()(plan)
app.command()(demo)
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(explain)


@app.callback()
def _root() -> None:
    """Keep subcommands even where there is just one."""


def main() -> None:
    """Entry point of `stethoscope` and `python -m stethoscope`."""
    app()
