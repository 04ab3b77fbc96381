import io
import math

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks import TensorBoard
from stethoscope.testing import series

RUN = Run("a", "2026-01-01T00:00:00+00:00")
HISTOGRAM = Histogram((-1.0, -0.5, 0.0, 0.5, 1.0), (0, 3, 5, 0))


def load(folder):
    events = EventAccumulator(
        str(folder), size_guidance=dict.fromkeys(("scalars", "histograms", "images", "tensors"), 0)
    )
    return events.Reload()


def scalars(events, name):
    return [(event.step, event.value) for event in events.Scalars(name)]


def texts(events, name):
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events.Tensors(f"{name}/text_summary")]


def observed(step, *, value=1.0, layers=("enc.0", "enc.1"), phase="train"):
    return [
        Record(name, value, step, module=layer, phase=phase)
        for layer in layers
        for name in ("activation/rms", "activation/mean")
    ]


def write(target, deliveries, run=RUN, **arguments):
    sink = TensorBoard(target, **arguments)
    sink.open(run)
    for step, records, findings in deliveries:
        sink.write(step, records, findings)
    sink.close()
    return sink


def test_scalars_are_read_back_at_their_steps(tmp_path):
    write(
        tmp_path, [(step, observed(step, value=step + 0.5) + series([step], loss=[2.0]), []) for step in (0, 50, 100)]
    )
    events = load(tmp_path)
    assert scalars(events, "activation/rms/enc.1") == [(0, 0.5), (50, 50.5), (100, 100.5)]
    assert scalars(events, "step/loss") == [(0, 2.0), (50, 2.0), (100, 2.0)]


def test_phases_and_logged_metrics_have_groups_of_their_own(tmp_path):
    logged = [
        Record("th_accuracy", 0.5, 9, phase="val", source="log"),
        Record("text", None, 9, phase="val", source="log", kind="str"),
    ]
    write(tmp_path, [(9, observed(9, phase="val"), []), (9, logged, [])])
    events = load(tmp_path)
    assert scalars(events, "activation_val/rms/enc.0") == [(9, 1.0)]
    assert scalars(events, "val/th_accuracy") == [(9, 0.5)]
    assert "val/text" not in events.Tags()["scalars"]


def test_nan_and_inf_are_values(tmp_path):
    write(
        tmp_path, [(step, series([step], loss=[value]), []) for step, value in enumerate((math.nan, math.inf, 1e300))]
    )
    values = [value for _, value in scalars(load(tmp_path), "step/loss")]
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, math.inf]  # TensorBoard holds float32


def test_histograms_are_trimmed_and_keep_their_counts(tmp_path):
    bad = [Histogram((0.0, 1.0), (0,)), Histogram((0.0, 1.0), (math.nan,)), Histogram((0.0, 1e308), (2,))]
    records = [Record("activation/histogram", h, 5, module=f"enc.{i}") for i, h in enumerate([HISTOGRAM, *bad])]
    write(tmp_path, [(5, records, [])])
    events = load(tmp_path)
    (event,) = events.Histograms("activation/histogram/enc.0")
    value = event.histogram_value
    assert event.step == 5
    assert (value.min, value.max, value.num) == (-0.5, 0.5, 8)
    # TensorBoard's limits are right edges.
    assert list(value.bucket_limit) == [0.0, 0.5]
    assert list(value.bucket) == [3, 5]
    assert events.Tags()["histograms"] == ["activation/histogram/enc.0", "activation/histogram/enc.3"]


def test_findings_are_a_table_of_all_so_far_with_text_made_harmless(tmp_path):
    one = Finding("nonfinite-loss", "error", "The loss is NaN.", "Look | here.", step=3)
    two = Finding("loss-spike", "warning", "<script>alert(1)</script>", "", step=4, module="слой.0", rank=2)
    write(tmp_path, [(3, [], [one]), (4, [], [two])])
    (first, _), (last, text) = texts(load(tmp_path), "findings")
    assert (first, last) == (3, 4)
    assert "nonfinite-loss" in text
    assert "слой.0, rank 2" in text
    assert "<script" not in text


def test_findings_are_on_disk_at_once(tmp_path):
    sink = TensorBoard(tmp_path)
    sink.open(RUN)
    sink.write(3, [], [Finding("nonfinite-loss", "error", "", "", step=3)])
    assert len(texts(load(tmp_path), "findings")) == 1
    sink.close()


def test_the_layout_has_one_chart_per_statistic_that_matches_layers_and_phases(tmp_path):
    import re

    write(
        tmp_path,
        [
            (0, [], []),
            (0, series(loss=[1.0]), []),
            (1, observed(1) + series([1], loss=[1.0]), []),
            (2, observed(2), []),
        ],
    )
    (event,) = load(tmp_path).Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {(group.title, chart.title): chart.multiline.tag[0] for group in layout.category for chart in group.chart}
    assert list(charts) == [("step", "loss"), ("activation", "rms"), ("activation", "mean")]
    pattern = re.compile(charts["activation", "rms"])
    assert all(pattern.match(name) for name in ("activation/rms/enc.0", "activation_val/rms/enc.0"))
    assert not any(
        pattern.match(name) for name in ("activation/rms2/enc.0", "myactivation/rms/enc.0", "activation/rms/enc.00")
    )


def test_a_picture_of_layers_by_steps_comes_early_and_at_the_end(tmp_path):
    def column(step):
        return observed(step, value=math.nan if step == 950 else 0.1, layers=("enc.0", "<b>"))

    write(tmp_path, [(step, column(step), []) for step in range(0, 1000, 50)])
    events = load(tmp_path)
    assert events.Tags()["images"] == ["layers/activation/rms"]
    images = events.Images("layers/activation/rms")
    assert [image.step for image in images] == [750, 950]
    pixels = np.asarray(Image.open(io.BytesIO(images[-1].encoded_image_string)))
    assert pixels.shape[0] > 2 * 16  # the frame is around it
    assert pixels.shape[1] > 20 * 16
    assert (pixels == [255, 0, 255]).all(axis=-1).sum() > 2 * 16 * 16  # NaN in the last column, and the scale
    legend = texts(events, "layers/activation/rms")[-1][1]
    assert "1. enc.0" in legend
    assert "&lt;b&gt;" in legend


def test_a_large_model_is_kept_within_the_budget_and_its_picture_is_whole(tmp_path):
    layers = tuple(f"enc.{i}" for i in range(200))
    write(tmp_path, [(0, observed(0, layers=layers), [])])
    tags = load(tmp_path).Tags()["scalars"]
    assert len(tags) == 200
    assert all(name.startswith("activation/rms") for name in tags)
    write(tmp_path / "all", [(0, observed(0, layers=layers), [])], max_series=None)
    assert len(load(tmp_path / "all").Tags()["scalars"]) == 400


def test_a_writer_of_the_user_gets_groups_apart_and_stays_open(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    finding = Finding("loss-spike", "warning", "", "", step=0)
    write(writer, [(0, observed(0), [finding])])
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    tags = load(tmp_path).Tags()
    assert {name.partition("/")[0] for name in tags["scalars"]} == {"stethoscope_activation", "loss"}
    assert tags["images"] == ["stethoscope_layers/activation/rms"]
    # The one layout that a writer can have is the user's.
    assert set(tags["tensors"]) == {
        "stethoscope_findings/text_summary",
        "stethoscope_layers/activation/rms/text_summary",
    }


def test_a_writer_that_its_owner_closed_is_an_error_that_says_so(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    sink = TensorBoard(writer)
    sink.open(RUN)
    writer.close()
    with pytest.raises(RuntimeError, match="SummaryWriter was closed"):
        sink.write(0, observed(0), [])
    sink.close()


def test_a_writer_that_was_closed_between_two_runs_is_used_again(tmp_path):
    # what Lightning does to the writer of its logger after each fit
    writer = SummaryWriter(tmp_path)
    for step in (0, 1):
        write(writer, [(step, series([step], loss=[1.0]), [])])
        writer.close()
    assert scalars(load(tmp_path), "stethoscope_step/loss") == [(0, 1.0), (1, 1.0)]


def test_a_resumed_run_hides_the_steps_that_it_makes_again(tmp_path):
    write(tmp_path, [(step, series([step], loss=[1.0]), []) for step in range(5)])
    write(tmp_path, [(step, series([step], loss=[2.0]), []) for step in (3, 4)], Run("a", "", resumed_from=2))
    assert scalars(load(tmp_path), "step/loss") == [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]


def test_other_ranks_write_a_run_of_their_own(tmp_path):
    write(tmp_path, [(0, series(loss=[1.0]), [])])
    write(tmp_path, [(0, series(loss=[2.0]), [])], Run("a", "", rank=1))
    assert scalars(load(tmp_path / "rank1"), "step/loss") == [(0, 2.0)]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["rank1"]


def test_two_sinks_on_one_folder_lose_nothing(tmp_path):
    one, two = TensorBoard(tmp_path), TensorBoard(tmp_path)
    one.open(RUN)
    two.open(RUN)
    one.write(0, series(loss=[1.0]), [])
    two.write(0, [Record("sdr", 2.0, 0, phase="val", source="log")], [])
    one.close()
    two.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_names_in_any_script_are_kept(tmp_path):
    names = ("кодер.0", "<b>x</b>", "a b/c")
    write(tmp_path, [(0, observed(0, layers=names), [])])
    assert {f"activation/rms/{name}" for name in names} <= set(load(tmp_path).Tags()["scalars"])


def test_a_path_that_cannot_be_written_is_said_at_open(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TensorBoard(tmp_path / "file" / "run").open(RUN)


def test_close_may_come_twice_and_a_write_after_it_is_an_error(tmp_path):
    sink = write(tmp_path, [(0, series(loss=[1.0]), [])])
    sink.close()
    with pytest.raises(RuntimeError, match="not open"):
        sink.write(1, series([1], loss=[1.0]), [])


def test_something_else_than_a_folder_or_a_writer_is_refused():
    with pytest.raises(TypeError, match="got a int"):
        TensorBoard(3)
