"""Peers that see numbers only: trainpulse and training-doctor, given loss, learning rate and gradient norm at every step."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from faults._seen import Seen, once

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from faults._training import Batch, Tensors, Training


def gradient_norm(training: Training) -> float:
    """Of all gradients, before clipping: what `clip_grad_norm_` returns."""
    norms = [p.grad.float().norm() for p in training.model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else 0.0


class Numbers:
    """What both have in common."""

    def backward_done(self, training: Training, step: int) -> None:
        self.norm = gradient_norm(training)

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def now(self, training: Training, tensors: Tensors) -> tuple[float, float, float]:
        return float(tensors["loss"].detach()), self.norm, training.optimizer.param_groups[0]["lr"]


class Trainpulse(Numbers):
    """trainpulse 0.4.0, default configuration. Its timing of steps is left out: several runs share this machine."""

    name = "trainpulse"
    MEANS = {  # noqa: RUF012 - a table
        "loss_spike": ("loss-spike", "loss-diverged"),
        "learning_rate": ("schedule-restarted", "update-ratio-high", "update-ratio-low"),
        "plateau": ("loss-plateau", "stalled-optimisation", "stalled-from-start"),
    }

    def start(self, training: Training) -> None:
        from trainpulse import Monitor

        self.monitor = Monitor()

    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None:
        loss, norm, rate = self.now(training, tensors)
        self.monitor.log("loss", step, loss)
        self.monitor.log("grad_norm", step, norm)
        self.monitor.log("learning_rate", step, rate)

    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, float):
                # it takes whatever has "loss" in its name for the training loss
                self.monitor.log(f"{phase}_score" if name == "loss" else f"{phase}_{name}", step, value)

    def finish(self) -> list[Seen]:
        return once(
            [
                Seen(self.meaning(a), a.step, text=a.message, info=a.severity.value == "info")
                for a in self.monitor.alerts
            ]
        )

    def meaning(self, alert) -> tuple[str, ...]:
        if alert.detector == "nan_detector":
            return ("nonfinite-loss", "loss-diverged") if "loss" in alert.metric_name else ("nonfinite-gradient",)
        if alert.detector == "gradient":
            return ("gradient-exploding",) if "explosion" in alert.message else ("gradient-vanishing", "gradient-zero")
        return self.MEANS[alert.detector]


class TrainingDoctor(Numbers):
    """training-doctor 0.1.0, its default detectors."""

    name = "training-doctor"
    MEANS = {  # noqa: RUF012 - a table
        "lr_too_high": ("update-ratio-high", "loss-diverged", "loss-spike", "gradient-exploding", "nonfinite-loss"),
        "lr_too_low": ("update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start"),
        "plateau": ("loss-plateau", "stalled-optimisation", "stalled-from-start"),
        "overfitting": ("overfit", "overtraining"),
        "gradient_instability": ("gradient-exploding", "nonfinite-gradient"),
    }

    def start(self, training: Training) -> None:
        from training_doctor import Doctor

        self.doctor = Doctor()

    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None:
        loss, norm, rate = self.now(training, tensors)
        self.doctor.log(step, loss=loss, lr=rate, grad_norm=norm)

    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None:
        if isinstance(metrics.get("loss"), float):
            self.doctor.log(step, eval_loss=metrics["loss"])

    def finish(self) -> list[Seen]:
        return once(
            [
                Seen(self.MEANS[d.detector_name], d.step or 0, text=d.problem, info=d.severity.value == "info")
                for d in self.doctor.diagnoses
            ]
        )
