import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name, folder):
    source = str(EXAMPLES.parent / "callbacks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / name)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_loop_learns_and_nothing_is_found(tmp_path):
    printed = run("plain_loop.py", tmp_path)
    assert "no findings" in printed
    assert float(printed.partition("held-out tones: ")[2].split()[0]) > 0.9
    assert not list(tmp_path.iterdir())


def test_the_plain_loop_needs_ten_lines_of_ours_at_most():
    source = (EXAMPLES / "plain_loop.py").read_text()
    marked = [line for line in source.splitlines() if "# <- stethoscope" in line]
    assert len(marked) <= 10
    code = [
        line
        for line in source.splitlines()
        if line.startswith(("from stethoscope", "    monitor.", "        monitor."))
    ]
    assert all(line in marked for line in code)


@pytest.mark.skipif(not (EXAMPLES / "lightning_module.py").exists(), reason="no such example")
def test_the_lightning_example_runs(tmp_path):
    pytest.importorskip("lightning")
    assert run("lightning_module.py", tmp_path)


@pytest.mark.real
def test_the_networks_of_asteroid_are_seen_from_inside(tmp_path):
    pytest.importorskip("asteroid")
    printed = run("real_asteroid.py", tmp_path)
    for words in ("ConvTasNet", "DPRNNTasNet", "TCN.0", "intra_RNN", "decoder"):
        assert words in printed
    assert printed.count("0 findings") == 2


def test_the_ignite_example_learns_and_nothing_is_found(tmp_path):
    pytest.importorskip("ignite")
    printed = run("ignite_loop.py", tmp_path)
    assert "80 steps, validated 5 times" in printed
    assert "0 findings" in printed
