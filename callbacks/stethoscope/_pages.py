"""Where the pages of findings lie."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent


def pages() -> dict[str, Path]:
    """Find the pages by their codes: inside of an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "_findings", _PACKAGE.parents[1] / "docs" / "findings"):
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.md"))}
    return {}
