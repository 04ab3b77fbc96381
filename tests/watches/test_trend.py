from __future__ import annotations

import random

import pytest

from stethoscope.watches import _trend


def test_bounds_hold_the_true_slope_about_as_often_as_they_say():
    rng, above = random.Random(0), 0
    for _ in range(400):
        blocks = [(float(t), 3 - 0.1 * t + rng.gauss(0, 1)) for t in range(24)]
        above += _trend.trend(blocks, 0.95).high >= -0.1
    assert 0.92 <= above / 400 <= 0.99


def test_outlier_block_does_not_turn_the_line():
    blocks = [(float(t), -0.1 * t + 0.01 * (-1) ** t) for t in range(24)]
    blocks[20] = (20.0, 50.0)
    assert abs(_trend.trend(blocks, 0.95).slope + 0.1) < 0.3


def test_blocks_are_trimmed_means_and_merge_when_full():
    series = _trend.start(5)
    for step in range(5 * 200):
        series, _ = _trend.push(series, step, 100.0 if step % 10 == 2 else float(step // 5))
    assert len(series["blocks"]) <= _trend.LIMIT
    assert series["width"] == 20
    assert all(abs(level - at / 5) <= 2 for at, level in series["blocks"])


@pytest.mark.parametrize(("confidence", "freedom", "value"), [(0.95, 6, 1.943), (0.95, 20, 1.725), (0.99, 10, 2.764)])
def test_quantile_agrees_with_the_tables(confidence, freedom, value):
    assert _trend.student(confidence, freedom) == pytest.approx(value, rel=0.01)
