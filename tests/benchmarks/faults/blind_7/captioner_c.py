"""What goes wrong in captioners: captions of other pictures, padding, attention, numbers, gates, words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import captioner
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")
BROKEN = (*NONFINITE, *STUCK, "nonfinite-buffer", "loss-spike")


def images(t: Training, change) -> None:
    """Pass pictures through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return change(x, step, phase), *rest

    t.sample = sample


def with_loss(t: Training, term) -> None:
    """The loss is `term(logits, following)`."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = captioner.forward(model, batch)
        return {**tensors, "loss": term(tensors["logits"], batch[2])}

    t.forward = forward


# -- pictures and captions -------------------------------------------------------------------------------------------


@fault(captioner, "metric-constant", step=49, then=("loss-plateau", "overtraining"))
def captioner_shift_forgotten(t: Training) -> None:
    """The decoder is given the caption that it is to write, not the one moved by a place: it copies, and writes nothing right by itself.
    Humbatova: wrong preprocessing; speech: decoders that see their target."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        pictures, _, following = plain(step, phase)
        return pictures, following.clamp(min=captioner.PAD), following

    t.sample = sample


@fault(captioner, "stalled-optimisation", "loss-plateau", step=60, then=(*STUCK, *FITS, "gradient-vanishing"))  # fmt: skip
def captions_five_for_each_picture(t: Training) -> None:
    """There are five captions for a picture, and caption i is given picture i: each belongs to another one. Humbatova: wrong labels;
    TheDeepChecker: labels that do not belong to their inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        pictures, previous, following = plain(step, phase)
        other = torch.randperm(len(pictures), generator=seeded(701, step, len(phase)))
        return pictures, previous[other], following[other]

    t.sample = sample


@fault(captioner, "input-drift", "input-range", step=49, then=(*FITS, *STUCK, "loss-diverged", "activation-exploding"))  # fmt: skip
def captioner_val_pictures_in_bytes(t: Training) -> None:
    """The transform of the validation lacks `ToTensor` and the mean: pictures go in with 0 to 255. Humbatova: wrong preprocessing;
    SageMaker NotNormalizedData."""
    images(t, lambda x, step, phase: (255 * (0.2 * x + 0.3)).round() if phase == "val" else x)


@fault(captioner, "overfit", "input-duplicate", step=1, then=("overtraining", "loss-diverged"))
def captioner_first_forty_pictures(t: Training) -> None:
    """The list of the training was cut to forty pictures to see whether the loop runs, and stays so. SageMaker Overfit; TheDeepChecker:
    overfitting."""
    plain, few = t.sample, captioner.pictures(40, seeded(702))

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        chosen = torch.randperm(40, generator=seeded(703, step))[: captioner.BATCH]
        return tuple(part[chosen] for part in few)

    t.sample = sample


# -- numbers ---------------------------------------------------------------------------------------------------------


@fault(captioner, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=BROKEN)
def captioner_log_of_masked_words(t: Training) -> None:
    """Probabilities are multiplied by the mask of padding, and then the logarithm is taken and masked again: log(0) * 0. GRIST: logarithm
    of zero."""

    def term(logits, following):
        mask = (following >= 0).float()
        likely = logits.softmax(-1).gather(2, following.clamp(min=0)[..., None]).squeeze(2) * mask
        return -(likely.log() * mask).sum() / mask.sum()

    with_loss(t, term)


@fault(captioner, "nonfinite-loss", modules=("",), step=80, then=("loss-diverged",))
def captioner_empty_captions(t: Training) -> None:
    """Each caption's loss is divided by its number of words, and from step 80 on some captions have none, since all their words are
    filtered out. GRIST: division by zero; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        pictures, previous, following = plain(step, phase)
        if phase == "train" and step >= 80:
            following = following.clone()
            following[: 1 + step % 3] = captioner.NOTHING
        return pictures, previous, following

    def term(logits, following):
        losses = F.cross_entropy(logits.mT, following, reduction="none", ignore_index=captioner.NOTHING)
        return (losses.sum(1) / (following >= 0).sum(1)).mean()

    t.sample = sample
    with_loss(t, term)


class OfValidRegions(captioner.Attention):
    """Regions where the picture is one colour are left out."""

    def forward(self, regions, keys, memory):
        scores = self.score(torch.tanh(keys + self.memory(memory)[:, None])).squeeze(2)
        weights = self.softmax(scores.masked_fill(self.empty, -math.inf))
        return (weights[..., None] * regions).sum(1), weights


@fault(captioner, "nonfinite-activation", modules=("decoder.attention.softmax", "decoder.attention"), step=70, then=(*BROKEN, "nonfinite-loss", "input-constant"))  # fmt: skip
def attention_to_a_blank_picture(t: Training) -> None:
    """Regions of one colour are masked with minus infinity; from step 70 on there are blank pictures, with all regions masked, and the
    softmax is 0 / 0. GRIST: division by zero; attention masks."""
    attention = OfValidRegions()
    attention.load_state_dict(t.model.decoder.attention.state_dict())
    t.model.decoder.attention = attention

    def mark(module: Module, args) -> None:
        x = args[0]
        spread = F.max_pool2d(x, 4) + F.max_pool2d(-x, 4)
        attention.empty = (spread.amax(1) < 1e-6).flatten(1)

    t.model.encoder.register_forward_pre_hook(mark)

    def blank(x, step: int, phase: str):
        alive = torch.ones(len(x), 1, 1, 1)
        alive[: int(phase == "train" and step >= 70 and step % 5 == 0)] = 0
        return x * alive

    images(t, blank)


# -- attention, gate, words ------------------------------------------------------------------------------------------


@fault(captioner, "activation-saturated", "gradient-zero", "feature-constant", "parameter-unchanged", modules=("decoder.attention", "decoder.attention.softmax", "decoder.attention.score", "decoder.attention.memory", "decoder.attention.regions"), then=(*FLAT, "module-unused", "update-ratio-low", "loss-plateau", "overtraining", "gradient-imbalance"))  # fmt: skip
def softmax_of_single_scores(t: Training) -> None:
    """Scores are (batch, regions, 1), and their softmax runs over the last axis: each weight is one, whatever the score. Humbatova:
    wrong axis; TheDeepChecker: gradients of zero."""
    attention = t.model.decoder.attention
    attention.softmax = nn.Softmax(2)

    def look(regions, keys, memory):
        weights = attention.softmax(attention.score(torch.tanh(keys + attention.memory(memory)[:, None])))
        return (weights * regions).sum(1), weights.squeeze(2)

    attention.forward = look


@fault(captioner, "activation-saturated", modules=("decoder.attention.softmax", "decoder.attention", "decoder.attention.score"), then=(*DIVERGES, *STUCK, *FLAT, *FITS, "gradient-zero", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def scores_over_a_small_temperature(t: Training) -> None:
    """Scores of the attention are divided by a temperature of 0.002, and all the weight lies on one region from the first step on.
    SageMaker SaturatedActivation; Humbatova: wrong hyper-parameter."""
    t.model.decoder.attention.softmax.register_forward_pre_hook(lambda module, args: (args[0] / 0.002,))


@fault(captioner, "gradient-zero", "module-unused", "parameter-unchanged", modules=("decoder.gate",), then=("update-ratio-low", "gradient-imbalance"))  # fmt: skip
def gate_computed_in_vain(t: Training) -> None:
    """The gate is computed, and the line that multiplies what is seen by it got lost. TrainCheck: parameters that are not updated;
    SageMaker UnchangedTensor."""
    decoder = t.model.decoder

    def step(words, regions, keys, state):
        seen, weights = decoder.attention(regions, keys, state[0])
        torch.sigmoid(decoder.gate(state[0]))
        state = decoder.cell(torch.cat([decoder.words(words), seen], 1), state)
        return decoder.head(decoder.dropout(state[0])), weights, state

    decoder.step = step


@fault(captioner, "poor-initialisation", "activation-saturated", "activation-exploding", modules=("decoder.words", "decoder.cell", "decoder"), then=(*FLAT, *STUCK, *DIVERGES, "update-ratio-low", "gradient-imbalance", "overtraining", "parameter-unchanged", "input-range"))  # fmt: skip
def word_vectors_of_counts(t: Training) -> None:
    """Vectors of words begin as counts of neighbours, with a deviation of 100: the gates of the LSTM are zero or one. SageMaker
    PoorWeightInitialization, SaturatedActivation."""
    nn.init.normal_(t.model.decoder.words.weight, std=100.0)


@fault(captioner, "loss-input-mismatch", modules=("", "decoder", "decoder.head"), then=(*STUCK, *FITS, "activation-saturated", "gradient-vanishing"))  # fmt: skip
def captioner_head_returns_probabilities(t: Training) -> None:
    """The head ends in a softmax, for beam search, and cross entropy makes another one. UMLAUT and Humbatova: wrong loss for the last
    layer."""
    t.model.decoder.head = nn.Sequential(t.model.decoder.head, nn.Softmax(-1))
