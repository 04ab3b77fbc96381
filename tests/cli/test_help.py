import os
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

import stethoscope
from stethoscope.cli import app

SOURCE = str(Path(stethoscope.__file__).parents[1])


def test_the_command_line_starts_without_torch():
    code = "import sys; from stethoscope.cli import app; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": SOURCE},
    )
    assert done.stdout.strip() == "[]"


def test_help_says_what_to_run_first_and_groups_commands():
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}).output
    order = ["stethoscope demo", "stethoscope run train.py", "explain CODE", "--install-completion"]
    assert [shown.index(each) for each in order] == sorted(shown.index(each) for each in order)
    panels = [
        shown.index(f"─ {each} ─") for each in ("A training", "Reading what was found", "Before or beside a training")
    ]
    assert panels == sorted(panels)


def test_codes_of_findings_are_completed():
    complete = {
        "_STETHOSCOPE_COMPLETE": "complete_bash",
        "COMP_WORDS": "stethoscope explain nonfinite-p",
        "COMP_CWORD": "2",
    }
    code = "import sys; sys.argv = ['stethoscope']; from stethoscope.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **complete, "PYTHONPATH": SOURCE},
    )
    assert done.stdout.split() == ["nonfinite-parameter"]


def test_every_public_name_is_found_where_it_is_asked_for():
    assert set(stethoscope.__all__) <= set(dir(stethoscope))
    assert all(getattr(stethoscope, name) is not None for name in stethoscope.__all__)
    assert not hasattr(stethoscope, "nope")
