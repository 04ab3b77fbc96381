import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope.audits import Schedule, plan, planned_steps

RNNOISE = Schedule("sparsify", 2500, 8000, 50)


@pytest.mark.parametrize(
    ("steps", "verdict", "ends_dense", "code"),
    [
        (0, "never starts", True, "schedule-unreachable"),
        (1200, "never starts", True, "schedule-unreachable"),
        (2499, "never starts", True, "schedule-unreachable"),
        (2500, "unfinished", True, "schedule-unfinished"),  # the first action keeps everything
        (2549, "unfinished", True, "schedule-unfinished"),
        (2550, "unfinished", False, "schedule-unfinished"),
        (7999, "unfinished", False, "schedule-unfinished"),
        (8000, "reached", False, None),
        (20000, "reached", False, None),
        (math.inf, "reached", False, None),
    ],
)
def test_rnnoise_defaults(steps, verdict, ends_dense, code):
    report = plan(RNNOISE, steps)
    assert (report.verdict, report.ends_dense) == (verdict, ends_dense)
    assert [finding.code for finding in report.findings] == ([code] if code else [])
    assert report.ok == (code is None)


def test_the_advice_names_what_the_planned_steps_reach():
    report = plan(RNNOISE, 1234)
    assert (report.largest_stop, report.largest_start) == (1234, 1200)
    (finding,) = report.findings
    assert "stop to at most 1234" in finding.advice
    assert "above 1200 never acts" in finding.advice
    assert "at least 8000 steps" in finding.advice
    assert plan(Schedule("sparsify", 350, 1234, 50), 1234).verdict == "reached"


def test_an_interval_that_is_never_met():
    report = plan(Schedule("sparsify", 110, 190, 100), 150)
    assert report.verdict == "never starts"
    assert "no multiple of 100" in report.findings[0].message


def test_a_run_shorter_than_its_warm_up():
    report = plan(Schedule("warm-up", 0, 4000), 1000)
    assert (report.verdict, report.progress) == ("unfinished", 0.25)
    assert "25%" in report.findings[0].message


def test_a_counter_that_begins_anew_after_resuming():
    report = plan(RNNOISE, 12000, restarted_at=10000)
    assert (report.verdict, report.ends_dense) == ("never starts", True)
    assert [finding.code for finding in report.findings] == ["schedule-unreachable", "schedule-restarted"]
    again = plan(RNNOISE, 20000, restarted_at=10000)
    assert again.verdict == "reached"
    assert [finding.code for finding in again.findings] == ["schedule-restarted"]


def test_bad_input_says_what_is_legal():
    with pytest.raises(ValueError, match=r"starts at 8000 and stops at 2500.*start <= stop"):
        Schedule("sparsify", 8000, 2500)
    with pytest.raises(ValueError, match="interval 0"):
        Schedule("sparsify", 0, 1, 0)
    with pytest.raises(ValueError, match="start <= stop"):
        Schedule("sparsify", -1, 5)
    for steps in (-1, math.nan):
        with pytest.raises(ValueError, match="planned_steps"):
            plan(RNNOISE, steps)
    with pytest.raises(ValueError, match="restarted_at"):
        plan(RNNOISE, 10, restarted_at=11)


@given(start=st.integers(0, 60), length=st.integers(0, 60), interval=st.integers(1, 25), steps=st.integers(0, 150))
def test_the_verdict_is_what_a_counting_sparsifier_does(start, length, interval, steps):
    stop = start + length
    acted = None
    for count in range(1, steps + 1):  # as RNNoise's sparsifier counts
        if count >= stop or (count >= start and count % interval == 0):
            acted = count
    report = plan(Schedule("any", start, stop, interval), steps)
    assert report.last_action == acted
    expected = "never starts" if acted is None else "reached" if steps >= stop else "unfinished"
    assert report.verdict == expected
    density = Schedule("any", start, stop, interval).density(steps, target=0.25)
    assert report.ends_dense == (density == 1.0)


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"epochs": 3, "batches": 7}, 21),
        ({"epochs": 75, "items": 30000, "batch_size": 128, "drop_last": True}, 75 * 234),
        ({"epochs": 3, "items": 10, "batch_size": 4}, 9),
        ({"epochs": 3, "items": 10, "batch_size": 4, "drop_last": True}, 6),
        ({"epochs": 2, "batches": 7, "accumulate": 4}, 3),
        ({"epochs": 2, "batches": 7, "accumulate": 4, "flush": True}, 4),
        ({"epochs": 9, "batches": 100, "max_steps": 250}, 250),
        ({"epochs": math.inf, "batches": 100, "max_steps": 250}, 250),
        ({"epochs": 2, "batches": 100, "max_steps": -1}, 200),
        ({"epochs": math.inf, "batches": 100}, math.inf),
        ({"epochs": 3, "items": 3, "batch_size": 4, "drop_last": True}, 0),
    ],
)
def test_planned_steps(arguments, steps):
    assert planned_steps(**arguments) == steps


def test_planned_steps_says_what_is_missing():
    with pytest.raises(ValueError, match="batches"):
        planned_steps(epochs=3, items=10)
    with pytest.raises(ValueError, match="accumulate=0"):
        planned_steps(epochs=3, batches=10, accumulate=0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        planned_steps(epochs=3, items=10, batch_size=0)


HEALTHY = [
    (Schedule("sparsify", 2500, 8000, 50), 17550),
    (Schedule("warm-up", 0, 4000), 100000),
    (Schedule("unfreeze", 1000, 1000), 1001),
    (Schedule("cosine", 0, 5000), 5000),
    (Schedule("curriculum", 0, 999, 100), 1000),
]


@pytest.mark.parametrize(("schedule", "steps"), HEALTHY)
def test_schedules_that_are_reached_give_no_finding(schedule, steps):
    assert plan(schedule, steps).findings == ()


def test_a_warm_up_that_begins_anew_is_told_as_such():
    (finding,) = plan(Schedule("warm-up", 0, 400), 1000, restarted_at=500).findings
    assert "begins anew after 500 steps: it makes its way of 400 steps a second time" in finding.message
    assert "start to 0" not in finding.advice


@pytest.mark.parametrize("asked", [{"epochs": math.nan, "batches": 7}, {"epochs": math.inf, "batches": 0}])
def test_counts_that_determine_nothing_are_refused_in_words(asked):
    with pytest.raises(ValueError, match="not determined"):
        planned_steps(**asked)


def test_a_loop_that_drops_the_rest_of_each_epoch():
    made = sum((i + 1) % 4 == 0 for _ in range(50) for i in range(7))
    assert planned_steps(epochs=50, batches=7 // 4 * 4, accumulate=4) == made == 50
