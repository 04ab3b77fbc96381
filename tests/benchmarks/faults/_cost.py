"""What an observer costs on the programs: ratios of process time with and without, interleaved."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch

from faults.cases import PROGRAMS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from faults._training import Batch, Tensors, Training


class Nobody:
    """Looks at nothing."""

    name = "nobody"

    def start(self, training: Training) -> None: ...
    def backward_done(self, training: Training, step: int) -> None: ...
    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None: ...
    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None: ...
    def finish(self) -> list:
        return []

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()


def timed(program, observer, steps: int) -> float:
    training = program.build()
    training.steps = steps
    start = time.process_time()
    training.run(observer)
    observer.finish()
    return time.process_time() - start


def ratio(make: Callable[[], object], pairs: int = 3, steps: int = 60) -> float:
    """Median over the programs of the median ratio over pairs."""
    torch.set_num_threads(1)
    ratios = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program in PROGRAMS:
            timed(program, Nobody(), 10)
            pair = [timed(program, make(), steps) / timed(program, Nobody(), steps) for _ in range(pairs)]
            ratios.append(statistics.median(pair))
    return statistics.median(ratios)
