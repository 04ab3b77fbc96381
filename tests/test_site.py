import ast
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "docs/site/mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(CONFIG), "-d", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder


def public(package):
    tree = ast.parse((ROOT / f"callbacks/stethoscope/{package}/__init__.py").read_text())
    return {name.asname for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names if name.asname}


@pytest.mark.parametrize("package", ["probes", "watches", "sinks", "audits", "report"])
def test_every_public_name_is_in_the_reference(package):
    page = (ROOT / f"docs/api/{package}.md").read_text()
    documented = {
        line.rpartition(".")[2] for line in page.splitlines() if line.startswith(f"::: stethoscope.{package}.")
    }
    assert documented == public(package)


def test_the_site_is_built_without_a_broken_link_and_every_page_can_be_reached(site):
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    start = (site / "index.html").read_text()
    findings = (site / "findings/index.html").read_text()
    for page in pages - {"index.md"}:
        address = page.removesuffix(".md") + "/"
        if page.startswith("findings/"):
            assert f'href="../{address}"' in findings or f'href="{address.removeprefix("findings/")}"' in findings, page
        else:
            assert f'href="{address}"' in start, page


def test_the_site_loads_nothing_from_elsewhere(site):
    class Loaded(HTMLParser):
        def __init__(self):
            super().__init__()
            self.from_elsewhere = []

        def handle_starttag(self, tag, attributes):
            for name, value in attributes:
                loads = (tag, name) in {("link", "href"), ("script", "src"), ("img", "src"), ("iframe", "src")}
                if loads and value and "//" in value:
                    self.from_elsewhere.append(value)

    parser = Loaded()
    for page in [site / "index.html", site / "api/monitor/index.html", site / "findings/index.html"]:
        parser.feed(page.read_text())
    assert not parser.from_elsewhere
