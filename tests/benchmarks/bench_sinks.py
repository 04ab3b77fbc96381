"""Prints what one write costs the caller, for each sink: `python tests/benchmarks/bench_sinks.py [series]`.

W&B runs offline. The budget is off, so that every sink writes all series. A pause before each write stands for the
training; without one, TensorBoard's own thread still holds the interpreter when the next write begins, and the median
goes up by as much as the 5 ms of `sys.getswitchinterval()`: try `--pause 0`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from stethoscope import Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks import Jsonl, Logger, Memory, TensorBoard, WandB

WRITES = 30


class Nowhere:
    def log_metrics(self, metrics, step):
        pass


def sinks(folder):
    yield "Memory", Memory()
    yield "Jsonl", Jsonl(folder / "jsonl")
    yield "Logger (to nowhere)", Logger(Nowhere(), max_series=None)
    yield "TensorBoard", TensorBoard(folder / "tensorboard", max_series=None)
    try:
        import wandb
    except ImportError:
        return
    settings = wandb.Settings(x_disable_stats=True, console="off", silent=True)
    with wandb.init(mode="offline", dir=folder, settings=settings) as run:
        yield "WandB (offline)", WandB(run, max_series=None)
        yield "WandB (offline), max_series=300", WandB(run)


def deliveries(series, *, histograms):
    statistic = ("mean", "rms", "min", "max", "zero")
    edges = tuple(float(edge) for edge in range(65))
    for step in range(WRITES):
        if histograms:
            yield (
                step,
                [
                    Record("activation/histogram", Histogram(edges, (1.0,) * 64), step, module=f"enc.{i}")
                    for i in range(series)
                ],
            )
        else:
            yield (
                step,
                [
                    Record(f"activation/{statistic[i % 5]}", i + 0.123456, step, module=f"encoder.layers.{i // 5}")
                    for i in range(series)
                ],
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("series", type=int, nargs="?", default=1000)
    parser.add_argument("--pause", type=float, default=0.02, help="seconds before each write")
    arguments = parser.parse_args()
    series = arguments.series
    print(f"{'sink':<34}{'series':>22}{'min ms':>9}{'median ms':>11}{'max ms':>9}{'CPU ms':>9}")
    with tempfile.TemporaryDirectory() as folder:
        for name, sink in sinks(Path(folder)):
            sink.open(Run("bench", ""))
            for what, number, histograms in (("scalars", series, False), ("histograms", 100, True)):
                if histograms and name.startswith("Logger"):
                    continue
                times, cpu = [], []
                for step, records in deliveries(number, histograms=histograms):
                    time.sleep(arguments.pause)
                    began, thread = time.perf_counter(), time.thread_time()
                    sink.write(step, records, [])
                    times.append(1e3 * (time.perf_counter() - began))
                    cpu.append(1e3 * (time.thread_time() - thread))
                row = (min(times[1:]), statistics.median(times[1:]), max(times), statistics.median(cpu[1:]))
                print(f"{name:<34}{number:>11} {what:<10}{row[0]:>9.2f}{row[1]:>11.2f}{row[2]:>9.2f}{row[3]:>9.2f}")
            sink.close()


if __name__ == "__main__":
    main()
