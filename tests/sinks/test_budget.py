import logging
import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope import Finding, Record
from stethoscope._record import Histogram
from stethoscope.sinks._budget import MAX_HISTOGRAMS, MAX_SUSPECTS, Budget


def layers(name, number, *, value=1.0, phase="train", step=0):
    return [Record(name, value, step, module=f"enc.{i}", phase=phase) for i in range(number)]


def names(records):
    return {record.name for record in records}


def test_a_small_model_is_shown_whole_and_silently(caplog):
    records = layers("activation/mean", 40) + layers("activation/rms", 40)
    assert list(Budget("Test").admit(records)) == records
    assert not caplog.records


def test_never_more_than_the_limit_at_once_and_the_same_series_at_every_write():
    budget = Budget("Test", limit=300)
    records = [
        Record(f"activation/{statistic}", 1.0, 0, module=f"enc.{i}")
        for i in range(180)
        for statistic in ("mean", "rms", "max")
    ]
    first = budget.admit(records)
    assert len(first) <= 300
    for _ in range(3):
        assert budget.admit(records) == first


def test_one_statistic_for_all_layers_comes_before_a_second_one():
    records = layers("activation/mean", 180) + layers("activation/rms", 180) + layers("gradient/norm", 100)
    shown = Budget("Test", limit=300).admit(records)
    assert names(shown) == {"activation/rms", "gradient/norm"}
    assert len(shown) == 280


def test_the_other_groups_share_the_room_that_is_left():
    records = [
        *layers("activation/rms", 180),
        *layers("activation/max", 20),
        *layers("gradient/norm", 400),
        *layers("parameter/norm", 30),
    ]
    shown = Budget("Test", limit=300).admit(records)
    assert Counter(record.name for record in shown) == {
        "activation/rms": 180,
        "parameter/norm": 30,
        "gradient/norm": 90,
    }


def test_a_first_statistic_that_does_not_fit_is_shown_for_evenly_spaced_layers():
    shown = Budget("Test", limit=10).admit(layers("activation/rms", 100))
    assert [record.module for record in shown] == [f"enc.{i}" for i in range(0, 100, 10)]


def test_what_belongs_to_no_layer_is_always_shown():
    step = [Record("loss", 1.0, 0, source="step"), Record("gradient/norm", 1.0, 0)]
    shown = Budget("Test", limit=10).admit(layers("activation/rms", 100) + step)
    assert len(shown) == 10
    assert set(step) <= set(shown)


def test_a_few_histograms_are_shown_of_a_large_model():
    histogram = Histogram((0.0, 1.0), (3,))
    records = layers("activation/histogram", 200, value=histogram) + layers("activation/rms", 200)
    shown = Budget("Test", limit=300).admit(records)
    assert sum(isinstance(record.value, Histogram) for record in shown) == MAX_HISTOGRAMS
    assert sum(record.name == "activation/rms" for record in shown) == 200


def test_each_phase_is_an_emission_of_its_own():
    budget = Budget("Test", limit=100)
    assert len(budget.admit(layers("activation/rms", 100))) == 100
    assert len(budget.admit(layers("activation/rms", 100, phase="val"))) == 100


def test_layers_with_findings_are_added_from_then_on_but_not_without_end():
    budget = Budget("Test", limit=10)
    records = [*layers("activation/rms", 100), Record("parameter/norm", 1.0, 0, module="enc.7.weight")]
    assert not any(record.module.startswith("enc.7") for record in budget.admit(records) if record.module != "enc.70")
    finding = Finding("nonfinite-activation", "error", "", "", module="enc.7")
    assert {"enc.7", "enc.7.weight"} <= {record.module for record in budget.admit(records, [finding])}
    assert {"enc.7", "enc.7.weight"} <= {record.module for record in budget.admit(records)}
    many = layers("activation/rms", 1000)
    budget.admit(many)
    everything = [Finding("a", "error", "", "", module=record.module) for record in many]
    assert len(budget.admit(many, everything)) <= 10 + MAX_SUSPECTS


def test_what_is_left_out_is_stated_once(caplog):
    budget = Budget("Test", limit=10)
    with caplog.at_level(logging.INFO, logger="stethoscope"):
        budget.admit(layers("activation/rms", 100))
        budget.admit(layers("activation/rms", 100, phase="val"))
    (record,) = caplog.records
    assert record.name == "stethoscope"
    assert "10 of 100" in record.message
    assert "activation/rms of 90 layers" in record.message


def test_what_is_left_out_of_very_many_names_fits_into_a_line(caplog):
    budget = Budget("Test", limit=10)
    budget.admit([Record(f"metric/{index}", 1.0, 0, source="log") for index in range(20_000)])
    (record,) = caplog.records
    assert "metric/10, metric/11, " in record.message
    assert "and 19,978 more" in record.message
    assert len(record.message) < 600


def test_a_later_layer_of_a_statistic_that_was_left_out_stays_out():
    budget = Budget("Test", limit=60)
    budget.admit(layers("activation/rms", 50) + layers("activation/max", 50))
    late = [Record(name, 1.0, 1, module="late") for name in ("activation/rms", "activation/max")]
    assert names(budget.admit(late)) == {"activation/rms"}


series = st.tuples(
    st.sampled_from(["activation/rms", "activation/max", "gradient/norm", "loss"]),
    st.sampled_from(["", "a", "b", "c", "d"]),
    st.sampled_from(["train", "val"]),
    st.sampled_from(["probe", "log"]),
)


@given(st.lists(st.tuples(st.lists(series, unique=True), st.sampled_from(["", "a", "c"]))), st.integers(1, 6))
def test_in_any_run_a_series_once_shown_is_always_shown_and_the_limit_holds(run, limit):
    budget, ever, suspects = Budget("Test", limit=limit), set(), set()
    for given_series, suspect in run:
        records = [
            Record(name, 1.0, 0, module=module, phase=phase, source=source)
            for name, module, phase, source in given_series
        ]
        suspects |= {suspect} - {""}
        shown = budget.admit(records, [Finding("a", "info", "", "", module=suspect)])
        assert ever & set(records) <= set(shown)
        ever |= set(shown)
        assert [record for record in records if record in shown] == list(shown)
        for emission in {(record.phase, record.source) for record in ever}:
            chosen = [r for r in ever if (r.phase, r.source) == emission and r.module not in suspects]
            assert len(chosen) <= limit


def test_no_limit_lets_everything_through():
    assert len(Budget("Test", limit=None).admit(layers("activation/rms", 5000, value=math.nan))) == 5000


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="max_series=0 must be"):
        Budget("Test", limit=0)
