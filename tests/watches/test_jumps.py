from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stethoscope import Record
from stethoscope.testing import replay, series
from stethoscope.watches import Jumps


def healthy(size: int = 1500, seed: int = 0, sd: float = 0.3) -> list[float]:
    """A loss in dB: from +5 towards -12."""
    rng = random.Random(seed)
    return [17 * math.exp(-i / 300) - 12 + rng.gauss(0, sd) for i in range(size)]


@pytest.mark.parametrize("seed", range(5))
def test_healthy_loss_is_left_alone(seed):
    assert replay(Jumps(), series(loss=healthy(seed=seed))) == []


def test_single_spike_is_an_info_with_its_value():
    values = healthy()
    values[700] = 20.0
    (found,) = replay(Jumps(), series(loss=values))
    assert (found.code, found.severity, found.step) == ("loss-spike", "info", 700)
    assert "leaps to 20" in found.message


def test_many_spikes_warn_once():
    values = healthy()
    for at in range(600, 1400, 60):
        values[at] = 20.0
    found = replay(Jumps(), series(loss=values))
    assert [f.severity for f in found].count("warning") == 1
    assert "more than 5 spikes within 1,000 steps" in next(f.message for f in found if f.severity == "warning")
    assert len(found) <= 5


def test_hard_batches_of_a_problem_that_is_learnt_within_twenty_steps_are_no_spikes():
    values = [1.6 * math.exp(-i / 4) + 0.002 for i in range(600)]
    for at in range(100, 600, 60):
        values[at] = 0.15  # a tenth of what was gained
    assert replay(Jumps(), series(loss=values)) == []


def test_climb_is_diverged_and_names_a_curriculum_as_the_way_out():
    values = healthy()
    values[800:] = [v + 12 for v in values[800:]]
    found = [f for f in replay(Jumps(), series(loss=values)) if f.code == "loss-diverged"]
    assert [f.severity for f in found] == ["warning"]
    assert 850 <= found[0].step <= 950
    assert "It began with a spike at step 800." in found[0].message
    assert "curriculum" in found[0].advice
    assert [f for f in replay(Jumps(schedule=(800,)), series(loss=values)) if f.code == "loss-diverged"] == []


def test_three_nonfinite_values_in_a_row_diverge_one_does_not():
    values = healthy(200)
    values[100] = math.nan
    assert replay(Jumps(), series(loss=values)) == []
    values[150:] = [math.inf] * 50
    (found,) = replay(Jumps(), series(loss=values))
    assert (found.code, found.severity, found.step) == ("loss-diverged", "error", 152)
    assert found.evidence["since"] == 150


def test_eighty_decibels_are_named_and_a_loss_passing_eighty_is_not():
    dead = replay(Jumps(), series(loss=[*healthy(300), *[80.0] * 50]))
    assert next(f.step for f in dead if f.code == "loss-at-80-db") == 302
    passing = series(loss=[100 - 0.1 * i for i in range(500)])
    assert replay(Jumps(), passing) == []


def test_constant_loss_has_no_spikes():
    assert replay(Jumps(), series(loss=[1.0] * 300)) == []


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.125, 1024.0]), st.integers(-500, 500))
def test_verdict_does_not_depend_on_scale_and_shift(seed, scale, shift):
    values = healthy(400, seed)
    values[200] = 30.0
    values[300:] = [v + 15 for v in values[300:]]
    told = [(f.code, f.step) for f in replay(Jumps(), series(loss=values))]
    assert told
    assert told == [(f.code, f.step) for f in replay(Jumps(), series(loss=[scale * v + shift for v in values]))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), max_size=200))
def test_any_numbers_are_survived_and_state_is_json_at_any_moment(values):
    watch, state = Jumps(), Jumps().init()
    for record in series(loss=values):
        state, found = watch.update(json.loads(json.dumps(state, allow_nan=False)), (record,))
        assert all(finding.step == record.step for finding in found)


def test_phases_are_kept_apart():
    records = [record._replace(phase="val") for record in series(loss=[1.0] * 30 + [math.nan] * 5)]
    assert replay(Jumps(), records) == []
    assert [f.phase for f in replay(Jumps(phase="val"), records)] == ["val"]


def test_loss_of_one_of_several_optimizers_may_climb():
    climbing = [1.0 + 0.01 * (i % 7) + max(0, i - 200) / 100 for i in range(600)]
    game = Record("plan/optimizers", 2.0, 0, source="step")
    assert [f.severity for f in replay(Jumps(), series(loss=climbing))] == ["warning"]
    assert [f.severity for f in replay(Jumps(), [game, *series(loss=climbing)])] == ["info"]
    broken = [game, *series(loss=[1.0] * 30 + [float("nan")] * 5)]
    assert [f.severity for f in replay(Jumps(), broken)] == ["error"]


@pytest.mark.parametrize("seed", range(6))
def test_a_harder_stage_that_is_learnt_again_is_no_divergence(seed):
    rng = random.Random(seed)
    values = [
        (1 + 0.8 * stage) * math.exp(-i / 150) + 0.3 + 0.15 * stage + 0.05 * rng.gauss(0, 1)
        for stage in range(4)
        for i in range(400)
    ]
    assert [f for f in replay(Jumps(), series(loss=values)) if f.severity != "info"] == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda i: 2.5, id="stays"),
        pytest.param(lambda i: 1 + i / 100, id="climbs"),
        pytest.param(lambda i: 2.2 + 0.8 * math.exp(-i / 60), id="falls by a third and stays"),
    ],
)
def test_a_leap_that_is_not_made_good_is_divergence(seed, after):
    rng = random.Random(seed)
    values = [2 * math.exp(-i / 100) + 0.5 + 0.05 * rng.gauss(0, 1) for i in range(600)]
    values += [after(i) + 0.1 * rng.gauss(0, 1) for i in range(500)]
    assert [f.code for f in replay(Jumps(), series(loss=values)) if f.severity != "info"] == ["loss-diverged"]


def heavy(rng: random.Random, share: float) -> float:
    """A loss of a network whose blocks are left out by chance."""
    return math.exp(0.2 * rng.gauss(0, 1)) + (4 + 4 * rng.expovariate(1) if rng.random() < share else 0)


@pytest.mark.parametrize("seed", range(8))
def test_a_loss_that_had_heavy_tails_from_its_start_is_no_news(seed):
    rng = random.Random(seed)
    found = replay(Jumps(), series(loss=[heavy(rng, 0.02) for _ in range(1500)]))
    assert found
    assert {f.severity for f in found} == {"info"}


@pytest.mark.parametrize("seed", range(8))
def test_spikes_that_become_frequent_are_news(seed):
    rng = random.Random(seed)
    values = [heavy(rng, 0.04 if i > 800 else 0.001) for i in range(1500)]
    assert "warning" in [f.severity for f in replay(Jumps(), series(loss=values))]


@pytest.mark.parametrize("seed", range(4))
def test_batches_on_another_scale_are_told_however_regularly_they_come(seed):
    rng = random.Random(seed)
    values = [math.exp(0.2 * rng.gauss(0, 1)) * (1e4 if i % 60 == 40 else 1) for i in range(600)]
    found = [f for f in replay(Jumps(), series(loss=values)) if f.severity != "info"]
    assert [(f.code, f.step) for f in found] == [("loss-spike", 160)]
    assert "3 within 1,000 steps" in found[0].message


@pytest.mark.parametrize("every", [13, 20, 50])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("height", "told"), [(lambda i: 4.0 + i / 1000, True), (lambda i: 2 + 2.5 * 0.997**i, False)])
def test_spikes_at_one_distance_warn_where_they_are_not_learnt(every, seed, height, told):
    rng = random.Random(seed)
    level = [1 + 2 * 0.99**i + rng.gauss(0, 0.05) for i in range(600)]
    loss = [height(i) if i % every == 5 else value for i, value in enumerate(level)]
    found = [f for f in replay(Jumps(), series(loss=loss)) if f.severity == "warning"]
    assert [f.evidence["every"] for f in found if "every" in f.evidence] == ([every] if told else [])


@pytest.mark.parametrize("seed", range(20))
def test_spikes_that_come_by_chance_have_no_distance(seed):
    rng = random.Random(seed)
    loss = [rng.gauss(1, 0.05) + (3 if rng.random() < 0.05 else 0) for i in range(2000)]
    assert [f for f in replay(Jumps(), series(loss=loss)) if "every" in f.evidence] == []
