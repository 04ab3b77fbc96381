"""Every code has a page, every page a code, and a page says what a person needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import stethoscope

PAGES = Path(__file__).parents[1] / "docs" / "findings"
SECTIONS = ["## Symptom", "## Meaning", "## How it is decided", "## What to try", "## A real case"]


def codes() -> set[str]:
    """First arguments and `code=` of all calls of Finding, and constants that are compared with codes."""
    found = set()
    for path in Path(stethoscope.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
                "Finding",
                "replace",
            ):
                given = [
                    *(node.args[:1] if getattr(node.func, "id", "") == "Finding" else []),
                    *(k.value for k in node.keywords if k.arg == "code"),
                ]
                for value in given:
                    found |= {
                        c.value
                        for c in ast.walk(value)
                        if isinstance(c, ast.Constant) and isinstance(c.value, str) and "-" in c.value
                    }
    return found


def pages() -> set[str]:
    return {path.stem for path in PAGES.glob("*.md")}


def test_every_code_has_a_page():
    assert codes() - pages() == set()


@pytest.mark.parametrize("page", sorted(pages()))
def test_a_page_has_the_five_sections_in_order(page):
    lines = (PAGES / f"{page}.md").read_text().splitlines()
    assert lines[0] == f"# {page}"
    assert [line for line in lines if line.startswith("## ")] == SECTIONS
