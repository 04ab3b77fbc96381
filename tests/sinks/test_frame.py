import sys

import numpy as np

from stethoscope.sinks._frame import frame

SCALE = [("0.1", (10, 20, 30)), ("10", (200, 210, 40))]


def test_the_cells_are_left_as_they_are_and_everything_stands_around_them():
    pixels = np.random.default_rng(0).integers(1, 255, (64, 48, 3), dtype=np.uint8)
    framed = frame(pixels, [f"layer.{i}" for i in range(4)], "activation/rms", (0, 950), SCALE)
    places = [
        (y, x)
        for y in range(framed.shape[0] - 64)
        for x in range(framed.shape[1] - 48)
        if (framed[y, x] == pixels[0, 0]).all() and (framed[y : y + 64, x : x + 48] == pixels).all()
    ]
    ((top, left),) = places
    names = framed[top : top + 64, :left].min(axis=(1, 2)).reshape(4, 16)
    assert (names.min(axis=1) < 100).all()  # ink beside each row
    assert all((framed == colour).all(axis=-1).any() for _, colour in SCALE)


def test_names_of_any_length_and_alphabet_fit_and_tell_blocks_apart():
    pixels = np.zeros((600, 16, 3), dtype=np.uint8)
    one, other = ("x" * 300 + tail for tail in ("ab", "ba"))
    framed = [frame(pixels, [name, "слой <b>\n"], "t", (0, 0), SCALE) for name in (one, other)]
    assert framed[0].shape[1] < 800
    assert (framed[0] != framed[1]).any()


def test_as_many_rows_have_a_name_as_there_is_room_for():
    pixels = np.zeros((256, 16, 3), dtype=np.uint8)
    framed = frame(pixels, [f"m{i}" for i in range(256)], "t", (0, 0), SCALE)
    assert framed.shape[0] < 400


def test_without_pillow_the_picture_is_bare(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    pixels = np.zeros((4, 4, 3), dtype=np.uint8)
    assert frame(pixels, ["a"], "t", (0, 1), SCALE) is pixels
