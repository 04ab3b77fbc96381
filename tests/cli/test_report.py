import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stethoscope import Finding, Record, sinks
from stethoscope._protocols import Run
from stethoscope.cli import app


def run(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


@pytest.fixture
def make(tmp_path):
    def write(name, severity=None, text="The loss is NaN."):
        sink = sinks.Jsonl(tmp_path / name)
        sink.open(Run(name, "2026-01-01T00:00:00+00:00", planned_steps=10))
        found = [Finding("nonfinite-loss", severity, text, "Look.", 3)] if severity else []
        for step in range(4):
            sink.write(step, [Record("loss", 1.0, step, source="step")], found if step == 3 else [])
        sink.close()
        return tmp_path / name

    return write


@pytest.mark.parametrize(
    ("severity", "fail_on", "code"),
    [
        (None, "warning", 0),
        ("info", "warning", 0),
        ("info", "info", 1),
        ("warning", "warning", 1),
        ("warning", "error", 0),
        ("error", "error", 1),
        ("error", "never", 0),
    ],
)
def test_the_exit_code_says_whether_something_was_found(make, severity, fail_on, code):
    assert run(make("run", severity), "--format", "json", "--fail-on", fail_on).exit_code == code


def test_the_page_lies_in_the_run_folder_or_beside_the_file(make):
    folder = make("run", "error")
    result = run(folder)
    assert result.exit_code == 1
    assert (folder / "report.html").stat().st_size > 1_000_000
    assert "error: The loss is NaN. (step 3)" in result.output
    file = make("one.jsonl")
    assert run(file).exit_code == 0
    assert (file.parent / "report.html").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["records.jsonl", "report.html"]


def test_markdown_and_json_are_printed_or_written(make, tmp_path):
    folder = make("run", "warning")
    assert json.loads(run(folder, "--format", "json").output)["worst"] == "warning"
    assert run(folder, "--format", "markdown").output.startswith("# run")
    assert run(folder, "--format", "markdown", "--output", tmp_path / "x.md").exit_code == 1
    assert (tmp_path / "x.md").read_text(encoding="utf-8").startswith("# run")
    assert not (folder / "report.html").exists()


def test_two_runs_fail_where_the_second_one_is_worse(make, tmp_path):
    good, bad = make("good"), make("bad", "error")
    assert run(good, bad, "--output", tmp_path / "page.html").exit_code == 1
    assert run(bad, good, "--format", "markdown").exit_code == 0
    assert run(bad, bad, "--format", "json").exit_code == 0
    assert "A: good" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_what_cannot_be_read_is_told(tmp_path):
    for path in (tmp_path / "missing", tmp_path, tmp_path / "missing.jsonl"):
        result = run(path)
        assert result.exit_code == 2
        assert "No records at" in result.output
    assert "stethoscope runs" in run(tmp_path).output
    (tmp_path / "records.jsonl").write_text('{"run":{"id":"a","started":""},"format":2}\n')
    result = run(tmp_path)
    assert result.exit_code == 2
    assert "format 2" in result.output


def test_a_file_of_which_nothing_can_be_read_is_no_healthy_run(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b"\x00\xff\n" * 40)
    result = run(tmp_path, "--format", "markdown")
    assert result.exit_code == 2
    assert "not written by sinks.Jsonl" in result.output


def test_a_folder_that_cannot_be_written_to_is_told_and_keeps_the_old_page(make, monkeypatch):
    folder = make("run")
    (folder / "report.html").write_text("old")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    result = run(folder)
    assert result.exit_code == 2
    assert "Permission denied" in result.output
    assert (folder / "report.html").read_text() == "old"
    monkeypatch.undo()
    result = run(folder, "--output", folder / "no" / "such" / "page.html")
    assert result.exit_code == 2
    assert "--output" in result.output
    assert "stethoscope runs" not in result.output


def test_opening_without_a_display_says_so(make, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)))
    result = run(make("run"), "--open")
    assert result.exit_code == 0
    assert opened[0].startswith("file:///")
    assert "open the file yourself" in result.output


def test_without_the_extra_the_message_says_what_to_install(make):
    code = "import sys; sys.modules['bokeh'] = None; from stethoscope.cli import main; main()"
    command = [sys.executable, "-c", code, "report", str(make("run"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'bokeh is not installed: pip install "stethoscope[report]"' in done.stderr


def test_a_terminal_without_unicode_and_colour_is_no_reason_to_fail(make):
    folder = make("run", "error", text="Kaputt in 'größe.層'.")
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "TERM": "dumb"}
    for arguments in (["--format", "markdown"], []):
        command = [sys.executable, "-m", "stethoscope", "report", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        assert done.returncode == 1, done.stderr
        assert b"Kaputt" in done.stdout
        assert done.stderr == b""
    assert "größe.層" in Path(folder, "report.html").read_text(encoding="utf-8")
