"""The command line: one file per command, gathered here."""

from __future__ import annotations

import typer

from stethoscope.cli._audio import audio
from stethoscope.cli._causality import causality
from stethoscope.cli._checkpoint import checkpoint
from stethoscope.cli._demo import demo
from stethoscope.cli._explain import explain
from stethoscope.cli._plan import plan
from stethoscope.cli._replay import replay
from stethoscope.cli._report import report
from stethoscope.cli._run import run
from stethoscope.cli._runs import runs

_HELP = """Listens to a PyTorch model while it trains and says what is wrong, where, since when, and what to try first.

- First time here: `stethoscope demo`
- A training script of yours, as it is: `stethoscope run train.py`
- A finding that you do not know: `stethoscope explain CODE`
- Tab completion, of codes too: `stethoscope --install-completion`
"""
_TRAINING, _READING, _BEFORE = "A training", "Reading what was found", "Before or beside a training"

app = typer.Typer(
    name="stethoscope",
    help=_HELP,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
audit = typer.Typer(
    help="Checks that run once, before or beside a training. Exit code 0: fine, 1: findings.", no_args_is_help=True
)
audit.command()(causality)
audit.command()(checkpoint)
audit.command()(audio)
audit.command()(plan)
app.command(rich_help_panel=_TRAINING)(demo)
app.command(rich_help_panel=_TRAINING, context_settings={"allow_interspersed_args": False})(run)
app.command(rich_help_panel=_READING)(explain)
app.command(rich_help_panel=_READING)(report)
app.command(rich_help_panel=_READING)(runs)
app.command(rich_help_panel=_READING)(replay)
app.add_typer(audit, name="audit", rich_help_panel=_BEFORE)


@app.callback()
def _root() -> None:
    """Keep subcommands even where there is just one."""


def main() -> None:
    """Entry point of `stethoscope` and `python -m stethoscope`."""
    app()
