"""Whatever a file holds, reading it gives something or says clearly what is wrong with it."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from stethoscope import Finding, Monitor, presets, sinks, watches
from stethoscope._protocols import Run
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
