import math

from hypothesis import given
from hypothesis import strategies as st

from stethoscope.report._curve import Curve


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats()), min_size=1, max_size=150), st.integers(1, 12))
def test_extremes_and_what_is_not_finite_survive(points, most):
    curve = Curve(most)
    for step, value in points:
        curve.add(step, value)
    kept = curve.points()
    assert len(kept) <= most
    finite = [value for _, value in points if math.isfinite(value)]
    bad = [step for step, value in points if not math.isfinite(value)]
    assert min((point.low for point in kept if not math.isnan(point.low)), default=None) == min(finite, default=None)
    assert max((point.high for point in kept if not math.isnan(point.high)), default=None) == max(finite, default=None)
    assert min((point.nonfinite for point in kept if point.nonfinite is not None), default=None) == min(
        bad, default=None
    )
    assert [point.first for point in kept] == sorted(point.first for point in kept)


def test_other_ranks_widen_the_range_and_leave_the_line():
    curve = Curve()
    curve.add(3, 1.0)
    curve.add(3, 9.0, leads=False)
    assert curve.points()[0][:5] == (3, 3, 1.0, 9.0, 1.0)
