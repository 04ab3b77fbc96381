"""Makes the page that lists all findings, from their own pages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.structure.files import Files

HEAD = """# Findings

What stethoscope concludes has a stable code, and each code a page: symptom, meaning, how it is decided, what to try, a real case.
`stethoscope explain CODE` prints it.

| code | symptom |
|---|---|
"""


def on_files(files: Files, config: Any) -> Files:
    """Add the list."""
    pages = sorted((Path(config.docs_dir) / "findings").glob("*.md"))
    rows = [f"| [{page.stem}]({page.name}) | {_symptom(page)} |" for page in pages]
    files.append(File.generated(config, "findings/index.md", content=HEAD + "\n".join(rows) + "\n"))
    return files


def _symptom(page: Path) -> str:
    after = page.read_text(encoding="utf-8").partition("## Symptom")[2].strip()
    first = after.partition("\n\n")[0].replace("\n", " ").replace("|", "")  # a bar would end the cell
    return first if first.endswith((".", "?")) else f"{first} ..."
