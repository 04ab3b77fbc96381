"""What goes wrong in retrieval: captions, temperatures, frozen towers, running statistics, recall, negatives."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import retrieval
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded
from faults.retrieval import BATCH, WIDTH, ranks

ALIKE = ("feature-constant", "output-constant", "gradient-vanishing", "gradient-zero", "activation-vanishing", "norm-input-variance")  # fmt: skip


@fault(retrieval, "feature-constant", "output-constant", "input-duplicate", modules=("text",), then=(*STUCK, *ALIKE, "attention-head-dead", "parameter-unchanged", "gradient-imbalance", "class-imbalance", "dead-units", "metric-constant"))  # fmt: skip
def captions_of_default(t: Training) -> None:
    """The column of the captions was renamed, and the reader falls back to one word for all. Humbatova: wrong data;
    SageMaker TensorVariance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        words = torch.zeros_like(words)
        words[:, 0] = 1
        return frames, words

    t.sample = sample


class Hot(retrieval.TwoTowers):
    """No bound on the temperature."""

    def forward(self, frames, words):
        audio, text = F.normalize(self.audio(frames), dim=-1), F.normalize(self.text(words), dim=-1)
        return self.scale.exp() * audio @ text.T


@fault(retrieval, "gradient-exploding", "gradient-clipping", "gradient-imbalance", "poor-initialisation", "activation-exploding", "activation-saturated", "loss-plateau", "stalled-optimisation", then=(*DIVERGES, *STUCK, *NONFINITE, "update-ratio-low"))  # fmt: skip
def temperature_not_in_logarithm(t: Training) -> None:
    """The scale is set to 1 / 0.07 where its logarithm belongs: similarities of a million. Humbatova: wrong weights
    initialisation; TheDeepChecker: loss at the start."""
    t.model = Hot()
    nn.init.constant_(t.model.scale, 1 / 0.07)


@fault(retrieval, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("text",), step=60)  # fmt: skip
def thawed_too_late(t: Training) -> None:
    """The text tower is frozen for 60 steps and then thawed, but the optimizer was built from what required gradients at
    the start. TrainCheck: huggingface/accelerate#2665; SageMaker UnchangedTensor."""
    t.model.text.requires_grad_(False)

    def thaw(training: Training, step: int) -> None:
        if step == 60:
            training.model.text.requires_grad_(True)

    t.before.append(thaw)


@fault(retrieval, "nonfinite-buffer", "input-range", modules=("audio.norm1", ""), step=150, then=(*NONFINITE, *DIVERGES, *ALIKE, *STUCK, "dead-units", "input-drift", "overfit", "overtraining", "gradient-clipping", "weight-norm-drift"))  # fmt: skip
def damaged_clip_in_statistics(t: Training) -> None:
    """One damaged file of floats up to 1e25 at step 150: the batch passes, the running variance is infinite from then on.
    GRIST: overflow; TrainCheck; pytorch/pytorch#88474."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        if phase == "train" and step == 150:
            frames[7] *= 1e25
        return frames, words

    t.sample = sample


@fault(retrieval, "model-in-eval", step=50, then=("overfit", "overtraining"))
def never_back_to_training(t: Training) -> None:
    """`train()` is called before the loop, `eval()` in each validation. TrainCheck; Humbatova: training process;
    tk-rusch/coRNN#1."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < training.val_every)
        return plain_update(training, step, observer)

    t.update = update


@fault(retrieval, "nonfinite-activation", "nonfinite-loss", modules=("text",), step=120, then=(*NONFINITE, "nonfinite-buffer", "metric-constant"))  # fmt: skip
def empty_caption(t: Training) -> None:
    """From step 120 on one caption has no words: a mean over none of them. GRIST: division by zero;
    pytorch/pytorch#24816."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, words = plain(step, phase)
        if phase == "train" and step >= 120:
            words[9] = 0
        return frames, words

    t.sample = sample


@fault(retrieval, "metric-constant", step=49)
def ranks_from_one(t: Training) -> None:
    """Ranks count from one, and recall at 1 asks for a rank below one: 0.0 at every validation. Humbatova: wrong
    validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        rank = 1 + ranks(tensors)
        return {"recall@1": float((rank < 1).float().mean()), "recall@5": float((rank < 5).float().mean())}

    t.measure = measure


@fault(retrieval, "metric-type", step=49, then=("metric-missing", "metric-unexpected"))
def recall_of_each_clip(t: Training) -> None:
    """`mean()` is missing: a tensor of 32 hits is logged as recall. Humbatova: wrong tensor
    shape."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"recall@1": (ranks(tensors) < 1).float(), "recall@5": float((ranks(tensors) < 5).float().mean())}

    t.measure = measure


@fault(retrieval, "metric-nonfinite", step=49)
def reciprocal_of_rank_zero(t: Training) -> None:
    """The mean reciprocal rank with ranks that count from zero is infinite. GRIST: division by zero; Humbatova: wrong
    validation metric."""
    measured = t.measure
    t.measure = lambda tensors, batch: {**measured(tensors, batch), "mrr": float((1 / ranks(tensors)).mean())}


def own_only(model: nn.Module, batch: Batch) -> Tensors:
    """The cosine of each clip with its own caption, and nothing else."""
    logits = model(*batch)
    loss = (1 - logits.diagonal() / model.scale.exp()).mean()
    return {"loss": loss, "logits": logits, "targets": torch.arange(len(logits))}


@fault(retrieval, "feature-constant", "output-constant", "loss-plateau", "prediction-collapse", step=30, then=(*STUCK, *ALIKE, "update-ratio-low", "dead-units", "module-unused", "parameter-unchanged", "metric-constant", "class-imbalance"))  # fmt: skip
def negatives_forgotten(t: Training) -> None:
    """The loss pulls each clip to its caption and pushes nothing apart: all embeddings become one direction, and the loss
    is perfect. Humbatova: wrong loss."""
    t.forward, t.steps = own_only, 400


@fault(retrieval, "attention-head-dead", "units-symmetric", modules=("text.encoder",), then=(*ALIKE, "poor-initialisation", "parameter-unchanged", "module-unused", "dead-units"))  # fmt: skip
def two_heads_loaded(t: Training) -> None:
    """Weights of a model with two heads are copied into zeros for one with four: the other two stay zero, since both sides
    of their product are. SageMaker AllZero; TheDeepChecker: zero weights."""
    attention = t.model.text.encoder.self_attn
    with torch.no_grad():
        for part in attention.in_proj_weight.chunk(3):
            part[WIDTH // 2 :] = 0.0
        attention.in_proj_bias.zero_()
        attention.out_proj.weight[:, WIDTH // 2 :] = 0.0


@fault(retrieval, "overfit", "overtraining", "input-duplicate", step=49)
def sixty_four_pairs(t: Training) -> None:
    """The list of files was cut to 64 for a test, and dropout switched off. SageMaker Overfit."""
    few, plain = retrieval.pairs(64, seeded(99)), t.sample
    t.model = retrieval.TwoTowers(dropout=0.0)
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.0)

    def sample(step: int, phase: str) -> Batch:
        if phase != "train":
            return plain(step, phase)
        chosen = torch.randperm(64, generator=seeded(step))[:BATCH]
        return tuple(part[chosen] for part in few)

    t.sample, t.steps = sample, 400


@fault(retrieval, "input-duplicate", then=("loss-plateau", "overfit", "overtraining"))
def loaders_share_a_seed(t: Training) -> None:
    """Four workers draw the same eight pairs, one seed for all: a batch of eight, four times. TrainCheck: data order;
    pytorch/pytorch#5059; speech: facebookresearch/fairseq#1383."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(torch.cat([part[:8]] * 4) for part in batch) if phase == "train" else batch

    t.sample = sample
