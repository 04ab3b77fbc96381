"""`stethoscope explain CODE`: the page of a finding, in the terminal."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Annotated

import typer

_PACKAGE = Path(__file__).parents[1]


def pages() -> dict[str, Path]:
    """Find the pages by their codes: inside of an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "_findings", _PACKAGE.parents[1] / "docs" / "findings"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.md"))}
    return {}


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
        console.print("\n".join(known), markup=False, highlight=False)
    elif code in known:
        console.print(Markdown(known[code].read_text(encoding="utf-8")))
    else:
        near = get_close_matches(code, known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        typer.echo(f"No finding has the code {code!r}.{hint} `stethoscope explain` lists all codes.", err=True)
        raise typer.Exit(2)
