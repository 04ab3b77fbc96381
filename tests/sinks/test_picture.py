import math

import numpy as np

from stethoscope.sinks._picture import MAX_COLUMNS, MAX_ROWS, Picture

MAGENTA, GREY, BLACK = (255, 0, 255), (217, 217, 217), (0, 0, 0)


def colours(picture):
    return {tuple(pixel) for pixel in picture.paint().reshape(-1, 3).tolist()}


def test_one_row_per_layer_and_one_column_per_step_from_small_to_large():
    picture = Picture()
    for step in range(3):
        picture.add(step, {"a": 0.01, "b": 10.0})
    pixels = picture.paint()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (2 * 16, 3 * 16, 3)
    assert pixels[0].mean() < pixels[-1].mean()
    assert picture.legend()[1] == ["a", "b"]


def test_non_finite_missing_and_zero_have_colours_of_their_own():
    picture = Picture()
    picture.add(0, {"a": math.nan, "b": 0.0, "c": 1.0, "d": math.inf})
    picture.add(1, {"a": 1e300, "c": 2.0})
    pixels = picture.paint()[8::16, 8::16]
    assert tuple(pixels[0, 0]) == tuple(pixels[3, 0]) == MAGENTA
    assert tuple(pixels[1, 0]) == BLACK
    assert tuple(pixels[1, 1]) == GREY
    assert tuple(pixels[0, 1]) not in {MAGENTA, GREY, BLACK}


def test_a_single_nan_is_visible_after_a_long_run_in_bounded_memory():
    picture = Picture()
    for step in range(5000):
        picture.add(step, {f"layer{i}": math.nan if (step, i) == (700, 2) else 1.0 + i for i in range(4)})
    pixels = picture.paint()
    assert pixels.shape[1] <= 1024
    assert (pixels == MAGENTA).all(axis=-1).any()
    assert "steps 0 to 4999" in picture.legend()[0]


def test_more_layers_than_rows_are_left_out():
    picture = Picture()
    picture.add(0, {f"layer{i}": 1.0 for i in range(MAX_ROWS + 10)})
    picture.add(1, {f"layer{MAX_ROWS + 5}": 1.0})
    assert len(picture.legend()[1]) == MAX_ROWS
    assert picture.paint().shape[0] == MAX_ROWS


def test_painting_nothing_or_only_non_finite_values_works():
    picture = Picture()
    assert colours(picture) == {GREY}
    picture.add(0, {"a": math.nan})
    assert colours(picture) == {MAGENTA}


def test_pictures_are_due_ever_more_seldom():
    picture = Picture()
    due = []
    for step in range(MAX_COLUMNS):
        picture.add(step, {"a": 1.0})
        due += [step + 1] if picture.due else []
    assert due == [16, 32, 64, 128, 256]
