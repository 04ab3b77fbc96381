import threading
import time

import pytest
import torch
from torch import nn

import stethoscope._stalled
from stethoscope import Monitor
from stethoscope._stalled import Heartbeat


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_silence_is_told_once_and_again_after_a_sign_of_life(caplog):
    told = []
    heartbeat = Heartbeat(told.append, seconds=0.05)
    for step in range(8):
        heartbeat.beat(step, planned=100)
    assert wait_for(lambda: told)
    time.sleep(0.2)
    assert [(f.code, f.step) for f in told] == [("training-stalled", 7)]
    assert "No step has ended" in caplog.text
    heartbeat.beat(8, planned=100)
    assert wait_for(lambda: len(told) == 2)
    heartbeat.close()
    heartbeat.close()


def test_a_loop_that_turns_is_not_told():
    told = []
    heartbeat = Heartbeat(told.append, seconds=2.0)
    for step in range(20):
        heartbeat.beat(step, planned=100)
        time.sleep(0.01)
    heartbeat.close()
    assert told == []


@pytest.mark.parametrize("planned", [None, 3])
def test_a_run_that_may_be_over_is_not_told(planned):
    told = []
    heartbeat = Heartbeat(told.append, seconds=0.05)
    for step in range(3):
        heartbeat.beat(step, planned)
    time.sleep(0.3)
    assert told == []
    heartbeat.close()


def test_another_sign_of_life_counts():
    told = []
    heartbeat = Heartbeat(told.append, seconds=1.0)
    heartbeat.beat(0, planned=100)
    for _ in range(30):
        time.sleep(0.05)
        heartbeat.beat()
    assert told == []
    heartbeat.close()


def test_a_monitor_tells_it_and_many_share_one_thread(monkeypatch):
    monkeypatch.setattr(stethoscope._stalled, "SECONDS", 0.2)
    monitors = [Monitor(nn.Linear(2, 2), planned_steps=10) for _ in range(20)]
    for monitor in monitors:
        for _ in range(2):
            monitor.model(torch.ones(3, 2)).sum().backward()
            monitor.step(loss=1.0)
    assert sum(thread.name == "stethoscope-heartbeat" for thread in threading.enumerate()) <= 1
    time.sleep(1.0)
    for monitor in monitors:
        monitor.step(loss=1.0)
        monitor.close()
        assert [(f.code, f.step) for f in monitor.findings] == [("training-stalled", 1)]


def test_seconds_must_be_above_zero():
    with pytest.raises(ValueError, match="above 0, got 0"):
        Heartbeat(print, seconds=0)
