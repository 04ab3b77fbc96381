import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope import Record
from stethoscope._combine import OPERATIONS, WHOLES, add_up, combined, is_lone, operation, terms, with_ratios
from stethoscope._message import Layout
from stethoscope._record import Histogram

FLOATS = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8)
REFERENCE = {
    "mean": np.mean,
    "rms": lambda x: math.sqrt(np.mean(np.square(x))),
    "sum": np.sum,
    "min": np.min,
    "max": np.max,
}


def over_ranks(name, values, parts=1):
    records = [Record(name, value, 0, module="a.weight", rank=rank) for rank, value in enumerate(values)]
    return combined(records[0], add_up([terms(each) for each in records]), len(values), parts)


@pytest.mark.parametrize("name", [name for name in OPERATIONS if "/" in name and not name.endswith("histogram")])
@given(values=FLOATS)
def test_each_operation_is_that_of_numpy(name, values):
    made = over_ranks(name, values).value
    expected = REFERENCE[OPERATIONS[name]](np.array(values, dtype=np.float64))
    assert made == pytest.approx(float(expected), rel=1e-9, abs=1e-9)


@given(values=FLOATS, bad=st.sampled_from([math.nan, math.inf]), at=st.integers(0, 8))
@pytest.mark.parametrize("name", ["activation/min", "activation/max", "activation/rms", "activation/mean"])
def test_a_nan_on_one_rank_is_never_swallowed(name, values, bad, at):
    made = over_ranks(name, [*values[:at], bad, *values[at:]]).value
    if math.isnan(bad):
        assert math.isnan(made)
    elif name != "activation/min":
        assert made == math.inf


@given(
    whole=st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=40),
    parts=st.integers(1, 4),
    copies=st.integers(1, 3),
)
def test_parts_make_up_the_whole_though_several_ranks_hold_each(whole, parts, copies):
    pieces = [whole[i::parts] for i in range(parts)] * copies
    norms = [math.sqrt(sum(x * x for x in piece)) for piece in pieces]
    made = over_ranks("parameter/shard_norm", norms, parts)
    assert made.name == "parameter/norm"
    assert made.value == pytest.approx(math.sqrt(sum(x * x for x in whole)), rel=1e-9, abs=1e-9)
    shares = [sum(x != 0 for x in piece) / len(whole) for piece in pieces]
    assert over_ranks("density/shard_elements", shares, parts).value == pytest.approx(
        np.count_nonzero(whole) / len(whole)
    )


def test_histograms_are_added_bin_by_bin():
    records = [Record("activation/histogram", Histogram((0.0, 1.0, 2.0), counts), 0) for counts in ((1, 2), (3, 4))]
    total = add_up([terms(each) for each in records])
    assert combined(records[0], total, 2, 1).value == Histogram((0.0, 1.0, 2.0), (4, 6))


def test_an_input_and_a_further_output_are_combined_as_an_output_is():
    assert operation(Record("activation/input_max.hidden.0", 1.0, 0)) == "max"
    assert operation(Record("separation/si_sdr_db", 1.0, 0)) == "mean"


def test_what_nobody_has_declared_stays_with_its_rank():
    assert operation(Record("mine/number", 1.0, 0)) is None
    assert operation(Record("val_loss", 1.0, 0, source="log")) is None
    assert operation(Record("loss", None, 0, source="step")) is None


def test_flags_stay_with_their_rank_but_for_the_count_over_all_gradients():
    assert is_lone(Record("activation/input_nonfinite.mask", 1.0, 0, module="a"))
    assert is_lone(Record("parameter/nonfinite", 1.0, 0, module="a.weight"))
    assert is_lone(Record("gradient/nonfinite", 1.0, 0, module="a.weight"))
    assert not is_lone(Record("gradient/nonfinite", 0.0, 0))
    assert not is_lone(Record("activation/rms", 0.0, 0))


def test_the_ratio_of_an_update_is_made_from_norms_of_the_whole():
    records = [
        Record("parameter/norm", 2.0, 0, module="a"),
        Record("parameter/update_norm", 0.5, 0, module="a"),
        Record("parameter/norm", 0.0, 0, module="b"),
        Record("parameter/update_norm", 0.0, 0, module="b"),
        Record("parameter/update_norm", 1.0, 0, module="c"),
    ]
    made = {(r.name, r.module): r.value for r in with_ratios(records)}
    assert made["parameter/update_ratio", "a"] == 0.25
    assert made["parameter/update_ratio", "b"] == 0.0


def test_every_part_has_a_whole_that_is_declared():
    for whole, _ in WHOLES.values():
        assert whole in OPERATIONS or whole == "parameter/update_norm"


@given(
    values=st.lists(st.lists(st.floats(width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    names=st.lists(st.sampled_from([name for name in OPERATIONS if "/" in name]), min_size=3, max_size=3, unique=True),
)
def test_packed_records_are_combined_as_single_ones_are(values, names):
    """What `sinks.read(rank=None)` makes of files and what the monitor makes of messages is the same."""
    ranks = []
    for rank, several in enumerate(values):
        made = [Record(name, value, 7, "a", rank=rank) for name, value in zip(names, several, strict=True)]
        made = [r._replace(value=Histogram((0.0, 1.0), (1.0,))) if r.name.endswith("histogram") else r for r in made]
        made.append(Record("parameter/shard_norm", 2.0, 7, "w", rank=rank))
        ranks.append(made)
    layouts = [Layout(made, True, len(ranks), {"": 2}) for made in ranks]
    packed = [layout.pack(made) for layout, made in zip(layouts, ranks, strict=True)]
    with np.errstate(all="ignore"):
        sums, peaks = sum(each[0] for each in packed), np.max([each[1] for each in packed], axis=0)
    unpacked = layouts[0].unpack(ranks[0], sums, peaks)
    for i, (record, ours) in enumerate(zip(ranks[0], unpacked, strict=True)):
        if is_lone(record):
            assert ours is record
            continue
        alike = add_up([terms(made[i]) for made in ranks])
        expected = combined(record, alike, len(ranks), 2)
        assert ours._replace(value=None) == expected._replace(value=None)
        if isinstance(expected.value, Histogram):
            assert ours.value == expected.value
        else:
            assert ours.value == pytest.approx(expected.value, rel=1e-9, nan_ok=True)


def test_a_layout_knows_deliveries_of_its_kind():
    made = [Record("activation/rms", 1.0, 0, "a"), Record("loss", 1.0, 0, source="step")]
    layout = Layout(made, True, 2, {})
    assert layout.fits([record._replace(step=9, value=3.0) for record in made])
    assert not layout.fits(made[:1])
    assert not layout.fits([made[0]._replace(module="b"), made[1]])
    assert layout.checksum != Layout([made[0]._replace(module="b")], True, 2, {}).checksum
