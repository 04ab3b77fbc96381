import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

import stethoscope._writer
from stethoscope import Finding, Monitor, probes, sinks, watches
from stethoscope._parts import Notes
from stethoscope._protocols import Run
from stethoscope._writer import Writer
from stethoscope.testing import series

sys.path.insert(0, str(Path(__file__).parent))

from programs import script, steps_of

RUN = Run("a", "2026-01-01T00:00:00+00:00")
FINDING = Finding("loss-spike", "warning", "m", "a", step=3)


@dataclass(eq=False)
class Slow(sinks.Memory):
    """A sink on a slow disk."""

    background = True
    seconds: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    threads: set = field(default_factory=set)

    def write(self, step, records, findings):
        self.threads.add(threading.current_thread().name)
        assert self.gate.wait(20)
        time.sleep(self.seconds)
        super().write(step, records, findings)


def train(monitor, steps):
    for _ in range(steps):
        monitor.model(torch.ones(2, 3)).sum().backward()
        monitor.step(loss=1.0)


def test_a_sink_that_hangs_holds_up_neither_the_training_nor_other_sinks_and_gets_everything_in_order_later(tmp_path):
    slow, quick = Slow(), sinks.Jsonl(tmp_path)
    with Monitor(nn.Linear(3, 2), sinks=[slow, quick], every=1, probes=[probes.Activations()]) as monitor:
        train(monitor, 5)
        monitor.add(FINDING)
        assert not slow.records
        while not (tmp_path / "records.jsonl").exists() or len(list(sinks.read(tmp_path))) < 6:
            time.sleep(0.01)
        slow.gate.set()
        monitor.flush()
        assert [r.step for r in slow.records if r.name == "loss"] == [0, 1, 2, 3, 4]
        assert slow.findings == [FINDING]
    assert slow.threads == {"stethoscope-Slow"}


def test_what_a_slow_sink_cannot_take_is_dropped_counted_and_said_and_findings_never_are(monkeypatch, caplog):
    monkeypatch.setattr(stethoscope._writer, "MAX_WAITING", 10)
    slow, memory = Slow(), sinks.Memory()
    with Monitor(nn.Linear(3, 2), sinks=[slow, memory]) as monitor:
        train(monitor, 50)
        monitor.add(FINDING)
        train(monitor, 3)
        slow.gate.set()
    (lost,) = [f for f in monitor.findings if f.code == "records-lost"]
    assert lost.evidence["sink"] == "Slow"
    assert lost in slow.findings
    assert FINDING in slow.findings
    (message,) = [r.message for r in caplog.records if "were not written" in r.message]
    assert len(slow.records) + int(message.split()[1]) == len(memory.records) == 53
    assert [r.step for r in slow.records][:10] == list(range(10))


@pytest.mark.parametrize("moment", ["open", "write"])
def test_a_sink_that_fails_on_its_thread_is_said_to_the_others_and_what_it_missed_is_counted(moment, caplog):
    class Broken(Slow):
        def open(self, run):
            if moment == "open":
                raise OSError("No space left on device")

        def write(self, step, records, findings):
            if step == 2:
                raise OSError("No space left on device")
            super().write(step, records, findings)

    broken, memory = Broken(), sinks.Memory()
    broken.gate.set()
    with Monitor(nn.Linear(3, 2), sinks=[broken, memory]) as monitor:
        train(monitor, 2)
        monitor.flush()
        train(monitor, 4)
    (found,) = monitor.findings
    assert found.code == "part-disabled"
    assert "No space left" in found.message
    assert memory.findings == [found]
    missed = 7 if moment == "open" else 5  # records, and the finding itself
    assert f"Broken: {missed} records and findings were not written." in caplog.text


def test_what_a_sink_failed_with_is_kept_without_keys_and_passwords(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVICE_API_KEY", "sk-planted-1")
    user = "me:planted-2"

    class Remote(sinks.Memory):
        def write(self, step, records, findings):
            raise OSError(f"401 for https://{user}@host/api with bearer {os.environ['SERVICE_API_KEY']}")

    with Monitor(nn.Linear(3, 2), sinks=[Remote(), tmp_path]) as monitor:
        train(monitor, 1)
    assert "401 for https://***@host/api with bearer ***" in monitor.findings[0].message
    assert b"planted" not in (tmp_path / "records.jsonl").read_bytes()


def test_a_sink_that_never_answers_is_given_up_at_the_end(monkeypatch, caplog):
    monkeypatch.setattr(stethoscope._writer, "PATIENCE", 0.05)
    slow = Slow()
    monitor = Monitor(nn.Linear(3, 2), sinks=slow)
    train(monitor, 3)
    monitor.close()
    assert "did not answer" in caplog.text
    assert "Slow: 3 records" in caplog.text
    slow.gate.set()


def test_a_sink_that_hangs_is_waited_for_once_and_not_at_each_finding_and_checkpoint(monkeypatch, caplog):
    monkeypatch.setattr(stethoscope._writer, "PATIENCE", 0.5)
    slow, heard = Slow(), []
    began = time.monotonic()
    with Monitor(nn.Linear(3, 2), sinks=slow, on_finding=heard.append) as monitor:
        for _ in range(10):
            train(monitor, 1)
            monitor.add(FINDING)
            monitor.state_dict()
    assert len(heard) == 10
    assert time.monotonic() - began < 2
    assert caplog.text.count("did not answer") == 1
    assert "Slow: 20 records and findings" in caplog.text
    slow.gate.set()


def test_a_sink_that_was_given_up_and_answers_again_is_waited_for_again(monkeypatch):
    monkeypatch.setattr(stethoscope._writer, "PATIENCE", 0.05)
    slow = Slow()
    with Monitor(nn.Linear(3, 2), sinks=slow) as monitor:
        train(monitor, 2)
        monitor.flush()
        assert not slow.records
        monkeypatch.setattr(stethoscope._writer, "PATIENCE", 20)
        slow.gate.set()
        while not slow.records:
            time.sleep(0.001)
        train(monitor, 2)
        monitor.flush()
        assert [r.step for r in slow.records] == [0, 1, 2, 3]


def test_a_sink_that_exits_is_a_sink_that_failed():
    class Exits(Slow):
        def write(self, step, records, findings):
            sys.exit(2)

    with Monitor(nn.Linear(3, 2), sinks=Exits()) as monitor:
        train(monitor, 3)
        monitor.flush()
        assert [f.code for f in monitor.findings] == ["part-disabled"]
        assert "SystemExit: 2" in monitor.findings[0].message


def test_an_interrupt_before_the_thread_starts_loses_nothing(monkeypatch):
    slow = Slow()
    slow.gate.set()
    monitor = Monitor(nn.Linear(3, 2), sinks=slow)

    def interrupted(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(monitor, 1)
    train(monitor, 1)
    monitor.close()
    assert [r.step for r in slow.records] == [0, 1]


def test_on_finding_is_called_when_it_is_written():
    slow, seen = Slow(seconds=0.05), []
    slow.gate.set()
    with Monitor(nn.Linear(3, 2), sinks=slow, on_finding=lambda f: seen.append(f in slow.findings)) as monitor:
        monitor.add(FINDING)
    assert seen == [True]


def test_a_state_holds_nothing_that_is_not_written():
    slow = Slow(seconds=0.01)
    slow.gate.set()
    with Monitor(nn.Linear(3, 2), sinks=slow) as monitor:
        train(monitor, 5)
        assert monitor.state_dict()["step"] == len(slow.records) == 5


def test_a_sink_that_does_not_ask_for_a_thread_is_written_on_the_callers():
    class Here(sinks.Memory):
        def write(self, step, records, findings):
            assert threading.current_thread() is threading.main_thread()
            super().write(step, records, findings)

    here = Here()
    with Monitor(nn.Linear(3, 2), sinks=[here, sinks.Every(here, 1), sinks.OnRank(here)]) as monitor:
        train(monitor, 1)
        assert len(here.records) == 3


def test_wrappers_bring_the_sink_inside_to_its_thread():
    slow = Slow()
    slow.gate.set()
    with Monitor(nn.Linear(3, 2), sinks=[sinks.Every(sinks.OnRank(slow), 1)]) as monitor:
        train(monitor, 1)
    assert slow.threads == {"stethoscope-Every"}


def test_threads_end_by_themselves(monkeypatch):
    monkeypatch.setattr(stethoscope._writer, "IDLE", 0.01)
    slow = Slow()
    slow.gate.set()
    writer = Writer(slow, Notes(strict=False))
    for step in range(3):
        writer.put(RUN, step, series(loss=[1.0]), [])
        while any(thread.name == "stethoscope-Slow" for thread in threading.enumerate()):
            time.sleep(0.005)
    assert len(slow.records) == 3


def test_a_monitor_that_nobody_closes_writes_everything_before_the_process_ends(tmp_path):
    done = script(tmp_path, "monitor = Monitor(model, sinks=Slow(sys.argv[1]))\ntrain(monitor, 10)\nsys.exit(3)")
    assert done.returncode == 3, done.stderr
    assert steps_of(tmp_path) == list(range(10))


def test_a_forked_child_writes_nothing_and_ends(tmp_path):
    done = script(
        tmp_path,
        """
        monitor = Monitor(model, sinks=Slow(sys.argv[1]))
        train(monitor, 10)
        if os.fork() == 0:
            sys.exit(0)  # what the parent has not written yet is none of its business
        assert os.wait()[1] == 0
        if os.fork() == 0:
            train(monitor, 5)
            monitor.close()
            sys.exit(0)
        assert os.wait()[1] == 0
        train(monitor, 1)
        monitor.close()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == list(range(11))
    assert "forked" in done.stderr
    assert "did not answer" not in done.stderr


def test_a_child_forked_while_the_lock_is_held_closes_at_once_and_blames_no_sink(tmp_path):
    done = script(
        tmp_path,
        """
        monitor = Monitor(model, sinks=Slow(sys.argv[1]))
        train(monitor, 3)
        (writer,) = monitor._delivery._writers
        with writer._changed:
            child = os.fork()
            if child == 0:
                signal.alarm(20)
                import threading
                lock = threading.Lock()
                lock.acquire()
                writer._changed = threading.Condition(lock)  # as the writing thread leaves it behind
                monitor.close()
                sys.exit(0)
        assert os.wait()[1] == 0
        monitor.close()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == [0, 1, 2]
    assert "did not answer" not in done.stderr


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_run_that_is_killed_and_resumed_has_every_step_once(tmp_path, how):
    killed = script(
        tmp_path,
        f"""
        monitor = Monitor(model, sinks=Slow(sys.argv[1]), every=1, **presets.first_aid())
        train(monitor, 10)
        torch.save(monitor.state_dict(), sys.argv[1] + ".pt")
        train(monitor, 7)
        os.kill(os.getpid(), signal.{how})
        """,
    )
    assert killed.returncode == -getattr(signal, how), killed.stderr
    before = steps_of(tmp_path)
    assert before[:10] == list(range(10))
    resumed = script(
        tmp_path,
        """
        monitor = Monitor(model, sinks=Slow(sys.argv[1]), every=1, **presets.first_aid())
        monitor.load_state_dict(torch.load(sys.argv[1] + ".pt", weights_only=True))
        train(monitor, 10)
        monitor.close()
        """,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert steps_of(tmp_path) == list(range(20))


def full_disk(folder):
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("a file system of a few kilobytes takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this container may not mount")


# TensorBoard's own thread raises as well
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("sink", [sinks.Jsonl, sinks.TensorBoard])
def test_a_disk_that_fills_up_costs_records_and_nothing_else(tmp_path, sink, caplog):
    full_disk(tmp_path)
    model, memory = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))), sinks.Memory()
    try:
        with Monitor(
            model,
            sinks=[sink(tmp_path / "run"), memory],
            every=1,
            probes=[probes.Activations()],
            watches=[watches.NonFinite()],
        ) as monitor:
            train(monitor, 60)
        assert [r.step for r in memory.records if r.name == "loss"] == list(range(60))
        assert [f.code for f in monitor.findings] == ["part-disabled"]
        assert "were not written" in caplog.text
        if sink is sinks.Jsonl:
            assert steps_of(tmp_path) == list(range(len(steps_of(tmp_path))))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


class Holding(sinks.Memory):
    """Holds back what it is given, as TensorBoard's writer does."""

    def __init__(self, fails=False):
        super().__init__()
        self.held, self.flushed, self.fails = [], 0, fails

    def write(self, step, records, findings):
        self.held += records

    def flush(self):
        self.flushed += 1
        if self.fails:
            raise OSError("the disk is full")
        self.records += self.held
        self.held = []


class HoldingApart(Holding):
    background = True


@pytest.mark.parametrize("wrap", [lambda sink: sink, sinks.OnRank, lambda sink: sinks.Every(sink, 1)])
@pytest.mark.parametrize("kind", [Holding, HoldingApart])
def test_what_a_sink_holds_back_is_written_before_a_state_is_handed_out(kind, wrap):
    sink = kind()
    monitor = Monitor(nn.Linear(2, 1), sinks=wrap(sink))
    for _ in range(3):
        monitor.step(loss=1.0)
    assert sink.flushed == 0
    monitor.state_dict()
    assert [r.step for r in sink.records if r.name == "loss"] == [0, 1, 2]
    monitor.flush()
    assert sink.flushed == 1  # nothing has come since
    monitor.close()


@pytest.mark.parametrize("kind", [Holding, HoldingApart])
def test_a_sink_that_fails_to_write_what_it_holds_back_is_switched_off_and_said(kind):
    monitor = Monitor(nn.Linear(2, 1), sinks=kind(fails=True))
    monitor.step(loss=1.0)
    monitor.flush()
    monitor.step(loss=1.0)
    monitor.close()
    assert [f.code for f in monitor.findings] == ["part-disabled"]
    assert "the disk is full" in monitor.findings[0].message
