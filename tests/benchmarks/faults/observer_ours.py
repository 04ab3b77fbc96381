"""`presets.full()`, as a user would attach it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from faults._seen import Seen
from stethoscope import Monitor, presets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from faults._training import Batch, Tensors, Training

EVERY = 10
"""Steps between observations: a run of 300 steps is then looked at as often as one of 1500 at the default of 50."""


class Ours:
    """Everything on, nothing tuned."""

    name = "stethoscope"

    def __init__(self, every: int = EVERY) -> None:
        self.every = every
        self._logger = logging.getLogger("stethoscope")
        self._level = self._logger.level

    def start(self, training: Training) -> None:
        self._logger.setLevel(logging.CRITICAL)
        self.monitor = Monitor(
            training.model, training.optimizers, **presets.full(), every=self.every, planned_steps=training.steps
        )

    def backward_done(self, training: Training, step: int) -> None:
        pass

    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None:
        self.monitor.step(batch=batch, **tensors)

    def phase(self, name: str) -> AbstractContextManager[object]:
        return self.monitor.phase(name)

    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None:
        self.monitor.log(metrics, phase)

    def finish(self) -> list[Seen]:
        self.monitor.close()
        self._logger.setLevel(self._level)
        return [
            Seen((f.code,), f.step or 0, (f.module,), f.message, f.cause, f.severity == "info")
            for f in self.monitor.findings
        ]
