"""What happens around a training: disks, processes, threads, clocks. Nothing of it changes the training or loses a finding."""

import resource
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from stethoscope import Finding, Monitor, presets, probes, sinks

sys.path.insert(0, str(Path(__file__).parent))

import programs
from programs import steps_of

# TensorBoard's own thread raises as well, sometimes after the test
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

script = partial(programs.script, timeout=120)

FINDING = Finding("loss-spike", "warning", "m", "a", step=3)


def train(monitor, steps):
    for _ in range(steps):
        monitor.model(torch.ones(2, 3)).sum().backward()
        monitor.step(loss=1.0)


def losses(memory):
    return [record.step for record in memory.records if record.name == "loss"]


@contextmanager
def small_files():
    """No file grows beyond 20 kB, as on a disk that is full; no fixture, since pytest's own log may be such a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", [sinks.Jsonl, sinks.TensorBoard])
def test_a_full_disk_costs_what_does_not_fit_which_is_counted_and_no_other_sink(kind, tmp_path, caplog):
    model, memory = nn.Sequential(*(nn.Linear(3, 3) for _ in range(20))), sinks.Memory()
    written_to = [kind(tmp_path / "run"), memory]
    with small_files(), Monitor(model, sinks=written_to, every=1, probes=[probes.Activations()]) as monitor:
        train(monitor, 30)
        monitor.add(FINDING)
        train(monitor, 10)
    assert losses(memory) == list(range(40))
    assert sorted(f.code for f in monitor.findings) == ["loss-spike", "part-disabled"]
    assert memory.findings == monitor.findings
    assert f"{kind.__name__}: " in caplog.text
    assert "were not written" in caplog.text
    if kind is sinks.Jsonl:
        (lost,) = [int(r.message.split()[1]) for r in caplog.records if "were not written" in r.message]
        written = list(sinks.read(tmp_path / "run"))
        kept = sum(len(d.records) + len(d.findings) for d in written)
        assert kept + lost == len(memory.records) + len(memory.findings)


@pytest.mark.parametrize("kind", [sinks.Jsonl, sinks.TensorBoard])
def test_a_place_that_cannot_be_written_is_said_and_the_training_goes_on(kind, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    memory = sinks.Memory()
    with Monitor(nn.Linear(3, 2), sinks=[kind(tmp_path / "file" / "run"), memory]) as monitor:
        train(monitor, 3)
    assert losses(memory) == [0, 1, 2]
    assert [f.code for f in monitor.findings] == ["part-disabled"]
    assert "Check the path" in monitor.findings[0].advice
    assert "were not written" in caplog.text


@pytest.mark.parametrize("kind", [sinks.Jsonl, sinks.TensorBoard])
def test_a_folder_that_is_deleted_in_the_middle_is_noticed(kind, tmp_path, caplog):
    memory = sinks.Memory()
    with Monitor(nn.Linear(3, 2), sinks=[kind(tmp_path / "run"), memory]) as monitor:
        train(monitor, 3)
        monitor.flush()
        shutil.rmtree(tmp_path / "run")
        train(monitor, 3)
        monitor.flush()
    assert losses(memory) == list(range(6))
    assert "FileNotFoundError" in caplog.text  # TensorBoard's own thread may say so as late as when it is closed
    if kind is sinks.Jsonl:
        assert [f.code for f in monitor.findings] == ["part-disabled"]
        assert "were not written" in caplog.text


def test_a_folder_that_is_renamed_goes_on(tmp_path):
    with Monitor(nn.Linear(3, 2), sinks=tmp_path / "run") as monitor:
        train(monitor, 3)
        monitor.flush()
        (tmp_path / "run").rename(tmp_path / "moved")
        train(monitor, 3)
    assert monitor.findings == []
    assert [d.step for d in sinks.read(tmp_path / "moved")] == list(range(6))


class Items(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3,), float(index))


@pytest.mark.parametrize("start", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_of_a_data_loader_have_nothing_to_do_with_it(start, tmp_path):
    model, memory = nn.Linear(3, 2), sinks.Memory()
    with Monitor(model, **presets.first_aid(), sinks=[tmp_path / "run", memory], every=1) as monitor:
        train(monitor, 2)
        for batch in DataLoader(Items(), batch_size=4, num_workers=1, multiprocessing_context=start):
            model(batch).sum().backward()
            monitor.step(loss=1.0)
    assert losses(memory) == [0, 1, 2, 3]
    assert [d.step for d in sinks.read(tmp_path / "run") if d.records] == [0, 1, 2, 3]


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    jumps = iter([0, 1e9, -1e9] * 1000)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    with Monitor(nn.Linear(3, 2), **presets.full(), sinks=tmp_path, every=1, overhead="50%") as monitor:
        train(monitor, 6)
    assert [f for f in monitor.findings if f.severity != "info"] == []
    assert [d.step for d in sinks.read(tmp_path) for r in d.records if r.name == "loss"] == list(range(6))


def test_a_loop_in_a_generator_that_is_left_early_leaves_nothing_behind(tmp_path):
    model = nn.Linear(3, 2)

    def loop():
        with Monitor(model, **presets.first_aid(), sinks=tmp_path, every=1) as monitor, monitor.phase("train"):
            while True:
                train(monitor, 1)
                yield

    steps = loop()
    for _ in range(3):
        next(steps)
    steps.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [d.step for d in sinks.read(tmp_path) for r in d.records if r.name == "loss"] == [0, 1, 2]


def test_other_threads_that_call_the_model_are_not_recorded_and_not_disturbed(tmp_path):
    model, memory = nn.Linear(3, 2), sinks.Memory()
    stop, results = threading.Event(), []

    def serve():
        while not stop.is_set():
            results.append(model(torch.ones(5, 3)).shape)

    thread = threading.Thread(target=serve)
    with Monitor(model, **presets.first_aid(), sinks=memory, every=1) as monitor:
        thread.start()
        while not results:
            time.sleep(0.001)
        train(monitor, 20)
        stop.set()
        thread.join()
    assert set(results) == {(5, 2)}
    assert losses(memory) == list(range(20))
    assert [f for f in monitor.findings if f.code == "part-disabled"] == []


def test_sys_exit_in_a_hook_of_the_users_ends_the_process_with_everything_written(tmp_path):
    done = script(
        tmp_path,
        """
        monitor = Monitor(model, **presets.full(), sinks=folder, every=1)
        train(monitor, 3)
        model.register_forward_hook(lambda *_: sys.exit(7))
        train(monitor, 1)
        """,
    )
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert steps_of(tmp_path) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward", "write"])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_a_signal_in_the_middle_of_a_step_leaves_all_steps_before_once_and_the_resumed_run_the_others(
    tmp_path, how, where
):
    killed = script(
        tmp_path,
        f"""
        class Slow(sinks.Jsonl):
            def write(self, step, records, findings):
                if step == 6 and {where == "write"}:
                    self._file.write(b'{{"step":6,"rec')  # as if it came within the write
                    os.kill(os.getpid(), signal.{how})
                    time.sleep(60)
                super().write(step, records, findings)
        monitor = Monitor(model, sinks=Slow(folder), every=1, **presets.first_aid())
        train(monitor, 4)
        torch.save(monitor.state_dict(), folder + ".pt")
        train(monitor, 2)
        monitor.flush()
        kill = lambda *_: os.kill(os.getpid(), signal.{how})
        if {where == "forward"}:
            model.register_forward_hook(kill)
        if {where == "backward"}:
            model.weight.register_hook(kill)
        train(monitor, 4)
        monitor.flush()
        """,
    )
    assert killed.returncode == -getattr(signal, how), killed.stderr
    assert steps_of(tmp_path) == list(range(6))
    resumed = script(
        tmp_path,
        """
        monitor = Monitor(model, sinks=folder, every=1, **presets.first_aid())
        monitor.load_state_dict(torch.load(folder + ".pt", weights_only=True))
        train(monitor, 6)
        """,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert steps_of(tmp_path) == list(range(10))


def test_a_sigterm_that_the_script_turns_into_an_exit_writes_everything_and_ours_is_no_handler(tmp_path):
    done = script(
        tmp_path,
        """
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        handlers = {each: signal.getsignal(each) for each in signal.valid_signals()}
        monitor = Monitor(model, sinks=Slow(folder), every=1, **presets.first_aid())
        train(monitor, 20)
        assert handlers == {each: signal.getsignal(each) for each in signal.valid_signals()}
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        """,
    )
    assert done.returncode == 143, done.stderr
    assert steps_of(tmp_path) == list(range(20))


def test_an_end_by_an_exception_or_at_exit_writes_everything(tmp_path):
    done = script(
        tmp_path,
        """
        monitor = Monitor(model, **presets.first_aid(), sinks=folder, every=1)
        atexit.register(lambda: (train(monitor, 1), monitor.add(Finding("loss-spike", "warning", "at exit", ""))))
        train(monitor, 3)
        raise ValueError("of the user's")
        """,
    )
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1
    assert steps_of(tmp_path) == [0, 1, 2, 3]
    assert [f.message for d in sinks.read(tmp_path / "run") for f in d.findings] == ["at exit"]


@pytest.mark.slow
def test_a_wandb_service_that_is_killed_holds_up_nothing_and_other_sinks_have_everything(tmp_path):
    pytest.importorskip("wandb")
    done = script(
        tmp_path,
        """
        import wandb, psutil
        run = wandb.init(mode="offline", dir=os.path.dirname(folder), settings=wandb.Settings(console="off"))
        monitor = Monitor(model, **presets.first_aid(), sinks=[folder, sinks.WandB(run)], every=1)
        train(monitor, 3)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        began = time.monotonic()
        train(monitor, 20)
        monitor.add(Finding("loss-spike", "warning", "after", ""))
        monitor.close()
        print("took", time.monotonic() - began)
        os._exit(0)
        """,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("took")[1]) < 30
    assert steps_of(tmp_path) == list(range(23))
    assert "after" in [f.message for d in sinks.read(tmp_path / "run") for f in d.findings]
    assert "part-disabled" in [f.code for d in sinks.read(tmp_path / "run") for f in d.findings]


def test_a_forked_child_of_the_users_trains_on_unobserved(tmp_path):
    done = script(
        tmp_path,
        """
        monitor = Monitor(model, **presets.full(), sinks=folder, every=1)
        train(monitor, 3)
        child = os.fork()
        if child == 0:
            signal.alarm(60)
            train(monitor, 3)
            os._exit(5)
        assert os.waitpid(child, 0)[1] >> 8 == 5
        train(monitor, 2)
        monitor.close()
        """,
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == list(range(5))


@pytest.mark.parametrize("guard", [None, "skip"])
@pytest.mark.parametrize("how", ["double", "bfloat16", "to_empty", "meta and back"])
def test_a_model_that_is_moved_while_it_is_observed_trains_on_and_is_recorded(how, guard):
    torch.manual_seed(0)
    model, memory = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)), sinks.Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, **presets.full(), sinks=memory, every=1, guard=guard) as monitor:
        for step in range(6):
            if step == 3:
                move(model, how)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            x = torch.randn(6, 4, dtype=model[0].weight.dtype)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            monitor.step({"x": x}, loss=loss)
    assert losses(memory) == list(range(6))
    assert {r.step for r in memory.records if r.name == "activation/rms"} == set(range(6))
    assert "part-disabled" not in [f.code for f in monitor.findings]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def move(model, how):
    if how in {"double", "bfloat16"}:
        getattr(model, how)()
        return
    if how == "meta and back":
        model.to("meta")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    model[1].reset_running_stats()


def test_a_notebook_that_is_interrupted_again_and_again_goes_on(tmp_path):
    done = script(
        tmp_path,
        """
        # whoever starts the suite in the background of a shell hands on a SIGINT that is ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        monitor = Monitor(model, **presets.full(), sinks=folder, every=1)
        interrupts = 0
        for i in range(20):
            try:
                timer = threading.Timer(0.002 * (i % 7), lambda: os.kill(os.getpid(), signal.SIGINT))
                timer.start()
                train(monitor, 500)
            except KeyboardInterrupt:
                interrupts += 1
            timer.join()
        train(monitor, 3)
        monitor.close()
        assert interrupts >= 15, interrupts
        assert not model._forward_hooks and not model._forward_pre_hooks
        """,
    )
    assert done.returncode == 0, done.stderr
    steps = steps_of(tmp_path)
    assert steps == sorted(set(steps))
    assert len(steps) >= 3
