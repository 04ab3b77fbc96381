import json
import logging
import math
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope.sinks import Jsonl, read, read_run
from stethoscope.sinks._read import read_lines
from stethoscope.testing import series

RUN = Run("run-1", "2026-01-01T00:00:00+00:00", modules=(("", "Net"), ("enc.0", "Conv1d")), versions={"torch": "2.13"})
FINDING = Finding(
    "nonfinite-loss", "error", "The loss is NaN.", "Look at the batch.", step=1, evidence={"loss": math.nan}
)


def write(path, deliveries, run=RUN, **arguments):
    sink = Jsonl(path, **arguments)
    sink.open(run)
    for step, records, findings in deliveries:
        sink.write(step, records, findings)
    sink.close()


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def losses(path, **arguments):
    return [(d.step, record.value) for d in read(path, **arguments) for record in d.records]


def test_lines_are_strict_json_and_do_not_repeat_names(tmp_path):
    values = [
        Record("activation/rms", v, 5, module=f"enc.{i}", call=i // 2) for i, v in enumerate((0.5, math.inf, None))
    ]
    write(tmp_path, [(5, values, [FINDING])])
    head, line = (tmp_path / "records.jsonl").read_text().splitlines()
    assert strict(head)["run"]["modules"] == [["", "Net"], ["enc.0", "Conv1d"]]
    line = strict(line)
    assert line["step"] == 5
    assert line["records"] == [
        {"name": "activation/rms", "values": [["enc.0", 0.5], ["enc.1", "Infinity"], ["enc.2", None, 1]]}
    ]
    assert line["findings"][0]["evidence"] == {"loss": "NaN"}


def test_the_three_non_finite_numbers_are_strings_and_come_back_as_numbers(tmp_path):
    write(tmp_path, [(0, series([0, 0, 0], loss=[math.nan, math.inf, -math.inf]), [])])
    text = (tmp_path / "records.jsonl").read_text()
    assert all(name in text for name in ('"NaN"', '"Infinity"', '"-Infinity"'))
    nan, inf, minus = (value for _, value in losses(tmp_path))
    assert math.isnan(nan)
    assert (inf, minus) == (math.inf, -math.inf)


def test_names_from_anywhere_survive(tmp_path):
    for name in ("энкодер.0", "<script>alert(1)</script>", 'a"b\\c\nd\u2028e', "\ud800"):
        write(tmp_path / "a.jsonl", [(0, [Record("activation/rms", 1.0, 0, module=name)], [])], Run(name, ""))
        assert [record.module for d in read(tmp_path / "a.jsonl") for record in d.records] == [name]


def test_evidence_that_is_not_json_does_not_cost_the_finding(tmp_path):
    finding = Finding("a", "info", "m", "", evidence={"x": {1, 2}, "y": (1.0, math.inf), "z": np.float32(0.5)})
    write(tmp_path, [(0, [], [finding])])
    (delivery,) = read(tmp_path)
    assert delivery.findings[0].evidence == {"x": "{1, 2}", "y": [1.0, math.inf], "z": 0.5}


def test_numpy_numbers_are_numbers(tmp_path):
    write(tmp_path, [(0, series([0, 0], loss=[np.float32(0.5), np.int64(3)]), [])])
    assert losses(tmp_path) == [(0, 0.5), (0, 3.0)]


def test_a_folder_a_file_and_another_rank_have_their_names(tmp_path):
    write(tmp_path / "run", [(0, series(loss=[1.0]), [])])
    write(tmp_path / "run", [(0, series(loss=[2.0]), [])], Run("run-1", "", rank=3))
    write(tmp_path / "deep" / "b.jsonl", [(0, series(loss=[3.0]), [])], Run("run-1", "", rank=1))
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.jsonl")} == {
        "run/records.jsonl",
        "run/records.rank3.jsonl",
        "deep/b.rank1.jsonl",
    }
    assert losses(tmp_path / "run") == [(0, 1.0)]
    assert losses(tmp_path / "run", rank=3) == [(0, 2.0)]


def test_the_run_is_read_back(tmp_path):
    write(tmp_path, [])
    assert read_run(tmp_path) == RUN
    assert list(read(tmp_path)) == []


def test_a_torn_last_line_is_skipped_and_a_resumed_run_goes_on_below_it(tmp_path, caplog):
    write(tmp_path, [(0, series([0], loss=[1.0]), []), (1, series([1], loss=[2.0]), [])])
    file = tmp_path / "records.jsonl"
    file.write_bytes(file.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, logger="stethoscope"):
        assert losses(tmp_path) == [(0, 1.0)]
    assert "1 lines could not be read" in caplog.text
    write(tmp_path, [(1, series([1], loss=[3.0]), [])], Run("run-1", "", resumed_from=0))
    assert losses(tmp_path) == [(0, 1.0), (1, 3.0)]
    assert read_run(tmp_path).resumed_from == 0


def test_lines_of_another_form_are_skipped_and_counted(tmp_path, caplog):
    write(tmp_path, [(0, series(loss=[1.0]), [])])
    with (tmp_path / "records.jsonl").open("ab") as file:
        file.write(
            b'\n\xff\xfe\n[]\n{}\n{"step":1,"records":[{"name":"a","values":[[]]}]}\n{"run":5}\n{"run":{"modules":7}}\n'
        )
        file.write(b"[" * 100_000 + b"\n" + b'{"step":"x","findings":3}\n')
    write(tmp_path, [(9, series([9], loss=[2.0]), [])], Run("run-1", "", resumed_from=8))
    assert losses(tmp_path) == [(0, 1.0), (9, 2.0)]
    assert "6 lines" in caplog.text


def test_steps_made_twice_are_read_once_and_findings_are_kept(tmp_path):
    write(tmp_path, [(step, series([step], loss=[1.0]), [FINDING] if step == 3 else []) for step in range(4)])
    write(tmp_path, [(step, series([step], loss=[2.0]), []) for step in (2, 3)], Run("run-1", "", resumed_from=1))
    assert losses(tmp_path) == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0)]
    assert [finding.code for delivery in read(tmp_path) for finding in delivery.findings] == ["nonfinite-loss"]


def test_another_run_in_the_same_folder_overwrites_nothing_and_is_the_one_that_is_read(tmp_path):
    write(tmp_path, [(0, series(loss=[1.0]), [])])
    write(tmp_path, [(0, series(loss=[2.0]), [])], Run("run-2", ""))
    assert losses(tmp_path) == [(0, 2.0)]
    assert read_run(tmp_path).id == "run-2"
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 4


def test_parts_are_begun_at_max_bytes_and_read_in_order_also_after_a_resume(tmp_path):
    write(tmp_path, [(step, series([step], loss=[float(step)]), []) for step in range(1200)], max_bytes=80)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files[:2] == ["records.001.jsonl", "records.002.jsonl"]
    assert "records.1000.jsonl" in files
    assert all(strict((tmp_path / name).read_text().splitlines()[0])["run"]["id"] == "run-1" for name in files)
    later = Run("run-1", "", resumed_from=1198)
    write(tmp_path, [(step, series([step], loss=[float(step)]), []) for step in range(1199, 1300)], later, max_bytes=80)
    assert losses(tmp_path) == [(step, float(step)) for step in range(1300)]


def test_a_file_can_be_read_while_it_is_written(tmp_path):
    sink = Jsonl(tmp_path)
    sink.open(RUN)
    for step in range(3):
        sink.write(step, series([step], loss=[1.0]), [])
        assert len(losses(tmp_path)) == step + 1
    sink.close()


def test_two_sinks_on_one_folder_lose_nothing(tmp_path, caplog):
    one, two = Jsonl(tmp_path), Jsonl(tmp_path)
    one.open(RUN)
    two.open(Run("run-2", ""))
    assert "a folder of its own" in caplog.text
    for step in range(3):
        one.write(step, series([step], loss=[1.0]), [])
        two.write(step, series([step], loss=[2.0]), [])
    one.close()
    two.close()
    assert losses(tmp_path) == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert losses(tmp_path / "records.writer2.jsonl") == [(0, 2.0), (1, 2.0), (2, 2.0)]


def test_a_killed_process_leaves_every_line_that_it_wrote(tmp_path):
    script = """
        import os, signal, sys
        from stethoscope._protocols import Run
        from stethoscope.sinks import Jsonl
        from stethoscope.testing import series
        sink = Jsonl(sys.argv[1])
        sink.open(Run("a", ""))
        for step in range(5):
            sink.write(step, series([step], loss=[1.0]), [])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=False, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert len(losses(tmp_path)) == 5


def test_a_path_that_cannot_be_written_is_said_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Jsonl(tmp_path / "file" / "run").open(RUN)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110  no Path needed for a device
def test_a_full_disk_is_an_error_and_what_was_written_stays(tmp_path):
    sink = Jsonl(tmp_path)
    sink.open(RUN)
    sink.write(0, series(loss=[1.0]), [])
    file, sink._file = sink._file, open("/dev/full", "ab", buffering=0)  # noqa: PTH123, SIM115  a device
    with pytest.raises(OSError, match="No space left"):
        sink.write(1, series([1], loss=[2.0]), [])
    sink._file.close()
    sink._file = file
    sink.write(2, series([2], loss=[3.0]), [])
    sink.close()
    assert losses(tmp_path) == [(0, 1.0), (2, 3.0)]


def test_close_may_come_twice_and_a_write_after_it_is_an_error(tmp_path):
    sink = Jsonl(tmp_path)
    sink.open(RUN)
    sink.close()
    sink.close()
    with pytest.raises(RuntimeError, match="is not open"):
        sink.write(0, series(loss=[1.0]), [])


def test_reading_where_nothing_was_written_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sinks\.Jsonl"):
        read(tmp_path)
    (tmp_path / "records.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="not written by Jsonl"):
        read_run(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"run": {"id": "a", "started": ""}, "format": 2}\n')
    with pytest.raises(ValueError, match="format 2"):
        read(tmp_path)


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_max_bytes_below_one_is_refused(tmp_path, max_bytes):
    with pytest.raises(ValueError, match="max_bytes"):
        Jsonl(tmp_path, max_bytes=max_bytes)


def test_the_example_in_the_documentation_can_be_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "sinks.md").read_text()
    (tmp_path / "records.jsonl").write_text(page.partition("```json\n")[2].partition("```")[0])
    assert read_run(tmp_path).modules == (("enc.0", "Conv1d"),)
    first, logged, found = read(tmp_path)
    assert [(record.module, record.call) for record in first.records] == [("enc.0", 0), ("enc.1", 0), ("enc.1", 1)]
    assert logged.records == (Record("th_accuracy", 0.25, 50, phase="val", source="log"),)
    assert found.findings[0].code == "nonfinite-loss"


def test_lines_can_be_had_as_they_are_with_the_step_up_to_which_they_count(tmp_path):
    write(tmp_path, [(step, series([step], loss=[1.0]), []) for step in range(3)])
    write(tmp_path, [(2, series([2], loss=[5.0]), [])], run=replace(RUN, resumed_from=1))
    run, lines = read_lines(tmp_path)
    assert run == replace(RUN, resumed_from=1)
    assert [(json.loads(text)["step"], upto) for text, upto in lines] == [(0, 1), (1, 1), (2, 1), (2, math.inf)]
