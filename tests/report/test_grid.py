import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope.report._grid import INF, NAN, Grid, leaves

NUMBERS = st.floats(allow_nan=False, allow_infinity=False, min_value=-1e30, max_value=1e30)


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), min_size=1, max_size=200), st.integers(1, 16))
def test_extremes_survive_however_many_steps_are_joined(points, columns):
    grid = Grid(most_columns=columns)
    for step, value in points:
        grid.add(step, ("a",), np.array([value]))
    table = grid.table()
    values = np.array([value for _, value in points], dtype=np.float32)
    assert table.low.shape == table.high.shape == (1, len(table.steps))
    assert len(table.steps) <= columns
    assert np.nanmin(table.low) == values.min()
    assert np.nanmax(table.high) == values.max()
    assert table.steps.min() == min(step for step, _ in points)
    assert table.steps.max() == max(step for step, _ in points)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_never_joined_away(bad):
    grid = Grid(most_columns=4)
    for step in range(100):
        grid.add(step, ("a", "b"), np.array([bad if step == 37 else 1.0, 2.0]))
    extreme = grid.table().extreme()
    assert (extreme[0] >= INF * 0.99).sum() == 1
    assert (extreme[0] > (NAN + INF) / 2).any() == math.isnan(bad)
    assert (extreme[1] == 2.0).all()


def test_a_gap_downwards_is_kept_as_well_as_a_peak():
    grid = Grid(most_columns=2)
    for step, value in enumerate([5.0, 5.0, 0.1, 5.0, 5.0, 5.0, 9.0, 5.0]):
        grid.add(step, ("a",), np.array([value]))
    assert grid.table().extreme()[0].tolist() == pytest.approx([0.1, 9.0])


def test_values_beyond_float32_stay_finite_and_several_calls_are_joined():
    grid = Grid()
    grid.add(0, ("a", "a", "b"), np.array([1.0, 1e300, 2.0]))
    table = grid.table()
    assert table.low[0, 0] == 1.0
    assert np.isfinite(table.high[0, 0])
    assert table.high[0, 0] < INF


def test_layers_that_come_later_and_layers_beyond_the_limit():
    grid = Grid(most_rows=3)
    grid.add(0, ("a",), np.array([1.0]))
    grid.add(1, tuple("abcdefg"), np.arange(7.0))
    assert grid.table().rows == ("a", "b", "g")
    assert grid.left_out == 4
    assert np.isnan(grid.table().high[1, 0])
    grid.want("d")
    grid.add(2, tuple("abcdefg"), np.arange(7.0))
    assert grid.table().rows == ("a", "b", "g", "d")
    assert grid.table().high[3, 2] == 3.0


def test_only_what_contains_no_other_module_is_a_layer():
    types = {"enc": "Sequential", "enc.0": "Linear"}
    assert leaves(["enc", "enc.0", "enc.0.weight"], types) == ["enc.0.weight"]
    assert leaves(["enc.0", "enc.0.weight", "enc.0.weight.x"], {}) == ["enc.0", "enc.0.weight", "enc.0.weight.x"]
