from __future__ import annotations

import json
import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stethoscope.testing import replay, series
from stethoscope.watches import Assignment


def story(**values):
    size = len(next(iter(values.values())))
    return series(range(0, 50 * size, 50), **{f"separation/{name}": v for name, v in values.items()})


def test_sound_margin_is_left_alone_and_so_is_a_small_one_at_the_start():
    assert replay(Assignment(), story(margin_db=[0.1 + 0.3 * i for i in range(60)])) == []


def test_margin_near_zero_is_reported_with_flips_once():
    records = story(margin_db=[5.0] * 20 + [0.2] * 60, flips=[0.3] * 80, revisits=[16.0] * 80)
    found = replay(Assignment(), records)
    assert [(f.code, f.severity) for f in found] == [("assignment-ambiguous", s) for s in ("info", "warning")]
    assert "dB only (a sound run reaches several dB). 30 % of the samples" in found[1].message


def test_margin_that_vanishes_later_is_reported_and_again_after_it_was_back():
    margin = [8.0] * 30 + [0.1] * 60 + [8.0] * 30 + [0.1] * 60
    found = replay(Assignment(), story(margin_db=margin))
    assert len(found) == 2
    assert 30 * 50 < found[0].step < 90 * 50 < found[1].step


def test_many_flips_with_a_fair_margin_are_an_info():
    (found,) = replay(Assignment(), story(margin_db=[3.0] * 80, flips=[0.25] * 80, revisits=[16.0] * 80))
    assert found.severity == "info"
    assert found.message.startswith("25 % of the samples")


def test_samples_that_never_come_back_count_nothing():
    assert replay(Assignment(), story(margin_db=[3.0] * 80, flips=[0.0] * 80, revisits=[0.0] * 80)) == []


@example([(1.0, math.nan, 5.0)] * 30)
@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*3 * [st.floats(width=32)]), max_size=60))
def test_any_numbers_are_survived_and_state_is_json_at_any_moment(values):
    watch, state = Assignment(), Assignment().init()
    for step, (margin, flips, revisits) in enumerate(values):
        names = {"separation/margin_db": [margin], "separation/flips": [flips], "separation/revisits": [revisits]}
        state, _ = watch.update(json.loads(json.dumps(state, allow_nan=False)), series([50 * step], **names))


def test_bad_fields_are_named():
    with pytest.raises(ValueError, match="margin_db must be > 0 and hold >= 1"):
        Assignment(margin_db=0)
