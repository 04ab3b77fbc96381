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


@dataclass
class Training:
    """What the demo's loop is made of; a fault replaces or changes some of it before the first step.

    Args:
        model: mixtures to talkers.
        optimizer: of all its parameters.
        batch: optimizer step to its batch.
        loss: estimates and sources, both `(batch, 2, samples)`, to a 0-d loss.
        steps: how many optimizer steps there will be.
    """

    model: Separator
    optimizer: Optimizer
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int


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


def _collapse(training: Training) -> None:
    from stethoscope.cli._demo_model import si_sdr_db

    training.loss = lambda estimates, sources: -si_sdr_db(estimates, sources).mean()


def _plateau(training: Training) -> None:
    recorded, first = training.batch, training.steps // 3

    def batch(step: int) -> Batch:
        if step == first:
            for group in training.optimizer.param_groups:
                group["lr"] *= 1e-4
        return recorded(step)

    training.batch = batch


FAULTS = {
    "nan": Fault(
        "masker.norm divides by the standard deviation of a frame without eps, and after two thirds of the training a "
        "recording begins with 50 ms of digital silence.",
        _nan,
    ),
    "collapse": Fault(
        "the loss compares outputs and talkers in the order given instead of the better one (no PIT), and that order is "
        "random: equal outputs are the best answer.",
        _collapse,
    ),
    "plateau": Fault(
        "after a third of the training the learning rate is divided by 10,000, as a scheduler counting steps as epochs does.",
        _plateau,
    ),
}
