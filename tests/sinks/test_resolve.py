import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from stethoscope import Monitor
from stethoscope._protocols import Run
from stethoscope.sinks import Jsonl, Logger, Memory, TensorBoard, WandB, resolve


class WandBRun:
    def log(self, data): ...
    def define_metric(self, name, **options): ...
    def alert(self, title, text): ...


class Metrics:
    def log_metrics(self, metrics, step): ...


def test_a_sink_stays_what_it_is():
    memory = Memory()
    assert resolve(memory) is memory


@pytest.mark.parametrize("path", ["runs/a", Path("runs/a.jsonl")])
def test_a_path_becomes_jsonl(path):
    sink = resolve(path)
    assert isinstance(sink, Jsonl)
    assert sink.path == path


def test_a_summary_writer_becomes_tensorboard(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        sink = resolve(writer)
        assert isinstance(sink, TensorBoard)
        assert sink.target is writer


def test_a_wandb_run_becomes_wandb():
    assert isinstance(resolve(WandBRun()), WandB)


def test_anything_with_log_metrics_becomes_a_logger():
    assert isinstance(resolve(Metrics()), Logger)


def test_lightnings_loggers_are_looked_behind(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own imports
        loggers = pytest.importorskip("lightning.pytorch.loggers")
        from lightning.pytorch.loggers.logger import DummyLogger
    logger = loggers.TensorBoardLogger(tmp_path)
    sink = resolve(logger)
    assert isinstance(sink, TensorBoard)
    assert sink.target is logger.experiment
    logger.experiment.close()
    assert isinstance(resolve(loggers.CSVLogger(tmp_path)), Logger)
    assert isinstance(resolve(DummyLogger()), Logger)


def test_lightnings_dummy_on_other_ranks_stays_a_logger():
    class _DummyExperiment:
        def __getattr__(self, name):
            return lambda *_, **__: None

    class WandbLogger(Metrics):
        experiment = _DummyExperiment()

    class TensorBoardLogger(WandbLogger):
        pass

    assert isinstance(resolve(WandbLogger()), Logger)
    assert isinstance(resolve(TensorBoardLogger()), Logger)


@pytest.mark.parametrize("thing", [3, None, {}, object(), print, ["runs/a"]])
def test_anything_else_is_refused_with_what_is_legal(thing):
    with pytest.raises(TypeError, match=r"Give a sink from stethoscope\.sinks, a path"):
        resolve(thing)


def test_a_class_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"the class Memory \(call it first\)"):
        resolve(Memory)


def test_optional_packages_are_loaded_by_the_sink_that_needs_them_only():
    script = """
        import sys
        from stethoscope.sinks import Console, Jsonl, Logger, Memory, TensorBoard, WandB, resolve
        Console(), TensorBoard("a"), WandB(), resolve("a")
        print([name for name in ("lightning", "rich", "tensorboard", "wandb") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("sink", "package"), [(WandB(), "wandb"), (TensorBoard("a"), "torch.utils.tensorboard")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(sink, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install"):
        sink.open(Run("a", ""))


def test_an_accelerator_passes_numbers_to_all_its_trackers(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    from accelerate.tracking import GeneralTracker

    class Tracker(GeneralTracker):
        name, requires_logging_directory = "mine", False

        def __init__(self):
            super().__init__()
            self.rows = []

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            pass

        def log(self, values, step, **kwargs):
            self.rows.append((step, values))

    tracker = Tracker()
    accelerator = accelerate.Accelerator(cpu=True, log_with=[tracker])
    accelerator.init_trackers("project")
    model = torch.nn.Linear(4, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with Monitor(model, optimizer, sinks=[accelerator]) as monitor:
        for _ in range(3):
            loss = model(torch.ones(2, 4)).square().mean()
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            monitor.step(loss=loss)
    assert [step for step, _ in tracker.rows] == [0, 1, 2]
    assert set(tracker.rows[0][1]) == {"stethoscope_step/loss", "stethoscope_step/lr"}
