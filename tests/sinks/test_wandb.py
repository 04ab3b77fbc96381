import json
import math
import random
import struct
import time
from pathlib import Path

import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks import WandB
from stethoscope.testing import series

wandb = pytest.importorskip("wandb")

RUN = Run("a", "")
SPIKE = Finding("loss-spike", "warning", "<b>up</b>", "Wait.", step=50, module="слой." + "x" * 80)


def wandb_records(path):
    """Read a W&B file: LevelDB's log format, blocks of 32 KiB with chunks that have a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, block = path.read_bytes(), 32768
    place, message = 7, b""
    while place + 7 <= len(data):
        left = block - place % block
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        chunk = data[place + 7 : place + 7 + length]
        place += 7 + length
        if len(chunk) < length:
            return
        message += chunk
        if kind in (1, 4):  # a whole message, or its last chunk
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def finished(folder):
    """W&B writes the file after `finish` has returned; it is complete when its `exit` record is there."""
    (path,) = Path(folder).rglob("*.wandb")
    for _ in range(200):
        records = list(wandb_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} was not finished after 20 s.")


def deliveries():
    histogram = Histogram(tuple(float(i) for i in range(1001)), (0,) * 100 + (1,) * 900)
    for step in (0, 50):
        records = [
            Record("activation/rms", 0.5 + step, step, module="enc.0"),
            Record("activation/rms", math.nan, step, module="<b>слой</b>"),
            Record("activation/histogram", histogram, step, module="enc.0"),
            Record("activation/histogram", Histogram((0.0, 1.0), (0,)), step, module="enc.1"),
            *series([step], loss=[math.inf]),
        ]
        yield step, records, [SPIKE] if step else []
    yield 50, [Record("th_accuracy", 0.25, 50, phase="val", source="log")], [Finding("note", "info", "m", "")]
    yield 50, [Record("text", None, 50, phase="val", source="log", kind="str")], []


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wandb")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_API_KEY", raising=False)
        settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
        with wandb.init(mode="offline", dir=folder, settings=settings) as run:
            state = random.getstate()
            sink = WandB()
            sink.open(RUN)
            for number, delivery in enumerate(deliveries()):
                run.log({"mine": number})
                sink.write(*delivery)
            sink.close()
            sink.close()
            assert wandb.run is run  # still open
            assert random.getstate() == state
    return finished(folder)


@pytest.fixture(scope="module")
def rows(records):
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def test_what_belongs_to_a_step_is_in_one_row_with_our_step_in_it(rows):
    ours = [row for row in rows if "stethoscope/activation/rms/enc.0" in row]
    assert [row["stethoscope/step"] for row in ours] == [0, 50]
    assert [row["stethoscope/activation/rms/enc.0"] for row in ours] == [0.5, 50.5]
    assert [row["stethoscope/val/th_accuracy"] for row in rows if "stethoscope/val/th_accuracy" in row] == [0.25]
    assert math.isnan(ours[0]["stethoscope/activation/rms/<b>слой</b>"])
    assert math.isinf(ours[0]["stethoscope/step/loss"])
    assert any("layers" in key for row in rows for key in row)


def test_no_number_of_the_user_is_lost(rows):
    assert [row["mine"] for row in rows if "mine" in row] == [0, 1, 2, 3]


def per_step(run, sink, step):
    run.log({"mine": step}, step=step)
    sink.write(step, series([step], loss=[0.5]), [])
    sink.write(step, [Record("accuracy", 0.25, step, phase="val", source="log")], [])
    run.log({"also": step}, step=step)


def rarely(run, sink, step):
    sink.write(step, series([step], loss=[0.5]), [])
    if step % 5 == 0:
        run.log({"mine": step}, step=step)


def per_epoch(run, sink, step):
    sink.write(step, series([step], loss=[0.5]), [])
    if step % 5 == 4:
        run.log({"mine": step}, step=step // 5)


def never(run, sink, step):
    sink.write(step, series([step], loss=[0.5]), [])


@pytest.mark.parametrize(
    ("log", "commit", "mine", "ours"),
    [
        (per_step, True, range(10), range(10)),
        (rarely, True, (0, 5), range(10)),
        (never, True, (), range(10)),
        (per_epoch, False, (4, 9), (9,)),
    ],
)
def test_a_step_that_the_user_gives_to_wandb_is_never_overtaken(log, commit, mine, ours, tmp_path):
    settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
    with wandb.init(mode="offline", dir=tmp_path, settings=settings) as run:
        sink = WandB(run, commit=commit)
        sink.open(RUN)
        for step in range(10):
            log(run, sink, step)
        sink.close()
    found = [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in finished(tmp_path)
        if record.WhichOneof("record_type") == "history"
    ]
    assert [row["mine"] for row in found if "mine" in row] == list(mine)
    assert [row["stethoscope/step"] for row in found if "stethoscope/step/loss" in row] == list(ours)


def test_histograms_have_at_most_512_bins_and_all_counts(rows):
    def part(name):
        found = [
            row[key]
            for row in rows
            for key in row
            if key.startswith("stethoscope/activation/histogram/enc.0") and name in key
        ]
        return found[0] if found else None

    values = part("values")
    assert 1 <= len(values) <= 512
    assert sum(values) == 900
    assert len(part("bins")) == len(values) + 1
    assert not any("enc.1" in key for row in rows for key in row)


def test_our_series_have_our_step_as_x_axis(records):
    metrics = {
        r.metric.name or r.metric.glob_name: r.metric for r in records if r.WhichOneof("record_type") == "metric"
    }
    assert metrics["stethoscope/*"].step_metric == "stethoscope/step"
    assert not metrics["stethoscope/*"].options.step_sync


def test_findings_of_warning_and_above_become_alerts(records):
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert alert.title.startswith("loss-spike in слой.")
    assert len(alert.title) < 64
    assert alert.level == "WARN"
    assert "<b>" not in alert.text
    assert alert.wait_duration == 300_000


def test_all_findings_are_a_table_at_the_end(rows):
    table = [value for row in rows for key, value in row.items() if key.startswith("stethoscope/findings")]
    assert table


def test_without_a_run_the_error_says_what_to_do():
    assert wandb.run is None
    with pytest.raises(RuntimeError, match=r"Call wandb\.init"):
        WandB().open(RUN)


def test_another_rank_without_a_run_writes_nothing():
    sink = WandB()
    sink.open(Run("a", "", rank=1))
    sink.write(0, series(loss=[1.0]), [SPIKE])
    sink.close()


class Recorder:
    def __init__(self):
        self.rows = []

    step = 0

    def log(self, row, commit=None):
        self.rows.append(row)

    def define_metric(self, *names, **options): ...
    def alert(self, **text): ...


def test_a_large_model_is_kept_within_the_budget():
    run = Recorder()
    sink = WandB(run)
    sink.open(RUN)
    sink.write(0, [Record("activation/rms", 1.0, 0, module=f"enc.{i}") for i in range(400)], [])
    assert len(run.rows[0]) == 301


def test_a_write_before_open_or_after_close_is_an_error():
    sink = WandB(Recorder())
    with pytest.raises(RuntimeError, match="not open"):
        sink.write(0, [], [])
    sink.open(RUN)
    sink.close()
    with pytest.raises(RuntimeError, match="not open"):
        sink.write(0, [], [])


def test_something_else_than_a_run_is_refused():
    with pytest.raises(TypeError, match="got a str"):
        WandB("my-project")
