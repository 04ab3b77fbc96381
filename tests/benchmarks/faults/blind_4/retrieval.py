"""What goes wrong in retrieval: rows off by one, roots, gains of zero, silence, temperature, recall."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import retrieval
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


@fault(retrieval, "loss-plateau", "stalled-optimisation", "stalled-from-start", "output-constant", step=30, then=(*STUCK, *FLAT, "overfit", "overtraining", "class-imbalance", "weight-norm-drift", "update-ratio-low", "dead-units"))  # fmt: skip
def captions_one_row_off(t: Training) -> None:
    """The collate function counts captions from one and clips from zero: each clip has the caption of its neighbour in the batch,
    and nothing can be learnt. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        return frames, words.roll(1, 0)

    t.sample = sample


@fault(retrieval, "update-ratio-high", "activation-exploding", "weight-norm-drift", "loss-diverged", "loss-spike", "gradient-exploding", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "activation-saturated", "dead-units", "gradient-zero", "gradient-clipping", "gradient-imbalance", "attention-head-dead", "metric-constant", "class-imbalance"))  # fmt: skip
def rate_for_large_batches(t: Training) -> None:
    """The rate is scaled with a batch size of 32,768, which was that of the paper: 2.0. AutoTrainer: oscillating loss; Humbatova:
    learning rate."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2.0, weight_decay=0.01)


@fault(
    retrieval,
    "gradient-zero",
    "parameter-unchanged",
    "module-unused",
    modules=("audio",),
    then=("optimizer-owns-others",),
)
def clips_encoded_without_gradient(t: Training) -> None:
    """`no_grad()` of the script that extracts features is still around the audio tower: it stays as it was drawn. TrainCheck: a
    part without gradients; SageMaker UnchangedTensor."""
    encode = t.model.audio.forward
    t.model.audio.forward = torch.no_grad()(encode)


@fault(retrieval, "nonfinite-gradient", "nonfinite-parameter", modules=("", "text", "text.project"), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "metric-constant"))  # fmt: skip
def distance_to_itself(t: Training) -> None:
    """A term spreads captions by their distances, roots of squared sums, with those of each caption to itself: the slope of a root
    at zero is Inf, and times 0 NaN. GRIST: square root of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = retrieval.forward(model, batch)
        text = F.normalize(model.text(batch[1]), dim=-1)
        distances = (text[:, None] - text[None]).square().sum(-1).sqrt()
        return {**tensors, "loss": tensors["loss"] - 0.01 * distances.mean()}

    t.forward = forward


@fault(retrieval, "dead-units", "feature-constant", "gradient-zero", "parameter-unchanged", modules=("audio.norm2", "audio.activation2", "audio.conv2", "audio.norm1", "audio.activation1", "audio.conv1"), then=(*STUCK, *FLAT, "module-unused", "poor-initialisation", "metric-constant", "gradient-imbalance", "stalled-from-start", "weight-norm-drift"))  # fmt: skip
def gain_of_zero_without_shortcut(t: Training) -> None:
    """The gain of the last normalisation starts at zero, as in residual blocks, but nothing goes around it: the ReLU after it is
    zero, and so is its slope. SageMaker AllZero; TheDeepChecker: dead units."""
    nn.init.zeros_(t.model.audio.norm2.weight)


@fault(retrieval, "input-constant", "input-duplicate", then=(*STUCK, *FLAT, "input-drift", "overfit", "overtraining"))
def clips_read_past_the_end(t: Training) -> None:
    """Offsets are in seconds and are taken for minutes: two clips of three are read past the end of their file, and padded with
    zeros. TheDeepChecker: constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        found = torch.rand(len(frames), 1, 1, generator=seeded(96, step, len(phase))) < 1 / 3
        return frames * found, words

    t.sample = sample


@fault(retrieval, "input-drift", step=49, then=("overfit", "overtraining", "input-range"))
def validation_in_integers(t: Training) -> None:
    """Validation files are read by another library, as integers of 16 bits: 3,000 times louder. Humbatova: wrong preprocessing;
    SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        return ((3000 * frames).round() if phase == "val" else frames), words

    t.sample = sample


@fault(retrieval, "optimizer-misses-parameters", "parameter-unchanged", modules=("",), then=("optimizer-owns-others",))
def temperature_left_out(t: Training) -> None:
    """The optimizer is given the parameters of both towers, and not the temperature, which belongs to neither. TrainCheck:
    parameters that no optimizer holds."""
    towers = [*t.model.audio.parameters(), *t.model.text.parameters()]
    t.optimizers = [torch.optim.AdamW(towers, 2e-3, weight_decay=0.01)]


@fault(retrieval, "metric-range", step=49)
def recall_in_hundreds(t: Training) -> None:
    """Recall is multiplied by 100 for a table, in the function that the logger uses as well: 96.9. Humbatova: wrong validation
    metric."""
    measured = t.measure
    t.measure = lambda tensors, batch: {name: 100 * value for name, value in measured(tensors, batch).items()}


class Likely(retrieval.TwoTowers):
    """Returns how likely each caption is for each clip."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(-1)

    def forward(self, frames, words):
        return self.softmax(super().forward(frames, words))


@fault(retrieval, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", "activation-saturated", "gradient-vanishing", modules=("softmax", ""), then=(*STUCK, "overfit", "overtraining", "weight-norm-drift", "update-ratio-low"))  # fmt: skip
def softmax_before_its_loss(t: Training) -> None:
    """The model ends in a softmax over captions, for the sake of a demo, and the contrastive loss makes another one. Humbatova:
    wrong loss for the last layer; UMLAUT."""
    t.model = Likely()


@fault(retrieval, "poor-initialisation", "activation-vanishing", "gradient-vanishing", "feature-constant", "norm-input-variance", modules=("audio",), then=(*STUCK, *FLAT, "gradient-imbalance", "gradient-exploding", "dead-units"))  # fmt: skip
def convolutions_drawn_too_small(t: Training) -> None:
    """An audio tower without normalisation, and `std=1e-4` for its convolutions, a typing error for 1e-1: what is left behind
    them is the bias of the last layer. SageMaker PoorWeightInitialization; TheDeepChecker."""
    t.model = retrieval.TwoTowers(norm=lambda channels: nn.Identity())
    for conv in (t.model.audio.conv1, t.model.audio.conv2):
        nn.init.normal_(conv.weight, std=1e-4)
        nn.init.zeros_(conv.bias)


@fault(retrieval, "metric-vanished", "metric-missing", "metric-phase-mismatch", step=149)
def recall_of_records_only(t: Training) -> None:
    """`recall@5` is put into the dictionary only where it is a new best, and read in each validation. Speech:
    wenet-e2e/wenet#2430."""
    measured, best = t.measure, [-math.inf]

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = measured(tensors, batch)
        if metrics["recall@5"] <= best[0]:
            del metrics["recall@5"]
        else:
            best[0] = metrics["recall@5"]
        return metrics

    t.measure = measure
