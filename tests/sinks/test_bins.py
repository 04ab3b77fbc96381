import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope._record import Histogram
from stethoscope.sinks._bins import trim


def test_empty_bins_are_cut_off_at_both_ends_only():
    edges, counts = trim(Histogram((0.0, 1.0, 2.0, 3.0, 4.0, 5.0), (0, 2, 0, 3, 0)))
    assert edges.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert counts.tolist() == [2.0, 0.0, 3.0]


@pytest.mark.parametrize("counts", [(0, 0), (math.nan, 0), (-1, math.inf)])
def test_nothing_counted_is_nothing_to_show(counts):
    assert trim(Histogram((0.0, 1.0, 2.0), counts)) is None


def test_an_infinite_edge_becomes_the_nearest_finite_one():
    edges, _ = trim(Histogram((-math.inf, 0.0, 1.0, math.inf), (1, 1, 1)))
    assert edges.tolist() == [0.0, 0.0, 1.0, 1.0]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=1500).filter(any), st.integers(1, 512))
def test_joined_bins_keep_the_counts_and_the_range(counts, most):
    histogram = Histogram(tuple(np.arange(len(counts) + 1.0)), tuple(counts))
    edges, joined = trim(histogram, most=most)
    alone = trim(histogram)
    assert len(joined) <= most
    assert len(edges) == len(joined) + 1
    assert np.all(np.diff(edges) > 0)
    assert joined.sum() == sum(counts)
    assert (edges[0], edges[-1]) == (alone.edges[0], alone.edges[-1])
