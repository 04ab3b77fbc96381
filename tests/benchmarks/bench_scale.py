"""Bytes and time per observation at many ranks and many modules, by simulation.

    python tests/benchmarks/bench_scale.py [--modules 1000 10000 100000] [--ranks 8 1024]

One process makes the records that one rank would have, packs and unpacks them with the real code (`Reduction`, `Jsonl`), and
times that: it is the work of each rank, whatever their number. What crosses the network is not sent but computed, for a ring:
every rank sends and receives 2 (n - 1) / n of the message in 2 (n - 1) turns, each of 30 us (a data centre's TCP) and at
1 GB/s (a tenth of a 100 Gbit/s link, since the training uses it too).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from stethoscope import Record, stats
from stethoscope._exchange import Answer
from stethoscope._parts import Notes
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope._reduce import Reduction
from stethoscope.sinks import Jsonl

LATENCY_S, BYTES_PER_S = 30e-6, 1e9

KINDS = {
    "default": (("mean", "rms", "min", "max", "zero_fraction"), True, ("", "input_")),
    "lean": (("rms", "absmax"), False, ("",)),
}
"""Statistics, histograms, and whether inputs are read: `Activations()`, and `Activations(("rms", "absmax"), inputs=False)`."""


def records(modules: int, kind: str, rank: int) -> list[Record]:
    statistics, histogram, sides = KINDS[kind]
    value = 0.123456789 + rank
    counts = tuple(float(i % 40) for i in range(stats.BINS))
    made = []
    for i in range(modules):
        name = f"model.layers.{i // 12}.block.{i % 12}"
        made += [Record(f"activation/{side}{each}", value, 0, name, rank=rank) for side in sides for each in statistics]
        if histogram:
            bins = Histogram(stats.HISTOGRAM_EDGES, counts)
            made += [
                Record(f"activation/{side}histogram", bins, 0, name, rank=rank, kind="histogram") for side in sides
            ]
        made += [Record(f"{group}/norm", value, 0, f"{name}.weight", rank=rank) for group in ("gradient", "parameter")]
    return made


class Echo:
    """Answers at once with what was sent, as if all ranks had sent the same."""

    bytes = 0

    def send(self, largest, sums):
        self.bytes += sum(each.numel() * each.element_size() for each in (largest, sums))
        return Answer("together", 1)

    def hurry(self, on):
        pass


def reduction(run: Run, made: list[Record]) -> tuple[int, float]:
    """Bytes of one message, and seconds to pack and unpack it once its size is agreed on."""
    echo = Echo()
    reduction = Reduction(run, True, lambda: echo, Notes(strict=True))
    reduction._settle(echo, made, reduction._lay_out(made))
    echo.bytes, began = 0, time.thread_time()
    reduction._settle(echo, made, reduction._lay_out(made))
    return echo.bytes, time.thread_time() - began


def written(run: Run, made: list[Record], folder: Path) -> tuple[int, float]:
    """Bytes of a delivery in a file, and seconds of the writer's thread."""
    sink = Jsonl(folder / f"{len(made)}.jsonl")
    sink.open(run)
    file = next(folder.glob(f"{len(made)}*.jsonl"))
    before, began = file.stat().st_size, time.thread_time()
    sink.write(0, made, [])
    taken = time.thread_time() - began
    sink.close()
    return file.stat().st_size - before, taken


def ring(ranks: int, size: int) -> float:
    """Seconds of a ring all-reduce."""
    return 2 * (ranks - 1) * (LATENCY_S + size / ranks / BYTES_PER_S)


def human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 1024])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = "statistics | modules | ranks | one message | network | pack, unpack | one file | write | files of all ranks, kept per rank"
    print(f"| {columns} |\n|{'---|' * 9}")
    with tempfile.TemporaryDirectory() as folder:
        for kind in KINDS:
            for modules in arguments.modules:
                if kind == "default" and modules > 20_000:
                    continue  # 2 GB of Python objects; it grows in proportion
                made = records(modules, kind, 0)
                facts = written(Run("a", "", world_size=8), made, Path(folder))
                for ranks in arguments.ranks:
                    run = Run("a", "", world_size=ranks)
                    size, packing = reduction(run, made)
                    cells = [
                        kind,
                        f"{modules:,}",
                        f"{ranks:,}",
                        human(size),
                        f"{ring(ranks, size) * 1e3:.0f} ms",
                        f"{packing * 1e3:.0f} ms",
                        human(facts[0]),
                        f"{facts[1] * 1e3:.0f} ms",
                        human(facts[0] * ranks),
                    ]
                    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
