"""The table of examples/real_nonfinite.py, on the real packages. See docs/contributing.md for how to get them."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "real_nonfinite.py"))

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("row", EXAMPLE["ROWS"], ids=[row.name for row in EXAMPLE["ROWS"]])
def test_the_culprit_in_a_real_model_is_the_known_one(row):
    try:
        report = EXAMPLE["audit"](row)
    except ImportError as missing:
        pytest.skip(str(missing))
    assert EXAMPLE["right"](row, report), report
