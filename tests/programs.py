"""Programs of users, each run in a process of its own: what tests of the end of a process share."""

import subprocess
import sys
import textwrap

from stethoscope import sinks

TOP = """
    import atexit, os, signal, sys, threading, time, torch
    from torch import nn
    from stethoscope import Finding, Monitor, presets, sinks
    from stethoscope._protocols import Run
    torch.set_num_threads(1)
    model = nn.Linear(3, 2)
    folder = sys.argv[1]
    class Slow(sinks.Jsonl):
        def write(self, step, records, findings):
            time.sleep(0.02)
            super().write(step, records, findings)
    def train(monitor, steps):
        for _ in range(steps):
            model(torch.ones(2, 3)).sum().backward()
            monitor.step(loss=1.0)
"""


def script(tmp_path, text, timeout=60):
    """Run a program that begins with `TOP` and is given the folder of a run."""
    program = textwrap.dedent(TOP) + textwrap.dedent(text)
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def steps_of(tmp_path):
    """The steps whose loss that run holds, in order."""
    return [d.step for d in sinks.read(tmp_path / "run") for r in d.records if r.name == "loss"]
