"""Faults that `stethoscope demo --fault NAME` plants: each changes the training as a real mistake would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope.cli._demo_audio import SAMPLE_RATE, Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from stethoscope.cli._demo_model import Separator


METRICS = ("si_sdr_db", "si_sdri_db")
"""What validation measures: SI-SDR, and its improvement over the mixture."""


@dataclass
class Training:
    """What the demo's loop is made of; a fault replaces or changes some of it before the first step.

    Args:
        model: mixtures to talkers.
        optimizer: of all its parameters.
        batch: optimizer step to its batch.
        loss: estimates and sources, both `(batch, 2, samples)`, to a 0-d loss.
        steps: how many optimizer steps there will be.
        names: validation's names of its two metrics.
    """

    model: Separator
    optimizer: Optimizer
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    names: tuple[str, str] = METRICS


@dataclass(frozen=True)
class Fault:
    """One mistake.

    Args:
        mistake: what it is, for the reader of the terminal.
        plant: makes it.
    """

    mistake: str
    plant: Callable[[Training], None]


def _nan(training: Training) -> None:
    training.model.masker.norm.eps = 0.0
    recorded, first = training.batch, 2 * training.steps // 3

    def batch(step: int) -> Batch:
        mixture, sources = recorded(step)
        if step >= first:
            pause = slice(0, SAMPLE_RATE // 20)
            mixture[0, pause], sources[0, :, pause] = 0, 0
        return Batch(mixture, sources)

    training.batch = batch


def _metric(training: Training) -> None:
    training.names = ("si_sdr_db", "si_sdr_i_db")


FAULTS = {
    "nan": Fault(
        "masker.norm divides by the standard deviation of a frame without eps, and after two thirds of the training a "
        "recording begins with 50 ms of digital silence.",
        _nan,
    ),
    "metric": Fault(
        "validation returns si_sdr_i_db, where si_sdri_db is what was agreed on and what others will read.",
        _metric,
    ),
}
