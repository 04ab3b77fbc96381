from __future__ import annotations

import bisect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stethoscope import stats

FLOATS = st.floats(width=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(values=st.lists(FLOATS, min_size=1, max_size=50))
def test_bins_agree_with_the_edges_for_any_number(dtype, values):
    x = torch.tensor(values, dtype=dtype)
    for value, code in zip(x.tolist(), stats.log_bins(x).tolist(), strict=True):
        if not np.isfinite(value):
            assert code == stats.NONFINITE
        elif value == 0:
            assert code == stats.ZERO
        else:
            # negative bins mirror the positive ones: both are closed at the end that is nearer to zero
            edges = stats.HISTOGRAM_EDGES
            mirrored = bisect.bisect_right(edges, abs(value)) - 1
            expected = min(max(mirrored, stats.BINS // 2), stats.BINS - 1)
            assert code == (expected if value > 0 else stats.BINS - 1 - expected)


def test_edges_increase_and_their_number_is_one_more_than_the_bins():
    assert list(stats.HISTOGRAM_EDGES) == sorted(set(stats.HISTOGRAM_EDGES))
    assert len(stats.HISTOGRAM_EDGES) == stats.BINS + 1


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    limit=st.integers(1, 300),
)
def test_a_sample_is_small_and_visits_every_channel(shape, limit):
    x = torch.arange(float(np.prod(shape))).reshape(shape)
    taken = stats.sample(x, limit)
    assert 1 <= len(taken) <= limit
    assert len(set(taken.tolist())) == len(taken)
    step = stats.sample_step(x.numel(), shape[-1], limit)
    if len(taken) >= shape[-1] and step > 1:
        channels = {int(value) % shape[-1] for value in taken.tolist()}
        assert len(channels) == shape[-1]


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 40, 50).transpose(0, 2),
        torch.randn(4, 8, 30, 30).to(memory_format=torch.channels_last),
        torch.randn(1, 5000).expand(3, 5000),
        torch.randn(60, 100)[:, ::2],
    ],
)
def test_a_sample_of_any_layout_holds_values_of_the_tensor(x):
    taken = stats.sample(x, 500)
    assert set(taken.tolist()) <= set(x.reshape(-1).tolist())
    assert 250 < len(taken) <= 500


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_measured_is_told_apart_from_what_can():
    assert stats.measurable(torch.ones(2, 2).to_sparse()) is None
    assert stats.measurable(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])) is None
    assert stats.measurable(torch.tensor([3 + 4j])).tolist() == [5.0]
    assert stats.measurable(torch.tensor([True, False])).tolist() == [1.0, 0.0]
    assert stats.measurable(torch.tensor([2**40 + 1])).tolist() == [2**40 + 1]
    assert stats.measurable(torch.tensor([1.5], dtype=torch.bfloat16)).dtype is torch.float32


@given(values=st.lists(FLOATS, min_size=1, max_size=50))
def test_levels_and_counts_of_non_finite_values(values):
    x = torch.tensor(values)
    expected = 2 if np.isnan(values).any() else 1 if np.isinf(values).any() else 0
    assert stats.nonfinite_level(torch.stack(x.aminmax())).amax() == expected
    assert stats.nonfinite_count(x) == (~np.isfinite(values)).sum()


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_far_from_zero_keep_their_digits(offset):
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + offset
    reference = x.double().numpy()
    squares, fourths = stats.central_moments(x)
    centred = reference - reference.mean()
    assert squares.item() == pytest.approx((centred**2).sum(), rel=1e-4)
    assert fourths.item() == pytest.approx((centred**4).sum(), rel=1e-3)
