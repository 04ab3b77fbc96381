"""Runs as the sink writes them, made up."""

import pytest

from stethoscope import Finding, Record, sinks
from stethoscope._protocols import Run
from stethoscope._record import Histogram

MODULES = tuple((f"enc.{index}", "Linear") for index in range(4))
RUN = Run(
    "made-up", "2026-01-01T00:00:00+00:00", (("", "Net"), ("enc", "Sequential"), *MODULES), planned_steps=20, every=2
)
FINDINGS = (
    Finding("nonfinite-activation", "error", "'enc.1' makes NaN. More.", "Look.", 12, "enc.1", evidence={"x": 1.0}),
    Finding("nonfinite-loss", "error", "The loss is NaN.", "", 12, cause="nonfinite-activation"),
    Finding("input-range", "info", "Inputs are large.", "", None),
)


def deliveries(steps=20, names=MODULES, gain=1.0):
    """A loss at each step, statistics at every second one."""
    for step in range(steps):
        records = [Record("loss", gain / (step + 1), step, source="step", kind="tensor")]
        if step % 2 == 0:
            for depth, (name, _) in enumerate(names):
                records.append(Record("activation/rms", gain * (1.0 + depth + step / 100), step, module=name))
                records.append(Record("activation/mean", -0.5 * gain, step, module=name))
                counts = Histogram((-1.0, 0.0, 1.0), (3.0, 1.0))
                records.append(Record("activation/histogram", counts, step, module=name, kind="histogram"))
        yield step, records


def write(place, run=RUN, findings=(), **options):
    sink = sinks.Jsonl(place)
    sink.open(run)
    for step, records in deliveries(**options):
        sink.write(step, records, [found for found in findings if (found.step or 0) == step])
    sink.close()
    return place


@pytest.fixture
def faulty(tmp_path):
    return write(tmp_path / "faulty", findings=FINDINGS)


@pytest.fixture
def healthy(tmp_path):
    return write(tmp_path / "healthy")


@pytest.fixture
def writing():
    """The function that writes a run, for tests that need another one."""
    return write
