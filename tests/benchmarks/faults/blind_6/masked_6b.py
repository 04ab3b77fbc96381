"""What goes wrong in pre-training: numbers, first weights, heads, frames and their scale, batches, metrics."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults import masked
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update


def compared(t: Training, loss_of) -> None:
    """Use `loss_of(outputs, frames, hidden)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch)
        return {"loss": loss_of(outputs, *batch), "outputs": outputs, "targets": batch[0]}

    t.forward = forward


def changed(t: Training, change) -> None:
    """Pass frames through `change(frames, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, hidden = plain(step, phase)
        return change(frames, step, phase), hidden

    t.sample = sample


# -- numbers ---------------------------------------------------------------------------------------------------------


class Padded(masked.Attention):
    """Silent frames are taken for padding."""

    padding = None

    def forward(self, x):
        q, k, v = (
            part(x).unflatten(-1, (masked.HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        scores = (q @ k.mT / math.sqrt(masked.WIDTH // masked.HEADS)).masked_fill(self.padding, -math.inf)
        return self.out((self.softmax(scores) @ v).transpose(1, 2).flatten(2))


class WithPadding(masked.Pretrained):
    def forward(self, frames, hidden):
        for block in self.blocks:
            block.attention.padding = (frames == 0).all(-1)[:, None, None]
        return super().forward(frames, hidden)


@fault(masked, "nonfinite-activation", modules=("blocks.0.attention", "blocks.0"), step=100, then=(*NONFINITE, "metric-constant"))  # fmt: skip
def track_of_padding_only(t: Training) -> None:
    """Frames of zeros are padding, masked by -inf; at step 100 a track has no other frames, and its softmax is 0 / 0. GRIST: division
    by zero."""
    t.model = WithPadding()
    for block in t.model.blocks:
        block.attention = Padded()

    def cut(frames, step, phase):
        frames = frames.clone()
        frames[::3, 24:] = 0.0
        if phase == "train" and step == 100:
            frames[7] = 0.0
        return frames

    changed(t, cut)


@fault(masked, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "project"), step=60, then=(*NONFINITE, "metric-constant"))  # fmt: skip
def silence_standardised(t: Training) -> None:
    """Each track is standardised by its own mean and deviation, without an epsilon; at step 60 one is silent. GRIST: division by
    zero; speech: normalisation of utterances."""

    def standardise(frames, step, phase):
        frames = frames.clone()
        if phase == "train" and step == 60:
            frames[4] = 0.0
        return (frames - frames.mean(1, keepdim=True)) / frames.std(1, keepdim=True)

    changed(t, standardise)


@fault(masked, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "project"), step=40, then=(*NONFINITE, "metric-constant", "input-range"))  # fmt: skip
def logarithm_of_energies(t: Training) -> None:
    """Frames are logarithms of energies; from step 40 on some recordings have digital silence in them: log(0). GRIST: logarithm of
    zero."""

    def logarithms(frames, step, phase):
        energies = frames.exp()
        if phase == "train" and step >= 40:
            energies[::5, 10:12] = 0.0
        return energies.log()

    changed(t, logarithms)


@fault(masked, "nonfinite-gradient", "nonfinite-parameter", modules=("head", ""), then=NONFINITE)
def root_of_frames_not_asked(t: Training) -> None:
    """The distance of each frame by hand, `square().sum(-1).sqrt()`, of differences that are zeroed where nothing is hidden: the
    root's slope is infinite there. GRIST: square root of zero."""

    def distance(outputs, frames, hidden):
        rest = (outputs - frames) * hidden[..., None]
        return rest.square().sum(-1).sqrt().sum() / hidden.sum()

    compared(t, distance)


@fault(masked, "nonfinite-loss", modules=("",), then=(*NONFINITE, "loss-plateau"))
def similarities_exponentiated(t: Training) -> None:
    """A contrastive loss by hand, `exp(similarity / 0.005)` divided by its sum: exp overflows at a similarity of 0.45. GRIST: overflow
    of exp."""

    def contrast(outputs, frames, hidden):
        similar = F.normalize(outputs[hidden]) @ F.normalize(frames[hidden]).T
        scores = (similar / 0.005).exp()
        return -(scores.diagonal() / scores.sum(1)).log().mean()

    compared(t, contrast)


# -- first weights and heads -----------------------------------------------------------------------------------------


@fault(masked, "units-symmetric", "poor-initialisation", modules=("blocks.0.mlp", "blocks.1.mlp"), then=("feature-constant", "gradient-imbalance", "overtraining"))  # fmt: skip
def mlps_alike(t: Training) -> None:
    """`nn.init.constant_(p, 0.02)` for the MLPs: their 64 units begin alike and stay so. TheDeepChecker: symmetric units; SageMaker
    PoorWeightInitialization."""
    for block in t.model.blocks:
        for parameter in block.mlp.parameters():
            nn.init.constant_(parameter, 0.02)


@fault(masked, "activation-saturated", "poor-initialisation", modules=("blocks.0.attention", "blocks.1.attention"), then=("gradient-vanishing", "gradient-imbalance", "gradient-clipping", "activation-exploding", "update-ratio-low", "gradient-zero"))  # fmt: skip
def queries_of_deviation_three(t: Training) -> None:
    """`nn.init.normal_(weight, std=3)` for queries and keys, where `3 / width` is meant: each softmax has one winner. SageMaker
    SaturatedActivation and PoorWeightInitialization."""
    for block in t.model.blocks:
        nn.init.normal_(block.attention.query.weight, std=3.0)
        nn.init.normal_(block.attention.key.weight, std=3.0)


@fault(masked, "attention-head-dead", "dead-units", "feature-constant", modules=("blocks.0.attention", "blocks.1.attention"), then=("gradient-zero", "poor-initialisation", "units-symmetric"))  # fmt: skip
def heads_of_a_smaller_checkpoint(t: Training) -> None:
    """Weights come from a model with two heads and are filled up with zeros: values of the other two are zero, and what reads them as
    well, so that neither gets a gradient. SageMaker AllZero; TheDeepChecker: zero weights."""
    half = masked.WIDTH // 2
    with torch.no_grad():
        for block in t.model.blocks:
            for parameter in block.attention.value.parameters():
                parameter[half:] = 0.0
            block.attention.out.weight[:, half:] = 0.0


@fault(masked, "dead-units", "poor-initialisation", modules=("blocks.0.mlp", "blocks.1.mlp", "blocks.1", "blocks.0"), then=(*FLAT, "gradient-zero", "parameter-unchanged", "units-symmetric", "module-unused"))  # fmt: skip
def biases_of_minus_eight(t: Training) -> None:
    """With ReLU, and biases of -8 in the first layer of each MLP, as for a sparse start: no unit ever opens. SageMaker DeadRelu;
    TheDeepChecker."""
    t.model = masked.Pretrained(activation=nn.ReLU)
    for block in t.model.blocks:
        nn.init.constant_(block.mlp[0].bias, -8.0)


@fault(masked, "poor-initialisation", "activation-exploding", "gradient-exploding", "gradient-clipping", modules=("head",), then=(*DIVERGES, *STUCK, "update-ratio-low", "gradient-imbalance"))  # fmt: skip
def head_of_deviation_fifty(t: Training) -> None:
    """`init_std: 50` of a configuration that counts in thousandths is taken as it is for the head: outputs of hundreds where frames
    are about 1. SageMaker PoorWeightInitialization and ExplodingTensor."""
    nn.init.normal_(t.model.head.weight, std=50.0)


# -- frames ----------------------------------------------------------------------------------------------------------


@fault(masked, "input-range", "gradient-clipping", "gradient-exploding", "activation-exploding", modules=("", "project", "head"), then=(*STUCK, *DIVERGES, "gradient-imbalance", "poor-initialisation"))  # fmt: skip
def frames_in_decibels(t: Training) -> None:
    """Frames are decibels from -140 to -20 and not standardised, as input and as target: the loss begins at thousands, and clipping is
    all that there is. UMLAUT and Humbatova: data that are not normalised; speech: dB scale."""
    changed(t, lambda frames, step, phase: 20 * frames - 80)


@fault(masked, "input-drift", step=49, then=("overfit", "overtraining", "metric-range"))
def validation_not_standardised(t: Training) -> None:
    """Mean and deviation are applied to training tracks only: validation has a mean of 12 and a deviation of 4. Humbatova: wrong
    preprocessing."""
    changed(t, lambda frames, step, phase: 4 * frames + 12 if phase == "val" else frames)


@fault(masked, "input-duplicate", then=("feature-constant", "overfit", "overtraining", "loss-plateau", "input-drift"))
def batch_of_one_track(t: Training) -> None:
    """`index // BATCH` where `index % len(data)` is meant: all items of a batch are one and the same track. TrainCheck: duplicated
    data; TheDeepChecker: duplicated inputs."""
    changed(t, lambda frames, step, phase: frames[:1].expand_as(frames).clone() if phase == "train" else frames)


@fault(masked, "overfit", "overtraining", "input-duplicate", step=1, then=("input-drift", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def iterator_made_anew(t: Training) -> None:
    """`next(iter(loader))` in each step, with a generator of a fixed seed: the first batch for ever, with the same frames hidden.
    TrainCheck: duplicated data; SageMaker Overfit."""
    plain = t.sample
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


@fault(masked, "input-constant", "input-duplicate", step=80, then=(*STUCK, *FLAT, "gradient-zero", "loss-spike", "input-drift", "overfit", "overtraining", "loss-diverged", "metric-range"))  # fmt: skip
def shards_of_zeros(t: Training) -> None:
    """From step 80 on shards are read that a full disk has left as zeros. TheDeepChecker: constant inputs; SageMaker AllZero."""
    changed(t, lambda frames, step, phase: frames * (phase == "val" or step < 80))


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(masked, "metric-nonfinite", "input-drift", step=49, then=("nonfinite-loss", "metric-constant"))
def nothing_hidden_in_validation(t: Training) -> None:
    """Spans are hidden in training only; in validation the mean over hidden frames is one over nothing: NaN. GRIST: division by zero;
    Humbatova: wrong metrics."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, hidden = plain(step, phase)
        return frames, hidden & (phase == "train")

    t.sample = sample
    t.measure = lambda tensors, batch: {"mae": float((tensors["outputs"] - batch[0])[batch[1]].abs().mean())}


@fault(masked, "metric-phase-mismatch", "metric-unexpected", "metric-missing", step=49)
def two_names_of_one_error(t: Training) -> None:
    """Training reports `masked_mae`, validation `mae`: neither has a curve in the other phase. speech: metrics with another name in
    validation."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        error = masked.measure({name: value.detach() for name, value in tensors.items()}, batch)["mae"]
        observer.log({"loss": float(tensors["loss"].detach()), "masked_mae": error}, "train", step)
        return batch, tensors

    t.update = update


@fault(masked, "metric-range", step=49)
def accuracy_summed(t: Training) -> None:
    """An accuracy of signs, summed over the frames of a batch and not divided by their number: hundreds. Humbatova: wrong metrics."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        frames, hidden = batch
        right = (tensors["outputs"][hidden] > 0) == (frames[hidden] > 0)
        return {**plain(tensors, batch), "accuracy": float(right.float().mean(1).sum())}

    t.measure = measure


@fault(masked, "parameter-unchanged", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "precision-loss", "dtype-headroom"))  # fmt: skip
def sixteen_bit_weights(t: Training) -> None:
    """`model.bfloat16()` with a rate of 2e-6 and no copy in float32: a step is far below the eight bits of a weight, and is lost.
    TrainCheck: mistakes of dtype."""
    t.model.bfloat16()
    t.optimize, t.schedule = (lambda p: torch.optim.AdamW(p, 2e-6, weight_decay=0.0)), None

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0].bfloat16(), batch[1]).float()
        hidden = batch[1]
        return {"loss": F.mse_loss(outputs[hidden], batch[0][hidden]), "outputs": outputs, "targets": batch[0]}

    t.forward = forward
