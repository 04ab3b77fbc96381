"""Whatever a file holds, reading it gives something or says clearly what is wrong with it."""

import io
import json
import os
import zipfile
from functools import cache

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import nn

from stethoscope import Finding, Monitor, audits, presets, sinks, watches
from stethoscope._protocols import Run
from stethoscope.cli._run import _table
from stethoscope.cli._runs import runs
from stethoscope.sinks import _read
from stethoscope.testing import series

FAST = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("NaN"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def damage(draw, content):
    """The same with some bytes changed, cut out or added."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        if draw(st.booleans()):
            data[at : at + draw(st.integers(0, 40))] = draw(st.binary(max_size=10))
        else:
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
    return bytes(data)


@st.composite
def elsewhere(draw, value):
    """The same JSON with one value in it replaced by any other."""
    value = json.loads(json.dumps(value))
    place, key = [value], 0
    while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 4)):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = draw(json_values)
    return value


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    file = tmp_path_factory.mktemp("good") / "run.jsonl"
    sink = sinks.Jsonl(file)
    sink.open(Run("a", "2026-01-01T00:00:00+00:00", modules=(("enc.0", "Linear"),)))
    for step in range(4):
        records = [r._replace(step=step) for r in series(loss=[0.5], lr=[float("nan")])]
        sink.write(step, records, [Finding("loss-spike", "warning", "m", "a", step, evidence={"by": 3.0})])
    sink.close()
    return file.read_bytes()


@pytest.mark.filterwarnings("error")
@FAST
@given(data=st.data())
def test_a_damaged_run_is_read_as_far_as_it_goes(written, tmp_path, data):
    file = tmp_path / "run.jsonl"
    file.write_bytes(data.draw(damage(written) | st.binary(max_size=200)))
    try:
        sinks.read_run(file)
        deliveries = list(sinks.read(file))
    except ValueError as error:
        assert str(file) in str(error) or "format" in str(error)  # noqa: PT017  other errors fail the test
    else:
        assert all(isinstance(d.step, int) for d in deliveries)


@FAST
@given(data=st.data())
def test_lines_with_anything_in_them_do_not_hide_the_others(written, tmp_path, data):
    lines = written.splitlines()
    lines.insert(2, json.dumps(data.draw(elsewhere(json.loads(lines[2])))).encode())
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    try:
        found = list(sinks.read(file))
    except ValueError as error:
        assert "format" in str(error)  # noqa: PT017
    else:
        assert {d.step for d in found} >= {0, 3}


@FAST
@given(data=st.data())
def test_a_damaged_lock_file_says_how_to_get_it_back(tmp_path, data):
    file = tmp_path / "metrics.json"
    file.unlink(missing_ok=True)
    schema = watches.MetricSchema({"loss": float, "th_accuracy": watches.Field(float, ge=0.0, le=1.0)}, lock=file)
    schema.write_lock()
    content = file.read_bytes()
    file.write_bytes(
        data.draw(
            damage(content)
            | st.binary(max_size=100)
            | elsewhere(json.loads(content)).map(lambda v: json.dumps(v).encode())
        )
    )
    try:
        watches.MetricSchema(lock=file)
    except ValueError as error:
        assert str(file) in str(error)  # noqa: PT017


@cache  # torch's older format holds addresses: a file of another length would be another example
def weights(suffix):
    file = io.BytesIO()
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    if suffix == ".safetensors":
        return save(state)
    torch.save(state, file, _use_new_zipfile_serialization=suffix == ".pt")
    return file.getvalue()


@FAST
@given(data=st.data(), suffix=st.sampled_from([".pt", ".old.pt", ".safetensors"]))
def test_a_damaged_checkpoint_is_examined_or_said_to_be_damaged(tmp_path, data, suffix):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    file, content = tmp_path / f"weights{suffix}", weights(suffix)
    file.write_bytes(
        data.draw(damage(content) | st.binary(max_size=200) | st.integers(0, len(content)).map(lambda n: content[:n]))
    )
    report = audits.checkpoint(model, file)
    assert report.loaded or not report.ok


@FAST
@given(data=st.data())
def test_an_index_of_shards_with_anything_in_it_opens_nothing_elsewhere(tmp_path, data):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    names = st.sampled_from(["a.safetensors", "../a.safetensors", "..", "", "/etc/passwd", "a\0b"])
    index = st.dictionaries(st.text(max_size=3), names | json_values, max_size=3)
    whole = data.draw(index.map(lambda each: {"weight_map": each}) | json_values)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(whole))
    (tmp_path / "config.json").write_bytes(
        data.draw(st.binary(max_size=20) | json_values.map(lambda v: json.dumps(v).encode()))
    )
    report = audits.checkpoint(nn.Linear(2, 2), tmp_path)
    assert report.loaded == ("weight",) or not report.ok


def test_a_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**24))
        archive.writestr("archive/version", "3")
    (found,) = audits.checkpoint(nn.Linear(2, 2), tmp_path / "bomb.pt").findings
    assert found.code == "checkpoint-unreadable"
    assert "compressed" in found.message


DEEP = "[" * 100_000


@pytest.mark.parametrize("metadata", [DEEP, "1" + "0" * 5000, '{"facts":' * 100])
def test_what_a_file_says_about_itself_may_be_anything(tmp_path, metadata):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "a.safetensors", {"stethoscope": metadata, "rate": metadata})
    assert audits.checkpoint(nn.Linear(2, 2), tmp_path / "a.safetensors").loaded == ("weight",)


def test_nothing_nested_deeply_is_a_traceback(tmp_path):
    for name in ("config.json", "model.safetensors.index.json", "metrics.json"):
        (tmp_path / name).write_text(DEEP)
    assert not audits.checkpoint(nn.Linear(2, 2), tmp_path).ok
    with pytest.raises(ValueError, match=r"metrics\.json is no lock file"):
        watches.MetricSchema(lock=tmp_path / "metrics.json")
    (tmp_path / "pyproject.toml").write_text("a = " + DEEP)
    with pytest.raises(typer.BadParameter, match=r"pyproject\.toml could not be read"):
        _table(tmp_path / "pyproject.toml")


@pytest.mark.parametrize("text", ["tool = 3", "[tool]\nstethoscope = 3"])
def test_a_configuration_of_another_shape_is_refused_or_none(tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(text)
    try:
        assert _table(tmp_path / "pyproject.toml") == {}
    except typer.BadParameter as error:
        assert "must be a table" in str(error)  # noqa: PT017


def test_a_line_without_an_end_is_passed_over_without_being_held(written, tmp_path, monkeypatch):
    monkeypatch.setattr(_read, "MAX_LINE", 2000)
    lines = written.splitlines(keepends=True)
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"".join([*lines[:2], bytes(50_000), b"\n", *lines[2:], b"[" * 5000]))
    assert [each.step for each in sinks.read(file)] == [0, 1, 2, 3]
    assert max(map(len, _read._lines([file]))) < 2000
    with file.open("ab") as more:
        more.truncate(20 * 2**30)  # a hole of zeros, as after a crash
    monkeypatch.setattr(_read, "MAX_LINE", 2**20)
    lines = _read._lines([file])
    assert len(next(lines)) < 2000


@pytest.mark.parametrize(
    ("key", "value"),
    [("planned_steps", "many"), ("every", None), ("id", [1]), ("versions", 3), ("rank", "x"), ("modules", {"a": 1})],
)
def test_a_run_of_other_types_is_none(written, tmp_path, key, value):
    first, *others = written.splitlines()
    head = json.loads(first)
    head["run"][key] = value
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"\n".join([json.dumps(head).encode(), *others]) + b"\n")
    with pytest.raises(ValueError, match="no line that tells about a run"):
        sinks.read_run(file)
    assert [each.step for each in sinks.read(file)] == [0, 1, 2, 3]


@pytest.mark.parametrize(("key", "value"), [("step", "3"), ("message", None), ("rank", True), ("evidence", [1])])
def test_a_finding_of_other_types_costs_its_line(written, tmp_path, key, value):
    lines = written.splitlines()
    line = json.loads(lines[2])
    line["findings"][0][key] = value
    lines[2] = json.dumps(line).encode()
    file = tmp_path / "run.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    assert [each.step for each in sinks.read(file)] == [0, 2, 3]


@pytest.mark.timeout(20)
def test_a_pipe_among_the_runs_is_not_waited_for(written, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "good.jsonl").write_bytes(written)
    runs(tmp_path)
    assert "good.jsonl" in capsys.readouterr().out


@pytest.fixture(scope="module")
def state():
    model = nn.Linear(2, 2)
    with Monitor(model, **presets.full(), every=1) as monitor:
        for _ in range(4):
            model(torch.ones(3, 2)).sum().backward()
            monitor.step(torch.ones(3, 2), loss=1.0)
            monitor.log({"th_accuracy": 0.5})
        return json.loads(json.dumps(monitor.state_dict()))


@FAST
@given(data=st.data())
def test_a_state_with_anything_in_it_is_refused_or_costs_a_watch_and_never_the_training(state, data):
    model = nn.Linear(2, 2)
    monitor = Monitor(model, **presets.full(), every=1)
    try:
        monitor.load_state_dict(data.draw(elsewhere(state)))
    except ValueError as error:
        assert "state" in str(error)  # noqa: PT017
    for _ in range(3):
        model(torch.ones(3, 2)).sum().backward()
        monitor.step(torch.ones(3, 2), loss=1.0)
        monitor.log({"th_accuracy": 0.5})
    monitor.close()
