"""Cost of `probes.Separation` on one core: batch 8, 2 sources, 4 s at 8 kHz. Prints milliseconds of process time."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from stethoscope.probes import Separation


def cost(spec: Separation, given: dict[str, Tensor], repeats: int = 40) -> float:
    """Median process time of one read, in ms."""
    attached = spec.attach(nn.Identity())
    attached.arm(True, "train")
    attached.read(given)
    times = []
    for _ in range(repeats):
        began = time.process_time()
        attached.read(given)
        times.append(time.process_time() - began)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    torch.set_num_threads(1)
    references = torch.randn(8, 2, 32_000)
    estimates = references + 0.3 * torch.randn_like(references)
    known = {"estimates": estimates, "references": references, "mixture": references.sum(1)}
    known["ids"] = torch.arange(8)
    print(
        f"cosine and level                              {cost(Separation(max_delay=0), {'estimates': estimates}):6.2f} ms"
    )
    print(f"with references, mixture, margin              {cost(Separation(max_delay=0), known):6.2f} ms")
    print(f"with references, mixture, margin, 64 delays   {cost(Separation(max_delay=64), known):6.2f} ms")
