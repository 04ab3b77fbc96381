"""Cost of one logged dictionary once learned: run it, it prints process time in microseconds per dictionary of 20 entries."""

import statistics
import time
import timeit

import torch

from stethoscope import Record
from stethoscope._metrics import normalise
from stethoscope.watches import Field, MetricSchema

ENTRIES, LOOPS, ROUNDS = 20, 500, 15


def main():
    torch.set_num_threads(1)
    host = {f"metric_{i}": 1.5 * i for i in range(ENTRIES)}
    device = {name: torch.tensor(value) for name, value in host.items()}
    records = tuple(Record(name, value, 0, source="log", kind="tensor") for name, value in host.items())
    for title, schema in (
        ("learned", MetricSchema()),
        ("declared", MetricSchema({name: Field(float, ge=0.0) for name in host})),
    ):
        state = schema.init()
        for _ in range(10):
            state, _ = schema.update(state, records)
        report(f"judge, {title}", lambda schema=schema, state=state: schema.update(state, records))
    report("normalise, floats", lambda: normalise(host))
    report("normalise, tensors", lambda: normalise(device))


def report(title, call):
    times = [
        seconds / LOOPS * 1e6 for seconds in timeit.repeat(call, number=LOOPS, repeat=ROUNDS, timer=time.process_time)
    ]
    print(f"{title:20s} {statistics.median(times):6.1f} us per dictionary of {ENTRIES} (best {min(times):.1f})")


if __name__ == "__main__":
    main()
