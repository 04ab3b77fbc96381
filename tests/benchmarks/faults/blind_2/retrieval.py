"""What goes wrong in retrieval: overflow, defaults of metrics, pooling, gathering, widening."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import retrieval
from faults._fault import NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update


class Sharp(retrieval.TwoTowers):
    """A fixed temperature."""

    def forward(self, frames, words):
        audio, text = F.normalize(self.audio(frames), dim=-1), F.normalize(self.text(words), dim=-1)
        return audio @ text.T / 0.007


@fault(retrieval, "nonfinite-loss", "nonfinite-gradient", "loss-diverged", modules=("",), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "metric-constant", "activation-saturated", "output-constant", "feature-constant"))  # fmt: skip
def softmax_by_hand(t: Training) -> None:
    """The contrastive loss as in the paper, a logarithm of a quotient of exponentials, at a temperature of 0.007: the
    exponential of 89 is Inf in float32. GRIST: overflow of exp."""
    t.model = Sharp()
    t.model.scale.requires_grad_(False)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch)
        e = logits.exp()
        loss = -(e.diagonal() / e.sum(1)).log().mean() - (e.diagonal() / e.sum(0)).log().mean()
        return {"loss": loss / 2, "logits": logits, "targets": torch.arange(len(logits))}

    t.forward = forward


@fault(retrieval, "metric-phase-mismatch", "metric-constant", "metric-missing", step=49)
def recall_by_default(t: Training) -> None:
    """Validation asks its dictionary for `recall@1` by an old name, `.get("r@1", 0.0)`: training shows a recall, validation
    exactly zero. Speech: wenet-e2e/wenet#2430; Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = measured(tensors, batch)
        return {"recall@1": metrics.get("r@1", 0.0), "recall@5": metrics["recall@5"]}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        if step % 10 == 9:
            observer.log(measured({"logits": tensors["logits"].detach()}, batch), "train", step)
        return batch, tensors

    t.measure, t.update = measure, update


@fault(retrieval, "activation-saturated", "poor-initialisation", "gradient-vanishing", modules=("audio.softmax", "audio.score"), then=(*STUCK, "activation-exploding", "gradient-imbalance", "gradient-exploding", "gradient-clipping", "update-ratio-low", "gradient-zero", "attention-head-dead"))  # fmt: skip
def pooling_of_one_frame(t: Training) -> None:
    """The scores of frames are divided by a temperature of 0.001, squared by mistake from a setting of 0.03: one frame has
    all the weight. SageMaker SaturatedActivation; TheDeepChecker: saturated units."""
    t.model.audio.score.register_forward_hook(lambda module, args, output: output * 1000)


class Gathered(retrieval.TwoTowers):
    """Embeddings of all ranks, as `all_gather` returns them."""

    def forward(self, frames, words):
        audio, text = F.normalize(self.audio(frames), dim=-1), F.normalize(self.text(words), dim=-1)
        every_audio, every_text = audio.detach(), text.detach()
        return self.scale.clamp(max=math.log(100.0)).exp() * every_audio @ every_text.T


@fault(retrieval, "gradient-zero", "parameter-unchanged", "module-unused", modules=("audio", "text"), then=(*STUCK, "update-ratio-low", "stalled-from-start", "optimizer-owns-others", "metric-constant"))  # fmt: skip
def gathered_without_gradient(t: Training) -> None:
    """Embeddings are gathered from all ranks, and `all_gather` passes no gradient: the temperature alone is trained.
    TrainCheck: a part without gradients; SageMaker UnchangedTensor."""
    t.model = Gathered()


@fault(retrieval, "units-symmetric", "poor-initialisation", modules=("audio",), then=("feature-constant",))  # fmt: skip
def widened_by_copies(t: Training) -> None:
    """The first convolution was widened from 4 to 32 channels by copies of its filters, without a little noise: they stay
    copies. TheDeepChecker: symmetric units; Humbatova: wrong weights initialisation."""
    first, second = t.model.audio.conv1, t.model.audio.conv2
    with torch.no_grad():
        first.weight.copy_(first.weight[:4].repeat(8, 1, 1))
        first.bias.copy_(first.bias[:4].repeat(8))
        second.weight.copy_(second.weight[:, :4].repeat(1, 8, 1))
