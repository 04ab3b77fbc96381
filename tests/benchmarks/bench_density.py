"""How long does one reading of `probes.Density` take on 10 million weights? `python tests/benchmarks/bench_density.py`."""

import time

import torch
from torch import nn

from stethoscope import probes


def main():
    torch.set_num_threads(1)
    models = {
        "10 matrices": nn.Sequential(*(nn.Linear(1000, 1000, bias=False) for _ in range(10))),
        "GRUs of size 384": nn.ModuleList(nn.GRU(384, 384) for _ in range(11)),
    }
    for name, model in models.items():
        number = sum(value.numel() for value in model.parameters())
        for block in (None, (8, 4)):
            attached = probes.Density(block=block).attach(model)
            attached.arm(True, "train")
            times = []
            for _ in range(10):
                start = time.process_time()
                dict(attached.read({}))
                times.append(time.process_time() - start)
            print(
                f"{name}, {number / 1e6:.1f} million weights, block {block}: median {1e3 * sorted(times)[5]:.1f} ms, one thread"
            )


if __name__ == "__main__":
    main()
