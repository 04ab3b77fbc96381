from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as schedules

from stethoscope import Monitor, Record
from stethoscope.testing import replay, series
from stethoscope.watches import LearningRate

STEPS = 400


def run(schedule, groups=1, steps=STEPS, planned=STEPS):
    """A real optimizer under a schedule; returns what was found."""
    layers = [nn.Linear(2, 2) for _ in range(groups)]
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD([{"params": layer.parameters(), "lr": 0.1} for layer in layers])
    scheduler = schedule(optimizer)
    with Monitor(model, optimizer, watches=[LearningRate()], every=1000, planned_steps=planned) as monitor:
        for _ in range(steps):
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            monitor.step()
    return [f for f in monitor.findings if f.severity != "info"]


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda o: schedules.StepLR(o, 30, 0.1), id="steps for epochs"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: 0.5 + 0.5 * math.cos(math.pi * min(1.0, i / 40))), id="cosine of epochs"),
        pytest.param(lambda o: schedules.PolynomialLR(o, 100), id="linear to zero"),
        pytest.param(lambda o: schedules.ExponentialLR(o, 0.9), id="per step"),
    ],
)  # fmt: skip
def test_a_schedule_that_is_over_before_the_run(schedule):
    (found,) = run(schedule)
    assert found.code == "scheduler-ends-early"
    assert found.step < 0.75 * STEPS
    assert run(schedule, planned=None) == []


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda o: None, id="constant"),
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, STEPS), id="cosine"),
        pytest.param(lambda o: schedules.CosineAnnealingWarmRestarts(o, 50), id="restarts"),
        pytest.param(lambda o: schedules.OneCycleLR(o, 0.5, total_steps=STEPS + 1), id="one cycle"),
        pytest.param(lambda o: schedules.MultiStepLR(o, [120, 200, 300], 0.1), id="three cuts"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: min(1.0, i / 150)), id="long warm-up from zero"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: min(1.0, 4 * (1 - i / STEPS))), id="stable, then decay"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: (i + 1) ** -0.5), id="inverse square root"),
    ],
)
def test_usual_schedules_are_fine(schedule):
    assert run(schedule) == []


def test_a_group_that_is_frozen_by_its_rate_is_fine_while_others_learn():
    assert run(lambda o: schedules.LambdaLR(o, [lambda i: float(i < 50), lambda i: 1.0]), groups=2) == []


def test_a_rate_that_is_given_to_step_goes_before_the_optimizers():
    plan = Record("plan/steps", 1000, 0, source="step")
    found = replay(LearningRate(), [plan, *series(lr=[0.1] * 200 + [0.0] * 100 + [0.1] * 100 + [0.0] * 100)])
    assert [f.step for f in found] == [250, 450]


@given(st.lists(st.floats() | st.none(), max_size=50))
def test_whatever_comes_is_survived(rates):
    replay(LearningRate(), [Record("plan/steps", 100, 0, source="step"), *series(lr=rates)])


@pytest.mark.parametrize("wrong", [{"nothing": 0}, {"hold": 1.0}, {"left": -1}])
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LearningRate(**wrong)


def second_stage(step):
    start, warm_up, end = (0, 5, 100) if step < 100 else (100, 30, 400)
    return min(1.0, (step - start) / warm_up) * (0.5 + 0.5 * math.cos(math.pi * (step - start) / (end - start)))


def warmed_up(optimizer):
    up = schedules.LinearLR(optimizer, 0.01, total_iters=10)
    return schedules.SequentialLR(optimizer, [up, schedules.CosineAnnealingLR(optimizer, 80)], [10])


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, 40), id="short"),
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, 5), id="very short"),
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, 250, eta_min=1e-4), id="long"),
        pytest.param(warmed_up, id="behind a warm-up"),
    ],
)
def test_a_cosine_that_goes_on_behind_its_end(schedule):
    (found,) = run(schedule, planned=None)
    assert found.code == "scheduler-ends-early"
    assert "climbs again" in found.message


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda o: schedules.CyclicLR(o, 1e-6, 0.1, step_size_up=40), id="triangles"),
        pytest.param(lambda o: schedules.CyclicLR(o, 1e-6, 0.1, step_size_up=20, mode="triangular2"), id="shrinking triangles"),
        pytest.param(lambda o: schedules.CosineAnnealingWarmRestarts(o, 10, T_mult=2), id="longer restarts"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: 0.5 - 0.5 * math.cos(i / 20)), id="waves from zero"),
        pytest.param(lambda o: schedules.CosineAnnealingLR(o, 40, eta_min=0.01), id="waves on purpose"),
        pytest.param(lambda o: schedules.LambdaLR(o, second_stage), id="second stage with a longer warm-up"),
    ],
)  # fmt: skip
def test_a_rate_that_goes_round_on_purpose(schedule):
    assert run(schedule, planned=None) == []


@pytest.mark.parametrize("steps", [5000, 50_000])
def test_a_warm_up_that_is_longer_than_the_run_is_told(steps):
    (found,) = run(lambda o: schedules.LambdaLR(o, lambda i: min(1.0, (i + 1) / steps)))
    assert found.code == "schedule-unfinished"
    assert found.step == STEPS // 2 - 1
    assert found.evidence["reached_at"] == pytest.approx(steps, rel=0.02)


def test_a_rate_below_zero_is_no_end_of_a_schedule():
    assert "scheduler-ends-early" not in [
        f.code for f in run(lambda o: schedules.LambdaLR(o, lambda i: 1.0 if i < 50 else -0.05))
    ]


def test_a_one_cycle_schedule_that_is_stepped_once_per_epoch_is_told():
    (found,) = run(lambda o: schedules.OneCycleLR(o, 0.1, 20 * STEPS))
    assert found.code == "schedule-unfinished"
    assert found.evidence["meant"] == 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: min(1.0, (i + 1) / 40)), id="a tenth of the run"),
        pytest.param(lambda o: schedules.LinearLR(o, 0.01, 1.0, 250), id="more than half of the run"),
        pytest.param(lambda o: schedules.OneCycleLR(o, 0.1, STEPS + 1, pct_start=0.6), id="one cycle"),
        pytest.param(lambda o: schedules.LambdaLR(o, lambda i: 0.01), id="a constant share"),
        pytest.param(
            lambda o: schedules.LambdaLR(o, lambda i: 32**-0.5 * min((i + 1) ** -0.5, (i + 1) * 60**-1.5)), id="Noam"
        ),
    ],
)
def test_a_warm_up_within_the_run_is_fine(schedule):
    assert "schedule-unfinished" not in [found.code for found in run(schedule)]
