import re

from stethoscope import Record
from stethoscope.sinks._layout import MAX_CURVES, layout
from stethoscope.testing import series


def layers(name, count):
    return [Record(name, 1.0, 0, module=f"enc.{i}") for i in range(count)]


def shown(chart, name, count):
    (pattern,) = chart[1]
    return [i for i in range(count) if re.match(pattern, f"{name}/enc.{i}")]


def test_a_deep_model_gets_a_few_layers_per_chart_from_the_first_to_the_last():
    (chart,) = layout(layers("gradient/norm", 100))["gradient"].items()
    assert chart[0] == f"norm, {MAX_CURVES} of 100 layers"
    found = shown(chart[1], "gradient/norm", 100)
    assert len(found) == MAX_CURVES
    assert found[0] == 0
    assert found[-1] == 99


def test_a_small_model_is_shown_whole():
    (chart,) = layout(layers("gradient/norm", MAX_CURVES))["gradient"].items()
    assert chart[0] == "norm"
    assert shown(chart[1], "gradient/norm", MAX_CURVES) == list(range(MAX_CURVES))


def test_the_loss_comes_first_and_the_most_telling_statistic_of_a_group_before_the_others():
    found = layout(layers("activation/max", 2) + layers("activation/rms", 2) + series(loss=[1.0]))
    assert list(found) == ["step", "activation"]
    assert list(found["activation"]) == ["rms", "max"]


def test_names_are_taken_literally():
    (chart,) = layout([Record("activation/rms", 1.0, 0, module="enc.0[a+b]|c")])["activation"].values()
    assert re.match(chart[1][0], "activation/rms/enc.0[a+b]|c")
    assert not re.match(chart[1][0], "activation/rms/c")


def test_names_that_tensorboard_cannot_draw_here_are_left_to_the_other_tabs():
    records = [*layers("gradient/norm", 2), Record("gradient/norm", 1.0, 0, module="fc(1)")]
    (chart,) = layout([*records, *series(**{"loss (dB)": [1.0]})])["gradient"].items()
    assert chart[0] == "norm"
    assert shown(chart[1], "gradient/norm", 2) == [0, 1]
    assert not re.match(chart[1][1][0], "gradient/norm/fc(1)")
    assert "step" not in layout(series(**{"loss (dB)": [1.0]}))
