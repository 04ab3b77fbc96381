"""What goes wrong in CTC recognisers: losses, the order of the loop, decibels, counts, silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import recogniser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Observer, Tensors, Training


@fault(recogniser, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", then=(*DIVERGES, *STUCK, *FLAT, "loss-sign", "metric-constant", "activation-saturated", "gradient-clipping", "gradient-imbalance", "class-imbalance"))  # fmt: skip
def scores_into_ctc(t: Training) -> None:
    """`ctc_loss` of the head's scores, without the log softmax: it begins below zero, its gradient is that of another loss, and
    few transcripts are right. Humbatova: wrong loss for the last layer; speech: every forum on CTC."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        frames = torch.full((len(logits),), logits.shape[1])
        return {"loss": F.ctc_loss(logits.transpose(0, 1), batch[1], frames, batch[2]), "logits": logits}

    t.forward = forward


@fault(recogniser, "parameter-unchanged", "update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start", "optimizer-owns-others", "optimizer-misses-parameters", then=(*STUCK, "metric-constant", "gradient-zero", "gradient-vanishing", "step-skipped", "module-unused"))  # fmt: skip
def zeroed_between_backward_and_step(t: Training) -> None:
    """`backward()`, `zero_grad()`, `step()`: two lines in the wrong order, and the optimizer finds no gradient. Humbatova:
    training process; TrainCheck: order of calls."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        observer.backward_done(training, step)
        nn.utils.clip_grad_norm_(training.model.parameters(), training.clip)
        training.optimizer.zero_grad()
        training.optimizer.step()
        return batch, tensors

    t.update = update


@fault(recogniser, "input-range", "dead-units", "feature-constant", "gradient-imbalance", modules=("conv", "activation", ""), then=(*STUCK, "units-symmetric", *FLAT, "activation-exploding", "gradient-exploding", "gradient-clipping", "gradient-zero", "poor-initialisation", "metric-constant", "parameter-unchanged", "loss-spike"))  # fmt: skip
def features_in_decibels(t: Training) -> None:
    """Mel spectra in decibels below full scale, -300 to -200, as the front end's new version returns them, and no
    normalisation: each filter of the ReLU layer is open or shut for good. UMLAUT: input not normalised; speech: CMVN."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return 10 * x - 250, *rest

    t.sample = sample


@fault(recogniser, "metric-range", step=149)
def accuracy_is_a_count(t: Training) -> None:
    """The accuracy is the number of right transcripts, since its division by the batch was lost. Humbatova: wrong validation
    metric; speech: wenet-e2e/wenet."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = measured(tensors, batch)
        return {"accuracy": metrics["exact"] * len(batch[2]), "written": metrics["written"]}

    t.measure = measure


class LogEnergies(nn.Module):
    """The logarithm of energies, without a floor."""

    def forward(self, energies):
        return energies.log()


class FromEnergies(recogniser.Recogniser):
    """The front end is a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.front_end = LogEnergies()

    def forward(self, x):
        return super().forward(self.front_end(x))


@fault(recogniser, "nonfinite-activation", "nonfinite-loss", modules=("front_end",), step=130, then=(*NONFINITE, "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def logarithm_of_silence(t: Training) -> None:
    """Logarithms of energies without a floor; from step 130 on one file ends in digital silence. GRIST: log of zero; speech:
    front ends of one's own."""
    t.model, plain = FromEnergies(), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        energies = x.exp()
        if phase == "train" and step >= 130:
            energies[5, -8:] = 0.0
        return energies, *rest

    t.sample = sample
