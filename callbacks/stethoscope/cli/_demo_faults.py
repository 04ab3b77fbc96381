"""Faults that `stethoscope demo --fault NAME` plants: each changes the training as a real mistake would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from stethoscope import audits
from stethoscope.cli._demo_audio import SAMPLE_RATE, Batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.optim import Optimizer

    from stethoscope import Report
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
        sparsify: called after each optimizer step with their number so far.
        before: audits to run before the first step.
        after: audits to run after the last step.
        names: validation's names of its two metrics.
    """

    model: Separator
    optimizer: Optimizer
    batch: Callable[[int], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int
    sparsify: Callable[[int], None] = lambda _: None
    before: tuple[Callable[[], Report], ...] = ()
    after: tuple[Callable[[], Report], ...] = ()
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


def _sparsity(training: Training) -> None:
    schedule = audits.Schedule("sparsify", start=2 * training.steps, stop=6 * training.steps)
    weight = training.model.masker.mask.weight

    def sparsify(count: int) -> None:
        if schedule.last_action(count) == count:
            smallest = weight.detach().abs().flatten().argsort()
            removed = round((1 - schedule.density(count, _KEPT)) * weight.numel())
            with torch.no_grad():
                weight.view(-1)[smallest[:removed]] = 0

    training.sparsify = sparsify
    training.before = (lambda: audits.plan(schedule, training.steps),)
    training.after = (lambda: audits.sparsity(training.model, weights="masker.mask.weight", target=_KEPT),)


_KEPT = 0.25


def _causal(training: Training) -> None:
    training.model.masker.norm.over = (1, 2)


def _metric(training: Training) -> None:
    training.names = ("si_sdr_db", "si_sdr_i_db")


def _collapse(training: Training) -> None:
    from stethoscope.cli._demo_model import si_sdr_db

    training.loss = lambda estimates, sources: -si_sdr_db(estimates, sources).mean()


def _plateau(training: Training) -> None:
    recorded, first = training.batch, training.steps // 8

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
    "sparsity": Fault(
        "masker.mask is to keep a quarter of its weights, but the sparsification starts after twice as many steps as the "
        "training makes.",
        _sparsity,
    ),
    "causal": Fault(
        "the model promises to look ahead by no more than 123 ms, but masker.norm takes mean and variance over the "
        "whole recording.",
        _causal,
    ),
    "metric": Fault(
        "validation returns si_sdr_i_db, where si_sdri_db is what was agreed on and what others will read.",
        _metric,
    ),
    "collapse": Fault(
        "the loss compares outputs and talkers in the order given instead of the better one (no PIT), and that order is "
        "random: equal outputs are the best answer.",
        _collapse,
    ),
    "plateau": Fault(
        "after an eighth of the training the learning rate is divided by 10,000, as a scheduler counting steps as epochs does.",
        _plateau,
    ),
}
