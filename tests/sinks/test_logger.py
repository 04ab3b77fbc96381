import csv
import math
import warnings

import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks import Logger
from stethoscope.testing import series

RUN = Run("a", "")


class Calls:
    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append((step, metrics))


def write(logger, deliveries, **arguments):
    sink = Logger(logger, **arguments)
    sink.open(RUN)
    for step, records, findings in deliveries:
        sink.write(step, records, findings)
    sink.close()
    return sink


def layers(number, step=0):
    return [Record("activation/rms", 1.0, step, module=f"enc.{i}") for i in range(number)]


def test_one_call_per_write_with_numbers_only_and_groups_apart():
    calls = Calls()
    records = [
        Record("activation/rms", 1, 3, module="enc.0"),
        Record("activation/histogram", Histogram((0.0, 1.0), (1,)), 3, module="enc.0"),
        Record("text", None, 3, source="log", phase="val", kind="str"),
        *series([3], loss=[math.nan]),
    ]
    write(calls, [(3, records, [Finding("a", "error", "", "", module="enc.0")])])
    ((step, metrics),) = calls.calls
    assert step == 3
    assert set(metrics) == {"stethoscope_activation/rms/enc.0", "stethoscope_step/loss"}
    assert type(metrics["stethoscope_activation/rms/enc.0"]) is float
    assert math.isnan(metrics["stethoscope_step/loss"])


def test_nothing_to_write_is_no_call():
    calls = Calls()
    write(calls, [(0, [], []), (1, [Record("a", None, 1, source="log", kind="none")], [])])
    assert calls.calls == []


def test_names_hold_only_characters_that_every_backend_takes():
    calls = Calls()
    write(calls, [(0, [Record("activation/rms", 1.0, 0, module="<b>:слой.0", call=2)], [])])
    assert list(calls.calls[0][1]) == ["stethoscope_activation/rms/_b__слой.0_2"]


def test_the_set_of_series_stays_what_it_was():
    calls = Calls()
    finding = Finding("a", "error", "", "", module="enc.399")
    write(calls, [(step, layers(400, step), [finding] if step else []) for step in range(3)])
    first, *others = [set(metrics) for _, metrics in calls.calls]
    assert len(first) == 300
    assert all(other == first for other in others)


def test_a_call_that_fails_is_not_hidden_and_the_next_one_works():
    class Flaky(Calls):
        def log_metrics(self, metrics, step):
            if step == 1:
                raise ConnectionError("gone")
            super().log_metrics(metrics, step)

    sink = Logger(flaky := Flaky())
    sink.open(RUN)
    sink.write(0, series([0], loss=[1.0]), [])
    with pytest.raises(ConnectionError):
        sink.write(1, series([1], loss=[1.0]), [])
    sink.write(2, series([2], loss=[1.0]), [])
    assert [step for step, _ in flaky.calls] == [0, 2]


def test_close_may_come_twice_and_a_write_after_it_is_an_error():
    sink = write(Calls(), [])
    sink.close()
    with pytest.raises(RuntimeError, match="not open"):
        sink.write(0, series(loss=[1.0]), [])


def test_an_object_without_log_metrics_is_refused():
    with pytest.raises(TypeError, match="got a dict, which has no log_metrics"):
        Logger({})


@pytest.fixture(scope="module")
def loggers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own imports
        return pytest.importorskip("lightning.pytorch.loggers")


def test_lightnings_csv_logger_has_one_row_per_step_with_the_right_steps(loggers, tmp_path):
    logger = loggers.CSVLogger(tmp_path, name="", version="")
    write(logger, [(step, layers(3, step) + series([step], loss=[step / 2]), []) for step in (0, 50, 100)])
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["stethoscope_step/loss"])) for row in rows] == [
        (0, 0.0),
        (50, 25.0),
        (100, 50.0),
    ]
    assert float(rows[1]["stethoscope_activation/rms/enc.2"]) == 1.0


def test_lightnings_tensorboard_logger_is_read_back(loggers, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = loggers.TensorBoardLogger(tmp_path, name="", version="")
    write(logger, [(step, layers(3, step), []) for step in (0, 50)])
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("stethoscope_activation/rms/enc.2")] == [0, 50]
