from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "separation_asteroid.py"


@pytest.mark.real
@pytest.mark.timeout(900)  # two minutes of one core, which the machine may share
@pytest.mark.parametrize(
    ("case", "said", "unsaid"),
    [
        ("healthy", ["training set-up: ok"], ["warning", "error"]),
        ("nonpit", ["error output-collapse", "warning stalled-assignment", "reach 0.0 dB at most"], ["(val)"]),
        (
            "swapped",
            ["error output-collapse at step 99 (val)", "In training they are apart", "strict=False"],
            ["plateau"],
        ),
    ],
)
def test_dprnn_gets_the_right_diagnosis(case, said, unsaid):
    pytest.importorskip("asteroid")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), case], capture_output=True, text=True, timeout=840, check=True
    )
    printed = run.stdout + run.stderr
    assert all(words in printed for words in said)
    assert not any(words in printed for words in unsaid)
