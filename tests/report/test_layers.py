import base64
import math

import numpy as np
import pytest

from stethoscope import Finding, report
from stethoscope._protocols import Run
from stethoscope.report._grid import Grid
from stethoscope.report._layers import CELLS, MAX_ROWS, layers


def summary(count, columns, value=lambda row, step: 1.0 + row, findings=()):
    names = tuple(f"layers.{index}" for index in range(count))
    made = report.Summary(None, Run("x", "", tuple((name, "Linear") for name in names)), (0,), findings=list(findings))
    for statistic in ("activation/mean", "activation/rms", "separation/margin_db"):
        grid = made.grids[statistic, "train"] = Grid()
        for step in range(columns):
            grid.add(step, names, np.array([value(row, step) for row in range(count)]))
    return made


def test_the_page_has_room_for_so_many_cells_only():
    tables = layers(summary(400, 300))
    assert sum(len(base64.b64decode(table["values"])) // 4 for table in tables) <= CELLS
    assert {len(table["rows"]) for table in tables} == {MAX_ROWS}
    assert [table["title"] for table in tables] == ["Activation rms", "Activation mean", "separation: margin (dB)"]


def test_a_layer_with_a_finding_is_always_shown():
    found = Finding("dead", "warning", "", "", 0, "layers.2")
    assert "layers.2" not in layers(summary(400, 2))[0]["rows"]
    assert "layers.2" in layers(summary(400, 2, findings=[found]))[0]["rows"]


def test_one_exploding_layer_leaves_the_others_apart_on_the_scale():
    table = layers(summary(200, 40, lambda row, step: 1e20 if row == 7 and step > 38 else 1.0 + row / 200))[0]
    assert table["scale"] == "log"
    assert 1.0 <= table["low"] < table["high"] < 2.1


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, -3.0, 1e-30])
def test_a_statistic_that_never_changes_has_a_scale(value):
    for table in layers(summary(2, 3, lambda row, step: value)):
        assert math.isfinite(table["low"])
        assert math.isfinite(table["high"])
        assert table["low"] < table["high"]
