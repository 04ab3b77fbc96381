from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from stethoscope._pages import pages
from stethoscope.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["explain", *arguments])


def test_every_code_is_listed_and_has_a_page_to_print():
    assert run().output.split() == sorted(pages())
    for code in ("nonfinite-activation", "part-disabled"):
        assert "What to try" in run(code).output


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        ("nonfinite-activations", "Did you mean nonfinite-activation?"),
        ("nonfinite", "Did you mean nonfinite-activation or nonfinite-buffer or"),
        ("x", "'x'. `stethoscope explain` lists all"),
    ],
)
def test_an_unknown_code_is_told_with_the_nearest_one(code, hint):
    result = run(code)
    assert result.exit_code == 2
    assert hint in result.output


def test_a_terminal_without_unicode_is_no_reason_to_fail():
    command = [sys.executable, "-m", "stethoscope", "explain", "nonfinite-activation"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "? operation:" in done.stdout
