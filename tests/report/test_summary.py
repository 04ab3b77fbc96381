import json
import random
import resource
import shutil
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stethoscope import Finding, Record, report, sinks
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.report._facts import numbers
from stethoscope.report._summary import MAX_CURVES, MAX_FINDINGS, ranks_of


def test_curves_layers_histograms_and_findings_of_a_run(faulty):
    summary = report.summarise(faulty)
    assert [point.value for point in summary.curves["loss", "train"].points()][:2] == [1.0, 0.5]
    table = summary.grids["activation/rms", "train"].table()
    assert table.rows == ("enc.0", "enc.1", "enc.2", "enc.3")
    assert table.high.shape == (4, 10)
    shares = summary.distributions["activation/histogram", "train"].shares(table.rows)
    assert shares.shares.shape == (4, 10, 2)
    assert shares.shares[0, 0].tolist() == [0.75, 0.25]
    assert [finding.code for finding in summary.findings] == ["input-range", "nonfinite-activation", "nonfinite-loss"]
    assert (summary.last_step, summary.skipped, summary.left_out, summary.run.id) == (19, 0, 0, "made-up")


def test_ranks_are_read_together_and_the_first_one_leads(tmp_path, writing):
    from_rank = tmp_path / "run"
    writing(from_rank)
    run = report.summarise(from_rank).run
    for rank in (1, 10):
        finding = Finding("loss-spike", "warning", "Spike.", "", 4, rank=rank)
        writing(from_rank, run=replace(run, rank=rank, world_size=11), gain=2.0, findings=[finding])
    summary = report.summarise(from_rank)
    assert summary.ranks == (0, 1, 10)
    point = summary.curves["loss", "train"].points()[0]
    assert (point.low, point.high, point.value) == (1.0, 2.0, 1.0)
    assert [finding.rank for finding in summary.findings] == [1, 10]
    assert summary.grids["activation/rms", "train"].table().high[0, 0] == 2.0


def test_a_rank_whose_file_ends_early_is_named_with_what_is_missing(tmp_path, writing):
    run = writing(tmp_path / "run")
    facts = report.summarise(run)
    assert [fact.note for fact in numbers(facts) if fact.name == "Ranks"] == [""]
    for rank, steps in ((1, 20), (2, 17), (3, 19)):
        writing(run, run=replace(facts.run, rank=rank, world_size=4), steps=steps)
    (ranks,) = [fact for fact in numbers(report.summarise(run)) if fact.name == "Ranks"]
    assert ranks.note == "rank 2 ends 3 steps early, after step 16; rank 3 ends 1 step early, after step 18"


def test_one_rank_alone_can_be_read_without_rank_0(tmp_path, writing):
    run = writing(tmp_path / "run")
    shutil.move(run / "records.jsonl", run / "records.rank3.jsonl")
    assert ranks_of(run) == [3]
    assert report.summarise(run).last_step == 19


def test_what_a_resumed_run_made_again_counts_once(tmp_path, writing):
    run = writing(tmp_path / "run")
    again = replace(report.summarise(run).run, resumed_from=9)
    sink = sinks.Jsonl(run)
    sink.open(again)
    sink.write(10, [Record("loss", 77.0, 10, source="step")], [])
    sink.close()
    summary = report.summarise(run)
    assert [point.value for point in summary.curves["loss", "train"].points()][-1] == 77.0
    assert summary.last_step == 10


def test_damaged_lines_are_counted_and_the_rest_is_read(faulty):
    file = faulty / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    lines[0] = lines[0][:40] + b"\n"
    lines[3] = b"\x00\xff\xfe{{{\n"
    lines[5] = lines[5].replace(b'"values":[[', b'"values":[[[')
    file.write_bytes(b"".join(lines) + b'{"step":99,"rec')
    summary = report.summarise(faulty)
    assert summary.skipped == 4
    assert summary.run.id == "unknown"
    assert len(summary.findings) == 3
    assert report.to_html(summary)


@pytest.mark.parametrize(
    "text", [b"", b"\n\n", b'{"step":1}\n', b'{"run":{"id":"x","started":""}}\n', b'{"run":{"id":"x","sta']
)
def test_a_run_without_any_record_makes_a_page(tmp_path, text):
    (tmp_path / "records.jsonl").write_bytes(text)
    summary = report.summarise(tmp_path)
    for write in (report.to_html, report.to_markdown, report.to_json):
        assert write(summary)
    assert not summary.findings


@pytest.mark.parametrize("text", [b"null\n", b"[]\n", b"\x00\xff\n"])
def test_a_file_of_which_nothing_can_be_read_is_no_run(tmp_path, text):
    (tmp_path / "records.jsonl").write_bytes(text)
    with pytest.raises(ValueError, match=r"No line of .* can be read"):
        report.summarise(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        '{"step":1,"records":[{"name":"activation/rms","values":[["a","abc"]]}]}',
        '{"step":1,"records":[{"name":"activation/rms","values":[[1,2.0],[3,4.0]]}]}',
        '{"step":1,"records":[{"name":"activation/rms","values":[["a",[1,2]]]}]}',
        '{"step":1,"records":[{"name":"activation/rms","values":{"a":1}}]}',
        '{"step":-1,"records":[]}',
        '{"step":1e400,"records":[]}',
        '{"step":1,"findings":[{"code":"x"}]}',
        '{"step":1,"findings":[{"code":"x","severity":"fatal","message":"","advice":""}]}',
        '{"step":1,"findings":{"a":"b"}}',
        '{"step":1,"records":' + "[" * 3000 + "]" * 3000 + "}",
        '{"step":1,"records":[{"name":"activation/histogram","edges":[[]],"values":[["a",["x"]]]}]}',
    ],
)
def test_lines_of_another_form_do_not_stop_the_report(tmp_path, line):
    (tmp_path / "records.jsonl").write_text('{"run":{"id":"a","started":""},"format":1}\n' + line + "\n")
    summary = report.summarise(tmp_path)
    assert report.to_json(summary)
    assert report.to_html(summary)


def test_names_with_halves_of_surrogate_pairs_lose_nothing(tmp_path):
    name = "m\ud800"
    sink = sinks.Jsonl(tmp_path)
    sink.open(Run("odd", ""))
    found = Finding("nonfinite-activation", "error", f"{name} makes NaN.", "", 1, name)
    sink.write(1, [Record("activation/rms", 1.0, 1, module=name), Record("loss", 1.0, 1, source="step")], [found])
    sink.close()
    summary = report.summarise(tmp_path)
    assert (summary.skipped, len(summary.findings)) == (0, 1)
    assert summary.grids["activation/rms", "train"].table().rows == ("m?",)
    assert report.to_html(summary).encode("utf-8", "replace")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bits_and_cut_lines_never_stop_the_report(faulty, data):
    file = faulty / "records.jsonl"
    kept = faulty / "kept"
    if not kept.exists():
        kept.write_bytes(file.read_bytes())
    damaged = bytearray(kept.read_bytes())
    for _ in range(data.draw(st.integers(1, 30))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.integers(0, len(damaged)))
    file.write_bytes(bytes(damaged[:cut]))
    try:
        summary = report.summarise(faulty)
    except ValueError:  # the number of the format was hit
        return
    json.loads(report.to_json(summary))
    assert "Facts" in report.to_markdown(summary)
    report.compare(summary, summary)


def test_a_hundred_thousand_tags_stay_bounded(tmp_path):
    sink = sinks.Jsonl(tmp_path)
    sink.open(Run("tags", ""))
    records = [Record(f"metric_{index}", 1.0, 0, phase="val", source="log") for index in range(100_000)]
    sink.write(0, records, [])
    sink.write(1, [Record("loss", 0.5, 1, source="step")], [])
    sink.close()
    summary = report.summarise(tmp_path)
    assert len(summary.curves) == MAX_CURVES + 1
    assert ("loss", "train") in summary.curves
    assert summary.left_out == 100_000 - MAX_CURVES
    page = report.to_html(summary)
    assert len(page) < 3_000_000
    assert "24 of 500 series" in page


def test_an_error_is_told_after_thousands_of_remarks(tmp_path):
    sink = sinks.Jsonl(tmp_path)
    sink.open(Run("loud", ""))
    for step in range(60):
        sink.write(step, [], [Finding("input-range", "info", "Large.", "", step)] * 100)
    sink.write(60, [], [Finding("nonfinite-loss", "error", "NaN.", "", 60)])
    sink.close()
    summary = report.summarise(tmp_path)
    assert (len(summary.findings), summary.left_out) == (MAX_FINDINGS + 1, 1000)
    assert report.causes(summary.findings)[0].code == "nonfinite-loss"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    generator = random.Random(0)
    edges = tuple(float(edge) for edge in range(65))
    sink = sinks.Jsonl(tmp_path)
    sink.open(Run("large", ""))
    for step in range(20):
        records = [
            Record(f"activation/{name}", generator.gauss(0, 1), step, module=f"layers.{index}.linear")
            for name in ("rms", "mean", "max", "zero_fraction")
            for index in range(300)
        ]
        records += [
            Record("activation/histogram", Histogram(edges, (float(step),) * 64), step, module=f"layers.{index}.linear")
            for index in range(300)
        ]
        sink.write(step, records, [])
    sink.close()
    lines = (tmp_path / "records.jsonl").read_bytes().splitlines(keepends=True)
    texts = [line.partition(b",")[2] for line in lines[1:]]

    def grow(steps):
        with (tmp_path / "records.jsonl").open("wb") as file:
            file.write(lines[0])
            for step in range(steps):
                file.write(b'{"step":%d,' % step + texts[step % len(texts)])
        size = (tmp_path / "records.jsonl").stat().st_size
        report.summarise(tmp_path)
        return size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    small, before = grow(400)
    large, after = grow(2000)
    assert large > 100_000_000
    assert large > 4 * small
    assert after - before < 25_000_000
