"""What `stethoscope run` costs: seconds of CPU time at start-up, and the ratio of process time per step.

    python tests/benchmarks/bench_run.py [--pairs 30] [--starts 5] [--models transformer tcn tiny]

Start-up is that of a script that imports torch and ends, with and without, in turns; medians. Steps are measured
as in `bench_overhead.py`: interleaved pairs in one process, one thread, median ratio and its lower 95 % bound. The loops
call no monitor: torch's hooks do. Each pair is a stretch of steps with everything taken off and one with everything on, so
that the loop without it pays for no hook of ours.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path

import numpy as np
import torch
from bench_overhead import MODELS, Loop
from torch.optim.optimizer import _global_optimizer_post_hooks as after_steps
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_steps

from stethoscope.integrations._script._script import Script
from stethoscope.integrations._script._settings import Settings

NEVER = 1_000_000


def start_up(starts: int) -> tuple[float, float]:
    """Median CPU seconds of a script that imports torch and ends, without and with `stethoscope run`."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text("import torch")
        took: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(starts):
            for ours, times in took.items():
                command = [sys.executable, *(["-m", "stethoscope", "run"] if ours else []), "train.py"]
                before = os.times()
                subprocess.run(command, cwd=folder, capture_output=True, check=True)
                after = os.times()
                times.append(after[2] + after[3] - before[2] - before[3])  # user and system time of children
    return statistics.median(took[False]), statistics.median(took[True])


def timed(loop: Loop, steps: int) -> float:
    begun = time.process_time()
    for _ in range(steps):
        loop.step()
    return (time.process_time() - begun) / steps


@contextmanager
def taken_off():
    """torch as it is without `stethoscope run`."""
    kept = dict(before_steps), dict(after_steps), torch.autograd.backward
    before_steps.clear()
    after_steps.clear()
    torch.autograd.backward = kept[2].__wrapped__
    yield
    before_steps.update(kept[0])
    after_steps.update(kept[1])
    torch.autograd.backward = kept[2]


def ratio(make, pairs: int, folder: str, **options) -> tuple[float, float, float]:
    """Median ratio, its lower 95 % bound, the plain step in milliseconds."""
    gc.collect()  # an optimizer of an earlier loop would be waited for
    seen = Loop(make)
    script = Script(Settings(target="bench", to=folder, **options))
    script.begin()
    for _ in range(3):  # at the first step the model is found and observed
        seen.step()
    bare = Loop(make)
    ratios, plain = [], []
    with taken_off():
        for _ in range(3):
            bare.step()
        steps = max(1, round(0.03 / timed(bare, 3)))
    for i in range(pairs):
        times = {}
        for which in ("bare", "seen") if i % 2 else ("seen", "bare"):
            with taken_off() if which == "bare" else nullcontext():
                times[which] = timed(bare if which == "bare" else seen, steps)
        ratios.append(times["seen"] / times["bare"])
        plain.append(times["bare"])
    with redirect_stderr(io.StringIO()):
        script.end()
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    return statistics.median(ratios), float(np.quantile(np.median(draws, axis=1), 0.05)), statistics.median(plain) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.starts:
        plain, ours = start_up(arguments.starts)
        print(
            f"start-up: {plain:.2f} s to the first line after `import torch`, {ours:.2f} s with it: +{ours - plain:.2f} s"
        )
    ways = {
        "nothing measured": {"preset": "none", "every": NEVER},
        "first_aid, observed step": {"preset": "first_aid", "every": 1},
        "first_aid, other steps": {"preset": "first_aid", "every": NEVER},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            print(f"\n{name}")
            found = {}
            for number, (way, options) in enumerate(ways.items()):
                found[way] = ratio(MODELS[name], arguments.pairs, f"{folder}/{name}{number}", **options)
            observed, other = found["first_aid, observed step"], found["first_aid, other steps"]
            found["first_aid, amortised at every=50"] = tuple(
                (a + 49 * b) / 50 for a, b in zip(observed, other, strict=True)
            )
            for way, (median, low, step) in found.items():
                print(f"  {way:34s} {median:6.3f}   (at least {low:.3f}; plain step {step:.1f} ms)", flush=True)


if __name__ == "__main__":
    main()
