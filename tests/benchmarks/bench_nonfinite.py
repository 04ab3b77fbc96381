"""What the audit costs: process time of `audits.nonfinite` over one forward pass (and forward with backward), one thread.

    python tests/benchmarks/bench_nonfinite.py [--pairs 10]

The models are those of bench_overhead.py. The limit is 30 forward passes on the transformer.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stethoscope import audits

sys.path.insert(0, str(Path(__file__).parent))
from bench_overhead import MODELS

if TYPE_CHECKING:
    from collections.abc import Callable


def seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def squares(output: torch.Tensor) -> torch.Tensor:
    return output.square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x = make()
        sick = x.clone()
        sick.view(-1)[0] = float("nan")
        absurd = copy.deepcopy(model)
        first = next(each for each in absurd.parameters() if each.dim() > 1)
        first.data.view(-1)[::7] = 3e38
        runs = {
            "forward, healthy": lambda m=model, x=x: audits.nonfinite(m, x),
            "forward, NaN in the input": lambda m=model, x=sick: audits.nonfinite(m, x),
            "forward, absurd weights": lambda m=absurd, x=x: audits.nonfinite(m, x),
            "forward and backward": lambda m=model, x=x: audits.nonfinite(m, x, loss=squares),
        }
        for label, audit in runs.items():
            model(x), audit()
            ratios = [seconds(audit) / seconds(lambda m=model, x=x: m(x)) for _ in range(pairs)]
            print(f"{name:12s} {label:28s} {statistics.median(ratios):6.1f} forward passes", flush=True)


if __name__ == "__main__":
    main()
