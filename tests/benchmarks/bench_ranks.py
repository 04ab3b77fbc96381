"""What observing costs on several ranks: ratios of time per step with and without, from interleaved pairs in one run.

    python tests/benchmarks/bench_ranks.py [--ranks 2] [--pairs 30] [--every 50]

Starts real processes (gloo, one thread each). In each pair all ranks make the same steps once observed and once not, in an
order that alternates; a barrier before each block keeps them together. Prints the step of the unobserved training of that many
ranks, and median ratios with their lower 95 % bounds (a bootstrap over the pairs), for DDP and FSDP2: of the rank's own process time,
and of wall time, in which a rank also waits for the others. On a machine that is busy otherwise believe the former.
"""

from __future__ import annotations

import argparse
import os
import socket
import time

import numpy as np
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stethoscope import Monitor, presets, sinks

NEVER = 1_000_000


def net() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.1)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def ddp() -> nn.Module:
    return DistributedDataParallel(net())


def fsdp() -> nn.Module:
    model = net()
    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


class Loop:
    def __init__(self, make) -> None:
        torch.manual_seed(0)
        self.model, self.x = make(), torch.randn(4, 64, 128)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4)
        self.monitor: Monitor | None = None

    def step(self) -> None:
        loss = self.model(self.x).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.monitor is not None:
            self.monitor.step(loss=loss)

    def timed(self, steps: int) -> np.ndarray:
        """Seconds of process time and of wall time per step."""
        distributed.barrier()
        began = time.process_time(), time.perf_counter()
        for _ in range(steps):
            self.step()
        return np.array([time.process_time() - began[0], time.perf_counter() - began[1]]) / steps


def ratio(make, pairs: int, **arguments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of process and of wall time: median ratio, its lower 95 % bound, and the unobserved step in milliseconds."""
    bare, seen = Loop(make), Loop(make)
    ratios, plain = [], []
    with Monitor(seen.model, seen.optimizer, **presets.first_aid(), sinks=sinks.Memory(), **arguments) as seen.monitor:
        for _ in range(3):
            bare.timed(1), seen.timed(1)
        for i in range(pairs):
            first, second = (bare, seen) if i % 2 else (seen, bare)
            times = {id(loop): loop.timed(2) for loop in (first, second)}
            ratios.append(times[id(seen)] / times[id(bare)])
            plain.append(times[id(bare)])
    draws = np.random.default_rng(0).choice(np.array(ratios), (2000, pairs))
    low = np.quantile(np.median(draws, axis=1), 0.05, axis=0)
    return np.median(ratios, axis=0), low, np.median(plain, axis=0) * 1e3


def work(rank: int, ranks: int, port: int, pairs: int, every: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=ranks)
    cases = [
        ("DDP, kept per rank", ddp, {"reduce": False}),
        ("DDP, combined", ddp, {"reduce": True}),
        ("DDP, guard", ddp, {"reduce": False, "guard": "skip"}),
        ("FSDP2, parts kept per rank", fsdp, {"reduce": False}),
        ("FSDP2, norms of the whole", fsdp, {"reduce": None}),
        ("FSDP2, guard", fsdp, {"reduce": False, "guard": "skip"}),
    ]
    if rank == 0:
        print(f"| {ranks} ranks | clock | plain step, ms | observed step | other steps | at `every={every}` |")
        print("|---|---|---|---|---|---|", flush=True)
    for label, make, arguments in cases:
        observed = ratio(make, pairs, every=1, **arguments)
        other = ratio(make, pairs, every=NEVER, **arguments)
        if rank == 0:
            for i, clock in enumerate(("process", "wall")):
                share = (observed[0][i] + (every - 1) * other[0][i]) / every
                print(
                    f"| {label} | {clock} | {other[2][i]:.1f} | {observed[0][i]:.2f} [{observed[1][i]:.2f}] | "
                    f"{other[0][i]:.2f} [{other[1][i]:.2f}] | {share:.2f} |",
                    flush=True,
                )
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(work, (arguments.ranks, port, arguments.pairs, arguments.every), arguments.ranks)


if __name__ == "__main__":
    main()
