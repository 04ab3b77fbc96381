"""`stethoscope explain CODE`: the page of a finding, in the terminal."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated

import typer

from stethoscope._pages import pages
from stethoscope.cli._show import say


def explain(
    code: Annotated[
        str | None,
        typer.Argument(help="Code of a finding, e.g. nonfinite-activation.", autocompletion=lambda: sorted(pages())),
    ] = None,
) -> None:
    """Print the page of a finding: symptom, meaning, how it is decided, what to try. Without CODE: all codes."""
    from rich.console import Console
    from rich.markdown import Markdown

    console, known = Console(), pages()
    if code is None:
        say("\n".join(known))
    elif code in known:
        with console.capture() as captured:  # a page has bullets, which not every terminal can show
            console.print(Markdown(known[code].read_text(encoding="utf-8")))
        say(captured.get().rstrip("\n"))
    else:
        begun = [each for each in known if len(code) > 2 and each.startswith(code)]
        near = begun or get_close_matches(code, known, n=1)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        say(f"No finding has the code {code!r}.{hint} `stethoscope explain` lists all codes.", err=True)
        raise typer.Exit(2)
