import doctest
import importlib
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def has_lightning():
    try:
        importlib.import_module("stethoscope.integrations.lightning")
    except ImportError:
        return False
    return True


def run_blocks(text, name):
    """Run a page's Python blocks one after the other; return how many there were."""
    namespace = {"__name__": "__main__"}
    codes = [block["code"] for block in BLOCK.finditer(text) if not block["reason"]]
    codes = [code for code in codes if "lightning" not in code or has_lightning()]
    for code in codes:
        if code.lstrip().startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(code, namespace, name, name, 0)
            assert not doctest.DocTestRunner().run(test, clear_globs=False).failed
            namespace.update(test.globs)
        else:
            exec(compile(code, name, "exec"), namespace)  # our own documentation
    return len(codes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_blocks(page.read_text(encoding="utf-8"), page.name)


def test_a_block_that_fails_is_noticed_and_one_that_says_why_not_is_left_out():
    page = (
        "```python\nx = 1\n```\n\n```python\n>>> x\n1\n```\n<!-- not run: shows an error -->\n```python\n1 / 0\n```\n"
    )
    assert run_blocks(page, "page") == 2
    with pytest.raises(ZeroDivisionError):
        run_blocks("```python\n1 / 0\n```\n", "page")
    with pytest.raises(AssertionError):
        run_blocks("```python\n>>> 1\n2\n```\n", "page")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_within_the_repository_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []


def test_ci_runs_the_command_for_tests_that_the_readme_gives():
    stub = "bash() { printf '%s' \"${@: -1}\"; }; "
    script = (ROOT / ".ci" / "run").read_text()
    body = script.replace('"$(dirname "${BASH_SOURCE[0]}")/.."', f"'{ROOT}'")
    printed = subprocess.run(["bash", "-c", stub + body], capture_output=True, text=True, check=True).stdout
    command = printed.splitlines()[-1]
    assert command in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for check in ("ruff check .", "ruff format --check .", "mypy", "pytest"):
        assert check in command


def test_the_picture_of_the_readme_is_small():
    assert 5_000 < (ROOT / "docs" / "demo.svg").stat().st_size < 60_000
