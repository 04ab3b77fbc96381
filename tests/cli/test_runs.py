import json
import os
import subprocess
import sys
import time

from typer.testing import CliRunner

from stethoscope import Finding, Record, sinks
from stethoscope._protocols import Run
from stethoscope.cli import app


def run(*arguments):
    return CliRunner(env={"COLUMNS": "160"}).invoke(app, ["runs", *map(str, arguments)])


def write(place, findings=(), *, steps=5, old=True, rank=0):
    sink = sinks.Jsonl(place)
    sink.open(Run(str(place.name), "2026-01-01T00:00:00+00:00", planned_steps=5, rank=rank))
    for step in range(steps):
        records = [Record("loss", 1.0, step, source="step"), Record('x","findings":[', 1.0, step, source="log")]
        sink.write(step, records, findings if step == steps - 1 else [])
    if old:
        sink.close()
        for file in [place] if place.is_file() else place.iterdir():
            os.utime(file, (time.time() - 7200,) * 2)
    return sink


def found(folder):
    return {row["path"]: row for row in json.loads(run(folder, "--json").output)}


def test_runs_their_steps_and_their_worst_finding(tmp_path):
    spike = Finding("loss-spike", "warning", "Spike.", "", 4, rank=1)
    nan = Finding("nonfinite-loss", "error", "NaN.", "", 4, cause="nonfinite-activation")
    root = Finding("nonfinite-activation", "error", "NaN.", "", 4, "enc.[b]0[/b]")
    write(tmp_path / "deep" / "faulty", [spike, nan, root], steps=5)
    write(tmp_path / "fine", steps=3)
    write(tmp_path / "fine", [spike], steps=3, rank=1)
    write(tmp_path / "one.jsonl", steps=5)
    (tmp_path / "data.jsonl").write_text('{"text": "no run"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    rows = found(tmp_path)
    assert {path.removeprefix(f"{tmp_path}/") for path in rows} == {"deep/faulty", "fine", "one.jsonl"}
    faulty, fine = rows[str(tmp_path / "deep" / "faulty")], rows[str(tmp_path / "fine")]
    assert (faulty["worst"]["code"], faulty["findings"], faulty["state"]) == ("nonfinite-activation", 3, "finished")
    assert (fine["steps"], fine["state"], fine["worst"]["code"]) == (3, "ended", "loss-spike")
    text = run(tmp_path).output
    assert "error nonfinite-activation at step 4 in enc.[b]0[/b] (+2)" in text
    assert "3 of 5" in text
    assert "2 h ago" in text


def test_a_run_that_is_being_written_is_told_apart(tmp_path):
    sink = write(tmp_path / "now", steps=2, old=False)
    assert found(tmp_path)[str(tmp_path / "now")]["state"] == "writing"
    sink.close()
    assert found(tmp_path)[str(tmp_path / "now")]["state"] == "just written"
    os.utime(tmp_path / "now" / "records.jsonl", (time.time() - 7200,) * 2)
    assert found(tmp_path)[str(tmp_path / "now")]["state"] == "ended"


def test_half_written_and_damaged_runs_are_listed(tmp_path):
    write(tmp_path / "cut", steps=5)
    file = tmp_path / "cut" / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-30] + b'\n{"step":4,"findings":[{"co')
    (tmp_path / "head").mkdir()
    (tmp_path / "head" / "records.jsonl").write_text('{"run":{"id"')
    assert [row["steps"] for row in found(tmp_path).values()] == [5]


def test_nothing_there_and_no_folder(tmp_path):
    assert "No runs below" in run(tmp_path).output
    assert run(tmp_path).exit_code == 0
    assert run(tmp_path / "missing").exit_code == 2


def test_a_terminal_without_unicode_is_no_reason_to_fail(tmp_path):
    write(tmp_path / "größe", [Finding("nonfinite-loss", "error", "NaN.", "", 4, "m\ud800層")])
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    command = [sys.executable, "-m", "stethoscope", "runs", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert b"error nonfinite-loss at step 4 in m??" in done.stdout
