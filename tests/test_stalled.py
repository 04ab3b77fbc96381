from __future__ import annotations

import time

import pytest

from stethoscope._stalled import Heartbeat


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_silence_is_told_once_and_again_after_a_sign_of_life(caplog):
    told = []
    heartbeat = Heartbeat(told.append, seconds=0.05)
    heartbeat.beat(7)
    assert wait_for(lambda: told)
    time.sleep(0.2)
    assert [(f.code, f.step) for f in told] == [("training-stalled", 7)]
    assert "No step has ended" in caplog.text
    heartbeat.beat(8)
    assert wait_for(lambda: len(told) == 2)
    heartbeat.close()
    heartbeat.close()


def test_a_loop_that_turns_is_not_told():
    told = []
    heartbeat = Heartbeat(told.append, seconds=1.0)
    for step in range(20):
        heartbeat.beat(step)
        time.sleep(0.01)
    heartbeat.close()
    assert told == []


def test_seconds_must_be_above_zero():
    with pytest.raises(ValueError, match="above 0, got 0"):
        Heartbeat(print, seconds=0)
