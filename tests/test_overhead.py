import random
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, presets, sinks, watches
from stethoscope._overhead import Pace, parse
from stethoscope._protocols import Key

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Process time that stands still unless it is pushed."""

    class Clock:
        now = 100.0

    monkeypatch.setattr("time.process_time", lambda: Clock.now)
    return Clock


def run(pace, clock, steps, seconds, noise=0.0):
    """Let a training run whose steps take `seconds(step, load)`; return the share that observing took at the end."""
    chance = random.Random(0)
    spent = plain = 0.0
    for step in range(steps):
        took = seconds(step, pace.load(step))
        clock.now += took * (1 + noise * chance.gauss())
        if step >= steps // 2:
            spent += took
            plain += seconds(step, frozenset())
        pace.lap(step)
    return spent / plain - 1


@settings(deadline=None, max_examples=15)
@given(
    target=st.floats(0.02, 0.2),
    cost=st.floats(0.0, 3.0),
    intervals=st.lists(st.sampled_from([1, 4, 20]), min_size=1, max_size=3),
)
def test_observing_takes_at_most_the_target_whatever_it_costs(target, cost, intervals):
    with pytest.MonkeyPatch.context() as patch:
        clock = clock_of(patch)
        pace = Pace(target, intervals, CPU)
        run(pace, clock, 6000, lambda _, load: 0.1 * (1 + cost * len(load)))
        full = cost * sum(1 / every for every in intervals)
        assert full / pace.stretch <= target * 1.1
        assert pace.stretch == 1 or full / (0.7 * pace.stretch - 1) >= target * 0.9  # no rarer than it must


def clock_of(patch):
    clock = type("Clock", (), {"now": 100.0})
    patch.setattr("time.process_time", lambda: clock.now)
    return clock


def test_noise_and_drift_of_the_steps_do_not_make_it_flutter(clock):
    pace, seen = Pace(0.01, [1, 50], CPU), []

    def seconds(step, load):
        seen.append(pace.stretch)
        return 0.1 * (1 + step / 3000) * (1 + 0.02 * (0 in load) + 0.2 * (1 in load))

    assert run(pace, clock, 12_000, seconds, noise=0.05) <= 0.015
    late = seen[3000:]
    assert sum(a != b for a, b in pairwise(late)) <= 4
    assert 2 <= pace.stretch <= 4


def test_a_step_with_something_else_in_it_is_not_counted(clock):
    pace = Pace(0.01, [10], CPU)
    for step in range(500):
        if step % 10 == 0:
            pace.interrupt()
            clock.now += 100.0
        clock.now += 0.1
        pace.lap(step)
    assert (pace.stretch, pace.share) == (1, None)


@dataclass(frozen=True)
class Dear:
    """A probe that takes as long as the step itself."""

    clock: type
    every: int | None = None

    def attach(self, model):
        return Dear.Attached(self.clock)

    def covers(self, other):
        return self == other

    @dataclass
    class Attached:
        clock: type

        def arm(self, on, phase):
            pass

        def read(self, given):
            self.clock.now += 0.1
            return {Key("dear"): torch.ones(())}

        def detach(self):
            pass


def test_a_monitor_observes_as_rarely_as_it_must_and_records_what_it_takes(clock):
    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), probes=[Dear(clock)], every=10, sinks=memory, overhead="2%") as monitor:
        for step in range(2000):
            clock.now += 0.1
            monitor.step(loss=1.0)
            if step % 100 == 0:
                monitor.log({"accuracy": 0.5})
                with monitor.phase("val"):
                    clock.now += 5.0
    assert [r.value for r in memory.records if r.name == "overhead/every"][-1] == 50.0
    assert [r.value for r in memory.records if r.name == "overhead/share"][-1] == pytest.approx(0.02)
    observed = [r.step for r in memory.records if r.name == "dear" and r.phase == "train"]
    assert observed[-10:] == list(range(1500, 2000, 50))


def test_flags_of_every_step_leave_one_in_sixteen_out_to_be_compared_with(clock):
    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), watches=[watches.NonFinite()], sinks=memory, overhead=0.5) as monitor:
        for _ in range(64):
            clock.now += 0.1
            monitor.model(torch.full((2, 2), torch.nan)).sum().backward()
            monitor.step(loss=1.0)
    flagged = {r.step for r in memory.records if r.source == "probe" and r.module == "" and r.phase == "train"}
    assert set(range(64)) - flagged == {15, 31, 47, 63}


def test_without_a_limit_nothing_is_measured_and_nothing_left_out():
    memory = sinks.Memory()
    with Monitor(nn.Linear(2, 2), **presets.first_aid(), sinks=memory, every=2) as monitor:
        for _ in range(40):
            monitor.model(torch.ones(2, 2)).sum().backward()
            monitor.step(loss=1.0)
    assert not [r for r in memory.records if r.name.startswith("overhead/")]
    assert {r.step for r in memory.records if r.name == "activation/rms"} == set(range(0, 40, 2))


@pytest.mark.parametrize("given", ["1", "0%", "100%", "x%", "-1%", 0, 1.0, float("nan"), [1]])
def test_a_limit_that_is_none_is_refused(given):
    with pytest.raises(ValueError, match="share of the training's time"):
        Monitor(nn.Linear(2, 2), overhead=given)
    assert parse("0.5%") == 0.005
