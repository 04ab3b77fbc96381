from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay
from stethoscope.watches import Overfit


def history(train, val, name="loss"):
    return [
        record
        for i, (a, b) in enumerate(zip(train, val, strict=True))
        for record in (Record("loss", a, i, source="step"), Record(name, b, i, phase="val", source="log"))
    ]


FALLING = [4.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5]


def codes(records):
    return [f.code for f in replay(Overfit(), records)]


@pytest.mark.parametrize("shift", [0.0, -50.0, 1000.0])
def test_validation_that_climbs_while_training_falls(shift):
    train, val = [x + shift for x in FALLING], [x + shift for x in (4, 3, 2.5, 2.6, 3.1, 3.3, 3.6)]
    assert codes(history(train, val)) == ["overfit"]
    assert codes(history(train, val, "val_loss")) == ["overfit"]


def test_both_climbing_is_not_overfit_nor_is_noise():
    assert codes(history([4, 2, 1, 3, 3.5, 4, 4], [4, 2, 1, 3, 3.5, 4, 4])) == []
    assert codes(history(FALLING, [4, 3, 1.5, 1.6, 2.0, 1.5, 2.0])) == []


def test_a_long_time_without_a_best_is_an_info():
    found = replay(Overfit(), history([4.0, 1.0, *[0.99] * 12], [4.0, 1.0, *[1.01] * 12]))
    assert [(f.code, f.severity) for f in found] == [("overtraining", "info")]


@pytest.mark.parametrize("items", [16, 4000])
def test_a_real_training_on_few_items_and_on_many(items):
    torch.manual_seed(0)
    teacher = torch.randn(20)
    x, vx = torch.randn(items, 20), torch.randn(500, 20)
    y, vy = (((each @ teacher > 0) ^ (torch.rand(len(each)) < 0.2)).float() for each in (x, vx))
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    lossy = nn.functional.binary_cross_entropy_with_logits
    with Monitor(model, optimizer, watches=[Overfit()], strict=True) as monitor:
        for step in range(400):
            chosen = torch.randint(items, (16,))
            loss = lossy(model(x[chosen])[:, 0], y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
            if step % 40 == 39:
                with torch.no_grad():
                    monitor.log({"loss": lossy(model(vx)[:, 0], vy)}, phase="val")
    assert [f.code for f in monitor.findings] == (["overfit"] if items == 16 else [])


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30))
def test_whatever_comes_in_the_state_is_json(pairs):
    watch = Overfit()
    state = watch.init()
    for record in history([a for a, _ in pairs], [b for _, b in pairs]):
        state, _ = watch.update(state, [record])
    json.dumps(state)


def long(train, val, every=20):
    """A training loss at each step, a validation loss every `every` steps."""
    for i, value in enumerate(train):
        yield Record("loss", value, i, source="step")
        if (i + 1) % every == 0:
            yield Record("loss", val((i + 1) // every), i, phase="val", source="log")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shift", [0.0, -30.0])
def test_validation_that_stays_where_it_began_while_training_falls(seed, shift):
    rng = random.Random(seed)
    train = [4 * math.exp(-i / 60) + 0.1 * rng.gauss(0, 1) + shift for i in range(300)]
    found = replay(Overfit(), long(train, lambda i: 4.2 + 0.1 * rng.gauss(0, 1) + shift))
    assert [f.code for f in found] == ["overfit"]
    assert "no longer improves" in found[0].message


@pytest.mark.parametrize("seed", range(4))
def test_validation_of_ten_times_the_training_loss_is_learnt_by_heart(seed):
    rng = random.Random(seed)
    train = [4 * math.exp(-i / 30) for i in range(300)]
    partly = replay(Overfit(), long(train, lambda i: 1.0 + math.exp(-i) + 0.02 * rng.gauss(0, 1)))
    assert [f.code for f in partly] == ["overfit"]
    solved = replay(Overfit(), long(train, lambda i: 0.2 * math.exp(-i) + 0.02 + 0.001 * rng.gauss(0, 1)))
    assert [f for f in solved if f.severity != "info"] == []


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("train", "val"),
    [
        pytest.param(lambda i: 4 - 3 * (1 - math.exp(-i / 80)), lambda i: 4 - 3.2 * (1 - math.exp(-i / 4)), id="together"),
        pytest.param(lambda i: 4 - 3 * (1 - math.exp(-i / 80)), lambda i: 4 - 2 * (1 - math.exp(-i / 4)), id="a gap"),
        pytest.param(lambda i: 4.0, lambda i: 4.2, id="nothing learnt"),
        pytest.param(lambda i: 4 - 3 * (1 - math.exp(-i / 80)), lambda i: 4000 - 3000 * (1 - math.exp(-i / 4)), id="a sum"),
        pytest.param(lambda i: 4 - 3 * (1 - math.exp(-i / 80)), lambda i: 4.5 - 0.1 * i, id="slowly, on harder data"),
    ],
)  # fmt: skip
def test_usual_gaps_between_training_and_validation_are_none(train, val, seed):
    rng = random.Random(seed)
    noisy = [train(i) + 0.2 * rng.gauss(0, 1) for i in range(300)]
    found = replay(Overfit(), long(noisy, lambda i: val(i) + 0.02 * rng.gauss(0, 1)))
    assert [f for f in found if f.severity != "info"] == []


def test_other_spellings_of_validation_are_heard():
    renamed = [r._replace(phase="valid") if r.source == "log" else r for r in history(FALLING, (4, 3, 2.5, 2.6, 3.1, 3.3, 3.6))]  # fmt: skip
    assert codes(renamed) == ["overfit"]


@pytest.mark.parametrize("seed", range(6))
def test_validation_that_wanders_around_a_converged_model_is_noise(seed):
    rng = random.Random(seed)
    train = [0.05 + 0.05 * math.exp(-i / 15) + 0.01 * rng.gauss(0, 1) for i in range(600)]
    wander = [0.045]
    for _ in range(40):
        wander.append(0.045 + 0.8 * (wander[-1] - 0.045) + 0.006 * rng.gauss(0, 1))
    assert [f for f in replay(Overfit(), long(train, lambda i: wander[i])) if f.severity != "info"] == []


@pytest.mark.parametrize("planned", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_validation_of_few_items_at_every_step_is_judged_over_blocks_of_steps(seed, planned):
    rng = random.Random(seed)
    train = [1.2 + 1.1 * math.exp(-i / 60) + 0.15 * rng.gauss(0, 1) for i in range(300)]
    slow = [0.0]
    for _ in range(301):  # what eight items say depends on where the weights are, and these move smoothly
        slow.append(0.9 * slow[-1] + 0.04 * rng.gauss(0, 1))
    said = replay(
        Overfit(),
        [
            *([Record("plan/steps", 300, 0, source="step")] if planned else []),
            *long(train, lambda i: 1.4 + 0.9 * math.exp(-i / 50) + slow[i], every=1),
        ],
    )
    assert [f for f in said if f.severity != "info"] == []


@pytest.mark.parametrize("every", [1, 5, 30])
@pytest.mark.parametrize("seed", range(4))
def test_a_climb_beyond_the_noise_is_told_however_often_is_validated(seed, every):
    rng = random.Random(seed)
    train = [2.0 * math.exp(-i / 150) + 0.1 * rng.gauss(0, 1) + 0.2 for i in range(900)]
    said = replay(
        Overfit(),
        long(train, lambda i: 1.0 + math.exp(-i * every / 60) + i * every / 700 + 0.05 * rng.gauss(0, 1), every),
    )
    assert {f.code for f in said if f.severity == "warning"} == {"overfit"}
    assert said[0].step < 800


@pytest.mark.parametrize("seed", range(4))
def test_a_flow_that_learns_little_of_a_noisy_loss_is_left_alone(seed):
    rng = random.Random(seed)
    train = [1.0 + 0.3 * math.exp(-i / 50) + 0.3 * rng.gauss(0, 1) for i in range(1000)]
    said = replay(Overfit(), long(train, lambda i: 1.0 + 0.3 * math.exp(-i * 20 / 50) + 0.08 * rng.gauss(0, 1)))
    assert [f for f in said if f.severity != "info"] == []


@pytest.mark.parametrize(("accuracy", "severity"), [(0.96, "info"), (96.0, "info"), (0.7, "warning")])
def test_a_climb_is_an_info_where_the_accuracy_is_as_good_as_it_was(accuracy, severity):
    watch, state, said = Overfit(), Overfit().init(), []
    for i in range(300):
        state, _ = watch.update(state, [Record("loss", 2.0 * math.exp(-i / 60), i, source="step")])
        if i % 20 == 19:
            loss = 0.1 + 2 * math.exp(-i / 20) + i / 400
            logged = [Record(n, v, i, phase="val", source="log") for n, v in (("acc", accuracy), ("loss", loss))]
            state, found = watch.update(json.loads(json.dumps(state)), logged)
            said += found
    assert [(f.code, f.severity) for f in said] == [("overfit", severity)]
