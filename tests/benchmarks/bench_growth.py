"""How the cost of observing grows, with the number of modules and with the size of what they return.

    python tests/benchmarks/bench_growth.py [--pairs 12]

Ratios of process time per step, as in bench_overhead.py, and what an observed step costs per module and per value. Cost per module is seen
where modules are many and tiny, cost per value where they are few and large.
"""

from __future__ import annotations

import argparse

import torch
from bench_overhead import OURS, ratio
from torch import nn

LOOKS = ("flags every step", "first_aid(), observed step")


def tiny(modules: int):
    def make():
        kinds = (lambda: nn.Linear(16, 16), lambda: nn.LayerNorm(16), nn.Tanh)
        return nn.Sequential(*(kinds[i % 3]() for i in range(modules))), torch.randn(16, 16)

    return make


def large(values: int):
    def make():
        channels = 16
        blocks = [part for _ in range(4) for part in (nn.Conv1d(channels, channels, 3, padding=1), nn.PReLU())]
        return nn.Sequential(*blocks), torch.randn(1, channels, values // channels)

    return make


def table(head: str, sizes: list[int], make, pairs: int, unit: str, per: float) -> None:
    print(f"\n| {head} | plain step, ms | flags every step | `first_aid()`, observed | {unit} |\n|---|---|---|---|---|")
    for size in sizes:
        results = [ratio(make(size), OURS[look], max(4, min(pairs, 4_000_000 // size))) for look in LOOKS]
        (flags, flags_low, _), (observed, observed_low, plain) = results
        cost = (observed - 1) * plain * 1e-3 / size * per
        print(
            f"| {size:,} | {plain:.1f} | {flags:.2f} [{flags_low:.2f}] | {observed:.2f} [{observed_low:.2f}] | {cost:.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=12)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    table("modules", [10, 100, 1000, 10_000], tiny, pairs, "us per module observed", 1e6)
    # each of the 8 modules returns as many values; inputs and outputs are read
    table(
        "values per activation",
        [1000, 10_000, 100_000, 1_000_000, 10_000_000],
        large,
        pairs,
        "ns per value, 8 modules",
        1e9,
    )


if __name__ == "__main__":
    main()
