import json

from hypothesis import given, settings
from hypothesis import strategies as st

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks._lines import decode, decode_run, encode, encode_run


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert text.isascii()
    assert "\n" not in text
    return json.loads(text, parse_constant=refuse)


numbers = st.none() | st.floats() | st.integers(-(2**53), 2**53)
names = st.text(max_size=8) | st.sampled_from(["activation/rms", "loss"])
records = st.builds(
    Record,
    name=names,
    value=numbers
    | st.builds(
        Histogram,
        edges=st.lists(st.floats(), max_size=4).map(tuple),
        counts=st.lists(st.floats(), max_size=3).map(tuple),
    ),
    step=st.integers(0, 3),
    module=names,
    phase=st.sampled_from(["train", "val"]),
    call=st.integers(0, 2),
    rank=st.integers(0, 1),
    source=st.sampled_from(["probe", "step", "log"]),
    kind=st.sampled_from(["float", "none", "tensor", "histogram"]),
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["NaN", "\\Infinity"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
findings = st.builds(
    Finding,
    code=names,
    severity=st.sampled_from(["info", "warning", "error"]),
    message=names,
    advice=names,
    step=st.none() | st.integers(0, 3),
    module=names,
    phase=names,
    rank=st.integers(0, 1),
    evidence=st.dictionaries(names, json_values, max_size=3),
    cause=names,
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3), st.lists(records, max_size=8), st.lists(findings, max_size=2))
def test_whatever_is_written_is_strict_json_and_is_read_back_exactly(step, records, findings):
    # repr: NaN equals NaN, and 1.0 differs from 1
    assert repr(tuple(decode(strict(encode(step, records, findings))))) == repr((step, tuple(records), tuple(findings)))


def test_the_order_of_interleaved_groups_survives():
    layers = [
        Record(name, 1.0, 0, module=f"enc.{i}") for i in range(3) for name in ("activation/rms", "activation/max")
    ]
    assert decode(strict(encode(0, layers, []))).records == tuple(layers)


def test_edges_stand_once_per_group():
    histograms = [Record("activation/histogram", Histogram((0.0, 1.0), (i,)), 0, module=f"enc.{i}") for i in range(3)]
    (group,) = strict(encode(0, histograms, []))["records"]
    assert group["edges"] == [0.0, 1.0]
    assert group["values"] == [["enc.0", [0]], ["enc.1", [1]], ["enc.2", [2]]]


def test_a_run_is_read_back_and_fields_of_later_versions_are_left_out():
    run = Run(
        "a",
        "2026",
        (("", "Net"),),
        planned_steps=9,
        every=5,
        versions={"torch": "2"},
        rank=1,
        world_size=2,
        resumed_from=3,
    )
    line = strict(encode_run(run))
    assert decode_run(line) == run
    line["run"]["later"] = 1
    assert decode_run(line) == run
