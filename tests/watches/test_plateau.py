from __future__ import annotations

import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stethoscope import Record
from stethoscope.testing import replay, series
from stethoscope.watches import Plateau

STEPS = 3000


def noise(size: int = STEPS, sd: float = 1.0, seed: int = 0) -> list[float]:
    rng = random.Random(seed)
    return [rng.gauss(0, sd) for _ in range(size)]


def falls_then_stays(at: int = 1000, size: int = STEPS, sd: float = 0.5, seed: int = 0) -> list[float]:
    """An SI-SDR loss: from +5 to -10 dB by `at`, then flat."""
    return [max(-10.0, 5 - 15 * i / at) + e for i, e in enumerate(noise(size, sd, seed))]


def test_stall_of_a_negative_loss_is_reported_with_its_numbers():
    found = replay(Plateau(patience=200, unit="dB"), series(loss=falls_then_stays()))
    assert [finding.code for finding in found] == ["loss-plateau"]
    assert found[0].severity == "warning"
    assert 1200 <= found[0].step <= 2000
    assert "per 200 steps (95 % upper bound" in found[0].message
    assert "< 0.5 dB), level -10" in found[0].message
    assert found[0].evidence["upper_bound"] < 0.5 == found[0].evidence["min_improvement"]
    assert math.isclose(found[0].evidence["level"], -10, abs_tol=0.5)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "level",
    [
        pytest.param(lambda i: 5 - 15 * i / STEPS, id="line"),
        pytest.param(lambda i: 40 * (i + 10) ** -0.3, id="power law"),
        pytest.param(lambda i: -i / 1000, id="drift of a tenth of the noise per 100 steps"),
        pytest.param(lambda i: -8 * math.log10(1 + i / 50), id="logarithm"),
    ],
)
def test_slow_but_steady_progress_in_heavy_noise_is_left_alone(level, seed):
    values = [level(i) + e for i, e in enumerate(noise(seed=seed))]
    assert replay(Plateau(patience=300), series(loss=values)) == []


def test_undecided_says_nothing_before_one_patience():
    assert replay(Plateau(patience=1000), series(loss=noise(1000))) == []


def test_run_that_never_left_its_start_is_reported():
    found = replay(Plateau(patience=200), series(loss=[28 + e for e in noise(sd=0.5)]))
    assert [finding.code for finding in found] == ["loss-plateau"]
    assert found[0].evidence["drop"] < 5 * found[0].evidence["noise"]


def test_constant_loss_is_a_plateau():
    assert len(replay(Plateau(patience=100), series(loss=[0.1] * 500))) == 1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.125, 1, 1024]), st.integers(-1000, 1000))
def test_verdict_does_not_depend_on_scale_and_shift(seed, scale, shift):
    values = falls_then_stays(400, 1200, seed=seed)
    watch = Plateau(patience=100)
    steps = [f.step for f in replay(watch, series(loss=values))]
    assert steps == [f.step for f in replay(watch, series(loss=[scale * v + shift for v in values]))]


def test_loss_that_explodes_in_double_precision_is_survived():
    exploding = [(10.0 - step / 100) * (1e300 if step % 3 else 1) for step in range(500)]
    replay(Plateau(patience=40), series(loss=exploding))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=300), st.integers(1, 40))
def test_any_numbers_are_survived_and_state_is_json_at_any_moment(values, patience):
    watch, state = Plateau(patience=patience), Plateau(patience=patience).init()
    for record in series(loss=values):
        state, found = watch.update(json.loads(json.dumps(state, allow_nan=False)), (record,))
        assert all(finding.step == record.step for finding in found)


def test_resume_from_json_changes_nothing():
    records = series(loss=falls_then_stays(), lr=[1e-3] * STEPS)
    watch, state, found = Plateau(patience=200), Plateau(patience=200).init(), []
    for i in range(0, len(records), 2):
        state = json.loads(json.dumps(state))
        state, more = watch.update(state, records[i : i + 2])
        found += more
    assert found == replay(watch, records)


def test_nan_outliers_and_missing_steps_do_not_move_the_verdict_far():
    values = falls_then_stays()
    clean = replay(Plateau(patience=200), series(loss=values))[0].step
    rng = random.Random(1)
    dirty = [math.nan if (u := rng.random()) < 0.05 else v + 25 if u < 0.06 else v for v in values]
    kept = [i for i in range(STEPS) if rng.random() < 0.5]
    assert abs(replay(Plateau(patience=200), series(loss=dirty))[0].step - clean) <= 200
    gaps = series(kept, loss=[values[i] for i in kept])
    assert abs(replay(Plateau(patience=200), gaps)[0].step - clean) <= 200


def test_memory_does_not_grow():
    watch, state, sizes = Plateau(patience=100), Plateau().init(), []
    for i in range(30_000):
        state, _ = watch.update(state, (Record("loss", 1 / (i + 1), i, source="step"),))
        if i in (8_000, 29_999):
            sizes.append(len(json.dumps(state)))
    assert sizes[1] < 1.5 * sizes[0] < 6000


def test_learning_rate_cut_restarts_the_window_and_so_finds_the_stall_sooner():
    values = falls_then_stays(2000, 4000)
    lr = [1e-3 if i < 2000 else 1e-7 for i in range(4000)]
    blind = replay(Plateau(patience=200), series(loss=values))[0].step
    told = replay(Plateau(patience=200), series(loss=values, lr=lr))[0].step
    assert told + 200 < blind


def test_learning_rate_of_zero_is_no_change_and_nan_is_none():
    lr = [0.0] * 300 + [math.nan] * 300
    assert len(replay(Plateau(patience=100), series(loss=[1.0] * 600, lr=lr))) == 1


def test_share_of_the_plan_sets_patience_and_what_is_left_sets_severity():
    plan = Record("plan/steps", STEPS, 0, source="step")
    early = replay(Plateau(unit="dB"), [plan, *series(loss=falls_then_stays(500))])[0]
    assert early.evidence["patience"] == 300
    assert early.severity == "warning"
    late = replay(Plateau(unit="dB"), [plan, *series(loss=falls_then_stays(2500))])
    assert [f.severity for f in late] in ([], ["info"])
    short = replay(
        Plateau(unit="dB"), [Record("plan/steps", 1500, 0, source="step"), *series(loss=falls_then_stays(1000))]
    )
    assert short[0].severity == "info"
    assert "of the run is left" in short[0].message


def test_plan_that_is_said_again_by_a_resumed_run_changes_nothing():
    plan = [Record("plan/steps", STEPS, 0, source="step")]
    values = series(loss=falls_then_stays())
    again = [*plan, *values[:1100], plan[0]._replace(step=1100), *values[1100:]]
    assert replay(Plateau(unit="dB"), again) == replay(Plateau(unit="dB"), plan + values)


def test_without_a_plan_a_share_means_a_thousand_steps_at_least():
    found = replay(Plateau(unit="dB"), series(loss=falls_then_stays()))
    assert found[0].evidence["patience"] == 1000


def test_planned_change_ahead_softens_and_once_passed_the_stall_is_told_again():
    found = replay(Plateau(patience=200, unit="dB", schedule=(2200,)), series(loss=falls_then_stays()))
    assert [f.severity for f in found] == ["info", "warning"]
    assert "planned change lies ahead, at step 2200" in found[0].message
    assert found[1].step > 2200


def test_stall_is_told_again_only_after_it_was_left():
    values = [max(-10.0, 5 - i / 40) if i < 2000 else max(-20.0, -10 - (i - 2000) / 40) for i in range(4000)]
    found = replay(Plateau(patience=200), series(loss=[v + e for v, e in zip(values, noise(4000, 0.2), strict=True)]))
    assert len(found) == 2
    assert found[0].step < 2000 < 2400 < found[1].step


def test_phases_and_names_are_kept_apart():
    records = [Record("loss", 1.0, i, phase="val", source="log") for i in range(0, 3000, 30)]
    assert replay(Plateau(patience=200), records) == []
    found = replay(Plateau(patience=200, phase="val"), records)
    assert [f.phase for f in found] == ["val"]
    assert replay(Plateau("loss/pit", patience=200), series(loss=[1.0] * 600)) == []


def test_loss_given_to_step_and_logged_again_counts_once():
    records = series(loss=falls_then_stays())
    twice = [both for r in records for both in (r, r._replace(source="log", value=r.value + 3))]
    assert replay(Plateau(patience=200), twice) == replay(Plateau(patience=200), records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patience": 0}, "patience must be steps"),
        ({"patience": "10"}, "such as '10%', not '10'"),
        ({"patience": "120%"}, "patience must be"),
        ({"min_improvement": 0}, "min_improvement must be positive"),
        ({"confidence": 95}, r"confidence must lie in \(0.5, 1\), not 95"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Plateau(**arguments)


@pytest.mark.parametrize("every", [200, 1000])
@pytest.mark.parametrize("seed", range(3))
def test_validation_losses_far_apart_are_judged_in_steps(every, seed):
    """A run of 20,000 steps, one value per `every` steps, -10 dB reached at step 4000 or approached to the end."""
    plan = Record("plan/steps", 20_000, 0, source="step")
    steps = range(every, 20_000, every)

    def validated(level):
        values = zip(steps, noise(len(steps), 0.15, seed), strict=True)
        return [plan, *(Record("loss", level(s) + e, s, phase="val", source="log") for s, e in values)]

    healthy = validated(lambda step: -12 * (1 - math.exp(-step / 6000)))
    stuck = validated(lambda step: -10 * (1 - math.exp(-min(step, 4000) / 2000)))
    assert replay(Plateau(phase="val"), healthy) == []
    (found,) = replay(Plateau(phase="val"), stuck)
    assert 6000 < found.step <= 16_000


@pytest.mark.parametrize("seed", range(3))
def test_loss_that_rises_is_no_plateau_until_it_stays(seed):
    rising = [1 + min(i, 1500) / 300 + e for i, e in enumerate(noise(sd=0.2, seed=seed))]
    found = replay(Plateau(patience=100), series(loss=rising))
    assert [f.code for f in found] == ["loss-plateau"]
    assert found[0].step > 1500


@pytest.mark.parametrize("seed", range(3))
def test_loss_that_has_fallen_to_nearly_nothing_is_an_info_however_early(seed):
    plan = Record("plan/steps", STEPS, 0, source="step")
    values = [2 * math.exp(-i / 60) + 0.02 * math.exp(e) for i, e in enumerate(noise(sd=0.1, seed=seed))]
    found = replay(Plateau(), [plan, *series(loss=values)])
    assert [f.severity for f in found] == ["info"]
    assert "of its start is left: it may simply have converged" in found[0].message
    shifted = replay(Plateau(), [plan, *series(loss=[v - 1 for v in values])])
    assert [f.severity for f in shifted] == ["warning"]  # below zero a share of the loss means nothing


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("level", [1.6, -0.4])
def test_loss_that_never_left_its_start_is_a_warning_even_late_in_the_run(level, seed):
    plan = Record("plan/steps", 400, 0, source="step")
    values = [level + 0.05 * e for e in noise(400, seed=seed)]
    lr = [0.1] * 150 + [0.03] * 250  # the window begins anew, so that the verdict comes late
    late = [f for f in replay(Plateau(), [plan, *series(loss=values, lr=lr)]) if f.step > 200]
    assert all(f.severity == "warning" and "hardly left its start" in f.message for f in late)
    assert [f.step for f in replay(Plateau(), [plan, *series(loss=values)])]


@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_was_trained_before_may_stay_at_its_start(seed):
    level = [2.3 - 1e-5 * step + 0.05 * x for step, x in enumerate(noise(1000, seed=seed))]
    plan = [Record("plan/steps", 1000, 0, source="step"), Record("plan/pretrained", 1.0, 0, source="step")]
    tuned = replay(Plateau(), [*plan, *series(loss=level)])
    assert tuned
    assert all(f.severity == "info" and "usual where a trained model is trained on" in f.message for f in tuned)
    plan[1] = plan[1]._replace(value=0.0)
    assert "warning" in [f.severity for f in replay(Plateau(), [*plan, *series(loss=level)])]


def test_a_run_that_is_resumed_was_not_trained_before_it_began():
    watch = Plateau()
    state = watch.init()
    for record in series(loss=[2.3, 2.2, 2.1]):
        state, _ = watch.update(state, [record])
    state, _ = watch.update(state, [Record("plan/pretrained", 1.0, 3, source="step")])
    assert not state["pretrained"]


def test_loss_of_one_of_several_optimizers_is_no_measure_of_progress():
    game = Record("plan/optimizers", 2.0, 0, source="step")
    found = replay(Plateau(patience=100), [game, *series(loss=[0.69 + 0.1 * e for e in noise()])])
    assert [f.severity for f in found] == ["info"]
    assert "Several optimizers step" in found[0].message


def test_nothing_is_judged_while_the_learning_rate_warms_up():
    warm_up = [min(1.0, (i + 1) / 1000) for i in range(STEPS)]
    values = [3 - 2 * min(1.0, max(0, i - 900) / 1500) + 0.1 * e for i, e in enumerate(noise())]
    assert replay(Plateau(patience=100), series(loss=values[:1000], lr=warm_up[:1000])) == []
    assert replay(Plateau(patience=100), series(loss=values[:1000], lr=[1.0] * 1000)) != []


@pytest.mark.parametrize("seed", range(3))
def test_half_of_a_run_without_learning_is_told_once(seed):
    plan = Record("plan/steps", 300, 0, source="step")
    random_labels = [1.386 + 0.05 * math.exp(-i / 80) + 0.002 * e for i, e in enumerate(noise(300, seed=seed))]
    found = replay(Plateau(), [plan, *series(loss=random_labels)])
    assert [f.severity for f in found if f.step < 200] == ["warning"]
    assert "hardly left its start" in found[0].message
    assert ">=" not in found[0].message  # a bound that is passed proves nothing
    learns = [1.386 - 0.5 * i / 300 + 0.05 * e for i, e in enumerate(noise(300, seed=seed))]
    assert replay(Plateau(), [plan, *series(loss=learns)]) == []
    rises = [2.3 + 1e-3 * i + 0.01 * e for i, e in enumerate(noise(300, seed=seed))]
    assert replay(Plateau(), [plan, *series(loss=rises)]) == []
    for share, told in ((0.25, False), (0.06, True)):  # of the start, in all
        slowly = [4.0 - share * 4.0 * (i / 300) ** 1.5 + 0.05 * e for i, e in enumerate(noise(300, seed=seed))]
        assert bool(replay(Plateau(), [plan, *series(loss=slowly)])) == told


@pytest.mark.parametrize("value", [0.0, 0.6931, -3.5])
def test_a_loss_that_is_one_number_from_the_start_is_told_at_once(value):
    found = replay(Plateau(), series(loss=[value] * 3000))
    assert [(f.severity, f.step) for f in found] == [("warning", 19)]
    assert "exactly" in found[0].message
    assert replay(Plateau(), series(loss=[value] * 19 + [value - 1e-3 * i for i in range(1, 100)])) == []


@pytest.mark.parametrize("seed", range(4))
def test_half_of_a_run_at_a_high_level_is_a_warning_and_at_a_low_one_an_info(seed):
    plan = Record("plan/steps", 1000, 0, source="step")
    collapsed = [4 - 1.5 * min(1, i / 350) + 0.05 * e for i, e in enumerate(noise(1000, seed=seed))]
    found = replay(Plateau(), [plan, *series(loss=collapsed)])
    assert [f.severity for f in found].count("warning") == 1
    assert found[-1].severity == "warning"
    good = [4 - 3 * min(1, i / 450) + 0.05 * e for i, e in enumerate(noise(1000, seed=seed))]
    assert {f.severity for f in replay(Plateau(), [plan, *series(loss=good)])} <= {"info"}
    late = [4 - 1.5 * min(1, i / 700) + 0.05 * e for i, e in enumerate(noise(1000, seed=seed))]
    assert {f.severity for f in replay(Plateau(), [plan, *series(loss=late)])} <= {"info"}


@pytest.mark.parametrize("seed", range(3))
def test_a_margin_that_every_item_has_passed_is_learnt(seed):
    """A triplet loss: exactly zero in most steps, now and then one item inside of the margin."""
    rng = random.Random(seed)
    values = [
        max(0.0, 0.8 - i / 500) + rng.random() * (0.2 if i < 400 else 0.03 * (rng.random() < 0.1)) for i in range(2000)
    ]
    found = replay(Plateau(patience="10%"), [Record("plan/steps", 5000, 0), *series(loss=values)])
    assert [finding.severity for finding in found if finding.code == "loss-plateau"] == ["info"]


@pytest.mark.parametrize("seed", range(4))
def test_a_fall_within_the_first_three_steps_counts_as_learnt(seed):
    values = [
        1.0,
        0.7,
        0.5,
        *[0.0953 + 0.3 * math.exp(-i / 10) + 0.002 * e for i, e in enumerate(noise(600, seed=seed))],
    ]
    found = replay(Plateau(patience=60), [Record("plan/steps", 1300, 0, source="step"), *series(loss=values)])
    assert {f.severity for f in found} == {"info"}


@pytest.mark.parametrize("seed", range(5))
def test_a_noisy_loss_below_zero_that_has_surely_fallen_has_left_its_start(seed):
    losses = [1.05 * 0.93**step - 0.2 + each for step, each in enumerate(noise(300, 0.4, seed))]
    found = replay(Plateau(), [Record("plan/steps", 300.0, 0), *series(loss=losses)])
    assert [f.message for f in found if f.severity != "info" and "hardly left" in f.message] == []
