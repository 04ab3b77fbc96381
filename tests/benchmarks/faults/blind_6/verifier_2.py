"""What goes wrong in speaker verification: labels, margins, scales, pooling, silence, roots and angles, features."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import verifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")


@fault(verifier, "loss-plateau", "stalled-optimisation", step=50, then=("stalled-from-start",))  # fmt: skip
def lists_sorted_apart(t: Training) -> None:
    """The list of files is sorted by path and that of speakers by name: who speaks is told of another file. Humbatova: wrong labels;
    speech: labels that do not belong to their clips."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return features, speakers[torch.randperm(len(speakers), generator=seeded(521, step, len(phase)))]

    t.sample = sample


@fault(verifier, "class-imbalance", "prediction-collapse", "loss-spike", then=(*DIVERGES, *STUCK, *FLAT, "update-ratio-high", "input-drift", "overtraining"))  # fmt: skip
def one_speaker_at_a_time(t: Training) -> None:
    """Files are read in the order of their folders, without shuffling: a batch is one speaker, and the next ten are as well. TrainCheck:
    data order; Humbatova: wrong preprocessing."""
    plain, (features, speakers) = t.sample, verifier.utterances(2400, seeded(0, 2400))
    folders = [features[speakers == speaker] for speaker in range(verifier.SPEAKERS)]

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        speaker = step // 10 % verifier.SPEAKERS
        folder = folders[speaker]
        chosen = torch.randperm(len(folder), generator=seeded(522, step))[: verifier.BATCH]
        return folder[chosen], torch.full((len(chosen),), speaker)

    t.sample = sample


@fault(verifier, "loss-input-mismatch", modules=("", "classifier"), then=(*STUCK, "gradient-vanishing", "stalled-from-start"))  # fmt: skip
def cosines_without_a_scale(t: Training) -> None:
    """The scale of the margin softmax is one: cosines go into cross entropy as logits, and even perfect ones leave a loss of 2.4.
    Humbatova: wrong loss; TheDeepChecker: loss that does not fall."""
    t.model.classifier.scale = 1.0


@fault(verifier, "nonfinite-gradient", "nonfinite-parameter", modules=("pooling", "frame4", ""), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "metric-constant"))  # fmt: skip
def deviation_of_dropped_channels(t: Training) -> None:
    """Whole channels are dropped in front of the pooling, whose deviation has no floor: it is the root of zero, with an infinite slope.
    GRIST: square root of zero."""
    t.model.frame4.norm = nn.Sequential(t.model.frame4.norm, nn.Dropout1d(0.1))
    t.model.pooling.forward = lambda x: torch.cat([x.mean(2), x.var(2, correction=0).sqrt()], 1)


@fault(verifier, "nonfinite-activation", modules=("pooling",), step=100, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "feature-constant", "metric-constant", "audio-length"))  # fmt: skip
def deviation_of_one_frame(t: Training) -> None:
    """The deviation divides by the frames less one, and from step 100 on batches of clips that a detector of speech has cut to one frame
    come in between. GRIST: division by zero."""
    t.model.pooling.forward = lambda x: torch.cat([x.mean(2), x.var(2).clamp(min=1e-5).sqrt()], 1)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        short = phase == "train" and step >= 100 and step % 10 == 0
        return features[:, :1] if short else features, speakers

    t.sample = sample


@fault(verifier, "nonfinite-loss", "loss-diverged", "nonfinite-gradient", modules=("", "norm", "embedding"), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "metric-constant", "loss-spike"))  # fmt: skip
def angle_to_itself(t: Training) -> None:
    """A term spreads utterances by their angles, and takes the arccosine of each with itself too: 1.0000001 has none, and 1 an infinite
    slope. GRIST: arccosine out of its range."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = verifier.forward(model, batch)
        unit = F.normalize(tensors["embeddings"])
        angles = (unit @ unit.T).acos()
        return {**tensors, "loss": tensors["loss"] - 0.01 * angles.mean()}

    t.forward = forward


@fault(verifier, "nonfinite-loss", "loss-diverged", modules=("",), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "metric-constant", "loss-spike"))  # fmt: skip
def margin_softmax_by_hand(t: Training) -> None:
    """The formula of the paper, a quotient of exponentials, at a scale of 128: the exponential of 89 is Inf. GRIST: overflow of exp."""
    t.model.classifier.scale = 128.0

    def forward(model: Module, batch: Batch) -> Tensors:
        embeddings, logits = model(*batch)
        likely = logits.exp() / logits.exp().sum(1, keepdim=True)
        loss = -likely.gather(1, batch[1][:, None]).log().mean()
        return {"loss": loss, "logits": logits, "targets": batch[1], "embeddings": embeddings}

    t.forward = forward


@fault(verifier, "update-ratio-high", "gradient-exploding", "weight-norm-drift", "activation-exploding", then=(*DIVERGES, *STUCK, "gradient-imbalance", "dead-units", "activation-saturated", "feature-constant"))  # fmt: skip
def scale_of_a_thousand(t: Training) -> None:
    """The inverse of a temperature of 0.001 as a scale: the softmax is one or zero, and the loss in the hundreds. Humbatova: wrong loss;
    TheDeepChecker: loss at the start."""
    t.model.classifier.scale = 1000.0


@fault(verifier, "input-constant", "audio-silent", "input-duplicate", then=(*STUCK, *FLAT, "norm-input-variance", "loss-spike"))  # fmt: skip
def cut_from_silence(t: Training) -> None:
    """Segments are cut by times of the original recordings from files that were shortened: two in three lie behind the end, and are
    filled with zeros. Speech: silent segments; TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        inside = torch.rand(len(features), 1, 1, generator=seeded(523, step, len(phase))) < 1 / 3
        return features * inside, speakers

    t.sample = sample


@fault(verifier, "input-constant", "feature-constant", "norm-input-variance", "activation-vanishing", "input-duplicate", modules=("", "frame1", "frame2", "frame3", "frame4", "pooling"), then=(*DIVERGES, *STUCK, *FLAT, "parameter-unchanged", "update-ratio-low", "gradient-imbalance", "dead-units", "gradient-zero", "gradient-vanishing", "class-imbalance", "audio-silent"))  # fmt: skip
def mean_of_a_window_of_one(t: Training) -> None:
    """The sliding mean that is taken out of each frame has a window of one frame, as the setting is in seconds and is read as frames: what
    is left is zero. TheDeepChecker: constant inputs; SageMaker AllZero."""
    plain, window = t.sample, 1

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        mean = F.avg_pool1d(features.transpose(1, 2), window, 1).transpose(1, 2)
        return features - mean, speakers

    t.sample = sample


@fault(verifier, "input-range", "activation-exploding", modules=("", "frame1", "frame1.conv"), then=(*DIVERGES, *STUCK, *FLAT, *FITS, "gradient-imbalance", "dead-units", "parameter-unchanged", "update-ratio-low", "dtype-headroom"))  # fmt: skip
def filterbanks_without_their_logarithm(t: Training) -> None:
    """Energies of a filterbank go in as they are, and not as decibels: from 1e-3 to 1e9. Speech: scale of features; SageMaker
    NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return (2 * features + 7).exp(), speakers

    t.sample = sample


@fault(verifier, "norm-input-variance", "activation-vanishing", "input-range", modules=("", "frame1", "frame1.norm", "frame1.conv", "frame2.norm"), then=(*STUCK, *FLAT, *FITS, "update-ratio-low", "gradient-imbalance", "poor-initialisation", "weight-norm-drift", "update-ratio-high"))  # fmt: skip
def divided_by_full_scale_again(t: Training) -> None:
    """Features of samples that the reader had brought to [-1, 1] are divided by 32768 once more, in layers without biases: a variance
    far below that which BatchNorm adds. Speech: scale of samples; Humbatova: wrong preprocessing."""
    plain = t.sample
    for layer in (t.model.frame1, t.model.frame2, t.model.frame3, t.model.frame4):
        layer.conv.bias = None

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return features / 32768, speakers

    t.sample = sample


@fault(verifier, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "frame1", "frame1.conv"), step=70, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "nonfinite-loss", "feature-constant"))  # fmt: skip
def variance_of_digital_silence(t: Training) -> None:
    """Mean and deviation of each utterance are taken out, and from step 70 on one in thirty is digital silence: 0 / 0. GRIST: division by
    zero; speech: silent segments."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train" and step >= 70:
            features = features * (torch.rand(len(features), 1, 1, generator=seeded(524, step)) > 1 / 30)
        return (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True), speakers

    t.sample = sample


@fault(verifier, "gradient-zero", "parameter-unchanged", modules=("embedding", "norm", "frame1", "frame2", "frame3", "frame4", ""), then=("module-unused", "loss-plateau", "stalled-optimisation", "optimizer-owns-others"))  # fmt: skip
def embeddings_detached(t: Training) -> None:
    """Embeddings are detached for the table of scores, in the same line in which they are given to the classifier: it alone is trained.
    TrainCheck: a part without gradients; SageMaker UnchangedTensor."""
    embed = t.model.embed
    t.model.embed = lambda features: embed(features).detach()


@fault(verifier, "optimizer-misses-parameters", "parameter-unchanged", modules=("classifier",), then=("optimizer-owns-others", "gradient-accumulation", "gradient-imbalance"))  # fmt: skip
def weights_of_the_loss_left_out(t: Training) -> None:
    """The weights of all speakers belong to the loss, and the optimizer is built from the network only. TrainCheck: parameters that no
    optimizer holds."""
    network = [p for name, p in t.model.named_parameters() if not name.startswith("classifier")]
    t.optimizers = [torch.optim.SGD(network, 0.02, 0.9)]


@fault(verifier, "loss-input-mismatch", modules=("", "classifier"), then=(*STUCK, "activation-saturated", "gradient-vanishing"))  # fmt: skip
def posteriors_into_cross_entropy(t: Training) -> None:
    """The classifier returns posteriors, for calibration, and cross entropy takes them for logits. UMLAUT and Humbatova: wrong loss for
    the last layer."""
    t.model.classifier.register_forward_hook(lambda module, args, logits: logits.softmax(1))


@fault(verifier, "loss-input-mismatch", modules=("", "classifier", "embedding", "norm"), then=(*STUCK, *FLAT, "loss-sign"))  # fmt: skip
def likelihood_without_a_softmax(t: Training) -> None:
    """`nll_loss` of scaled cosines, without `log_softmax`: each is pulled to its speaker's weight, and nothing is pushed away:
    the loss is -8. Humbatova: wrong loss for the last layer; UMLAUT."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = verifier.forward(model, batch)
        return {**tensors, "loss": F.nll_loss(tensors["logits"], batch[1])}

    t.forward = forward


@fault(verifier, "dead-units", "feature-constant", "norm-input-variance", "gradient-zero", "poor-initialisation", "parameter-unchanged", modules=("frame2", "frame2.conv", "frame2.activation", "frame2.norm", "frame1"), then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "update-ratio-low", "module-unused", "gradient-vanishing", "class-imbalance", "output-constant"))  # fmt: skip
def biases_of_minus_twenty(t: Training) -> None:
    """Biases of the second layer are read from a table in decibels: -20, below what any frame can make up for. SageMaker DeadRelu;
    TheDeepChecker: dead units."""
    nn.init.constant_(t.model.frame2.conv.bias, -20.0)


@fault(verifier, "units-symmetric", "poor-initialisation", modules=("frame1", "frame2", "frame3", "frame4", "frame1.conv", "frame2.conv", "frame3.conv", "frame4.conv"), then=(*STUCK, *FLAT, "feature-constant", "gradient-imbalance"))  # fmt: skip
def convolutions_filled_with_one_number(t: Training) -> None:
    """All convolutions are filled with 0.02 by a line of a test: each layer has one channel, 32 times. TheDeepChecker: symmetric units;
    Humbatova: wrong weights initialisation."""
    for layer in (t.model.frame1, t.model.frame2, t.model.frame3, t.model.frame4):
        nn.init.constant_(layer.conv.weight, 0.02)
        nn.init.zeros_(layer.conv.bias)


@fault(verifier, "activation-exploding", "poor-initialisation", modules=("frame1", "frame2", "frame3", "frame4", "embedding", "frame1.conv", "frame2.conv", "frame3.conv", "frame4.conv"), then=(*DIVERGES, *STUCK, "dead-units", "gradient-imbalance", "dtype-headroom"))  # fmt: skip
def deviation_of_each_tap(t: Training) -> None:
    """`std = sqrt(2 / kernel)`, without the channels, in layers that are not normalised: each multiplies the signal by five. SageMaker
    PoorWeightInitialization, ExplodingTensor."""
    t.model = verifier.Verifier(norm=lambda channels: nn.Identity())
    for layer in (t.model.frame1, t.model.frame2, t.model.frame3, t.model.frame4):
        nn.init.normal_(layer.conv.weight, std=math.sqrt(2 / layer.conv.kernel_size[0]))
