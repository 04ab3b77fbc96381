"""The table of examples/real_causality.py, on the real packages. See docs/contributing.md for how to get them."""

import runpy
from pathlib import Path

import pytest
import torch

from stethoscope.audits import causality

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "real_causality.py"))

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("row", EXAMPLE["ROWS"], ids=[f"{row.name}, {row.mode}" for row in EXAMPLE["ROWS"]])
def test_the_verdict_on_a_real_module_is_the_known_one(row):
    torch.manual_seed(0)
    try:
        model, x = row.build()
    except ImportError as missing:
        pytest.skip(str(missing))
    report = causality(model, x, modes=(row.mode,), **row.options)
    blame = report.per_mode[row.mode].blame
    assert EXAMPLE["right"](row, report, blame.type if blame else None, report.steps), report
