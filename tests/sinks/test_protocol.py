import inspect
import random

import numpy as np
import pytest
import torch

from stethoscope import Finding, Record, sinks
from stethoscope._protocols import Run, Sink
from stethoscope._record import Histogram
from stethoscope.testing import series


class Metrics:
    def log_metrics(self, metrics, step): ...


class WandBRun:
    step = 0

    def log(self, data, commit=None): ...
    def define_metric(self, name, **options): ...
    def alert(self, **text): ...


MAKE = {
    "Console": lambda _: sinks.Console(),
    "Every": lambda _: sinks.Every(sinks.Memory(), every=2),
    "Jsonl": sinks.Jsonl,
    "Logger": lambda _: sinks.Logger(Metrics()),
    "Memory": lambda _: sinks.Memory(),
    "OnRank": lambda _: sinks.OnRank(sinks.Memory()),
    "TensorBoard": sinks.TensorBoard,
    "WandB": lambda _: sinks.WandB(WandBRun()),
}


def numpy_state():
    return np.random.get_state()[1].tolist()


def test_every_sink_of_the_package_is_checked_here():
    classes = {name for name, part in vars(sinks).items() if inspect.isclass(part) and hasattr(part, "write")}
    assert classes == set(MAKE)


@pytest.mark.parametrize("name", MAKE)
def test_a_sink_repeats_the_protocols_signatures(name):
    for method in ("open", "write", "close"):
        assert inspect.signature(getattr(getattr(sinks, name), method)) == inspect.signature(getattr(Sink, method))


@pytest.mark.parametrize("name", MAKE)
def test_a_sink_takes_any_delivery_closes_twice_and_leaves_the_random_numbers_alone(name, tmp_path):
    sink = MAKE[name](tmp_path)
    before = torch.get_rng_state(), random.getstate(), numpy_state()
    assert isinstance(sink, Sink)
    assert sinks.resolve(sink) is sink
    sink.open(Run("a", "2026-01-01T00:00:00+00:00"))
    records = [
        Record("activation/rms", float("nan"), 0, module="<b>слой</b>", call=1),
        Record("activation/histogram", Histogram((0.0, 1.0), (float("nan"),)), 0, module="a"),
        Record("text", None, 0, phase="val", source="log", kind="str"),
        *series(loss=[float("-inf")]),
    ]
    sink.write(0, (), ())
    sink.write(0, tuple(records), ())
    sink.write(2, (), (Finding("a-code", "error", "[/]<b>|", "", module="a", evidence={"x": float("nan")}),))
    sink.close()
    sink.close()
    after = torch.get_rng_state(), random.getstate(), numpy_state()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
