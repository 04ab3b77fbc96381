"""What observing a compiled training costs: ratios of process time per step with and without, both compiled.

    python tests/benchmarks/bench_compile.py [--pairs 30] [--models transformer tcn tiny] [--backend inductor] [--presets first_aid full]

A preset at every=50 is worked out from the two kinds of steps: the observed one runs eagerly, the 49 others run
compiled. Also prints the graphs that were compiled, with and without the monitor, and the graph breaks.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch
from bench_overhead import MODELS, NEVER, Loop, timed
from torch._dynamo.utils import counters

from stethoscope import Monitor, presets


@contextmanager
def compiled(make, backend: str, preset: str, every: int | None):
    """A loop whose model is compiled, observed or not, past its first steps."""
    torch._dynamo.reset()
    counters.clear()
    loop = Loop(make)
    if every:
        loop.monitor = Monitor(loop.model, loop.optimizer, **getattr(presets, preset)(), every=every)
    loop.model = torch.compile(loop.model, backend=backend, fullgraph=True)
    for _ in range(4):
        loop.step()
    yield loop
    if loop.monitor:
        loop.monitor.close()


def once(loop: Loop, repeats: int) -> float:
    if loop.monitor:
        return timed(loop, repeats)
    with torch.compiler.set_stance("default"):  # the monitor's stance holds for the whole process
        return timed(loop, repeats)


def ratio(make, backend: str, preset: str, every: int, pairs: int) -> tuple[float, float, float, int]:
    """Median ratio, its lower 95 % bound, the plain step in milliseconds, and graphs compiled with the monitor."""
    with compiled(make, backend, preset, None) as bare, compiled(make, backend, preset, every) as seen:
        graphs = counters["stats"]["unique_graphs"]
        repeats = max(1, round(0.03 / once(bare, 2)))
        ratios, plain = [], []
        for i in range(pairs):
            first, second = (bare, seen) if i % 2 else (seen, bare)
            times = {id(first): once(first, repeats), id(second): once(second, repeats)}
            ratios.append(times[id(seen)] / times[id(bare)])
            plain.append(times[id(bare)])
        assert counters["stats"]["unique_graphs"] <= graphs + 1, "an observation compiled something again"
        assert not counters["graph_break"]
    draws = np.random.default_rng(0).choice(ratios, (2000, pairs))
    low = float(np.quantile(np.median(draws, axis=1), 0.05))
    return statistics.median(ratios), low, statistics.median(plain) * 1e3, graphs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--backend", default="inductor")
    parser.add_argument(
        "--presets", nargs="+", default=["first_aid", "full"], choices=["first_aid", "separation", "full"]
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kinds = {"other steps, compiled": NEVER, "observed step, eager": 1}
    print(
        f"| compiled | plain step, ms | graphs | {' | '.join(kinds)} | at `every=50` |\n|{'---|' * 6}",
        flush=True,
    )
    for name, preset in product(arguments.models, arguments.presets):
        (*other, plain, graphs), (*observed, _, _) = (
            ratio(MODELS[name], arguments.backend, preset, every, arguments.pairs) for every in kinds.values()
        )
        both = [(observed[i] + 49 * other[i]) / 50 for i in range(2)]
        cells = " | ".join(f"{median:.3f} [{low:.3f}]" for median, low in (other, observed, both))
        print(f"| {name}, `{preset}()` | {plain:.1f} | {graphs} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
