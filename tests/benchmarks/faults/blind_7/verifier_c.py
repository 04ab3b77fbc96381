"""What goes wrong in speaker verification: variances, rare speakers, noise, order of calls, losses of certain answers, wrong axes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import verifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, clipped_before_unscaling_update, seeded

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")
BROKEN = (*NONFINITE, *STUCK, "nonfinite-buffer", "loss-spike", "feature-constant")


def with_loss(t: Training, term) -> None:
    """The loss is `term(logits, speakers)`."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = verifier.forward(model, batch)
        return {**tensors, "loss": term(tensors["logits"], batch[1])}

    t.forward = forward


@fault(verifier, "nonfinite-activation", modules=("pooling",), step=2, then=(*BROKEN, "nonfinite-loss", "norm-input-variance"))  # fmt: skip
def verifier_mean_of_squares_less_squared_mean(t: Training) -> None:
    """The variance is the mean of squares less the square of the mean, without a floor: channels that are silent throughout come out a
    little below zero. GRIST: square root of negative numbers."""
    t.model.pooling.forward = lambda x: torch.cat([x.mean(2), (x.square().mean(2) - x.mean(2).square()).sqrt()], 1)


@fault(verifier, "class-imbalance", "prediction-collapse", then=(*STUCK, *FITS, "input-drift", "input-duplicate"))
def verifier_one_speaker_with_most_files(t: Training) -> None:
    """Files are drawn by chance, and 97 of 100 are of one reader of audio books. SageMaker ClassImbalance; Humbatova: unbalanced
    data."""
    plain, (features, speakers) = t.sample, verifier.utterances(2400, seeded(0, 2400))
    weights = torch.where(speakers == 5, 0.97 / (speakers == 5).sum(), 0.03 / (speakers != 5).sum())

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.multinomial(weights, verifier.BATCH, replacement=True, generator=seeded(731, step, len(phase)))
        return features[chosen], speakers[chosen]

    t.sample = lambda step, phase: sample(step, phase) if phase == "train" else plain(step, phase)


@fault(verifier, "input-drift", "input-range", then=(*STUCK, *FITS, "loss-diverged", "metric-constant", "class-imbalance", "activation-exploding", "gradient-imbalance"))  # fmt: skip
def verifier_noise_with_the_signs_of_its_level(t: Training) -> None:
    """Noise for the training is added at `10 ** (snr / 10)` with an SNR of 5 to 20 dB: the sign is wrong, and it is up to a hundred times
    louder than what is said. Speech: noise augmentation; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train":
            made = seeded(732, step)
            snr = 5 + 15 * torch.rand(len(features), 1, 1, generator=made)
            features = features + 10 ** (snr / 10) * torch.randn(features.shape, generator=made)
        return features, speakers

    t.sample = sample


@fault(verifier, "gradient-zero", "parameter-unchanged", "stalled-optimisation", "step-skipped", then=(*STUCK, "module-unused", "update-ratio-low"))  # fmt: skip
def verifier_zeroed_before_the_step(t: Training) -> None:
    """`zero_grad()` stands between `backward()` and `step()`: no step ever sees a gradient. TrainCheck: misplaced `zero_grad`; SageMaker
    UnchangedTensor."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(verifier, "gradient-exploding", "gradient-imbalance", "feature-constant", "activation-vanishing", "poor-initialisation", "update-ratio-high", modules=("norm", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-zero", "gradient-clipping", "nonfinite-buffer", "parameter-unchanged"))  # fmt: skip
def verifier_last_gain_of_zero(t: Training) -> None:
    """Gains of zero, a recipe for the last norm of a residual block, are given to that of the embeddings: all are zero, and the slope of
    their direction is 1e12. Humbatova: weights initialisation; SageMaker AllZero."""
    nn.init.zeros_(t.model.norm.weight)


@fault(verifier, "nonfinite-gradient", modules=("", "classifier"), step=35, then=(*BROKEN, "nonfinite-loss", "nonfinite-activation", "update-ratio-high", "weight-norm-drift"))  # fmt: skip
def verifier_focal_root_of_certainty(t: Training) -> None:
    """A focal loss with an exponent of a half, at a scale of 60: where the answer is certain `1 - p` is zero, and its root has an infinite
    slope. GRIST: square root of zero."""
    t.model.classifier.scale = 60.0

    def term(logits, speakers):
        likely = logits.softmax(1).gather(1, speakers[:, None]).squeeze(1)
        return ((1 - likely) ** 0.5 * F.cross_entropy(logits, speakers, reduction="none")).mean()

    with_loss(t, term)


@fault(
    verifier,
    "gradient-clipping",
    "update-ratio-low",
    then=(*STUCK, "stalled-optimisation", "loss-plateau", "parameter-unchanged", "gradient-exploding"),
)
def verifier_clipped_while_scaled(t: Training) -> None:
    """With a gradient scaler, and clipped before `unscale_`: of gradients 65536 times too large next to nothing is left. TrainCheck: scaler
    misuse."""
    t.scaled, t.update = True, clipped_before_unscaling_update


@fault(verifier, "feature-constant", "norm-input-variance", "output-constant", "batch-leak", "activation-vanishing", modules=("pooling", "embedding", "norm", ""), then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "update-ratio-low", "gradient-imbalance", "parameter-unchanged"))  # fmt: skip
def verifier_mean_over_the_batch(t: Training) -> None:
    """The pooling takes mean and deviation over axis 0, and then over time: each utterance gets those of the whole batch. Humbatova: wrong
    axis."""
    pool = t.model.pooling.forward
    t.model.pooling.forward = lambda x: pool(x.mean(0, keepdim=True).expand_as(x))


@fault(verifier, "optimizer-frozen-parameters", "parameter-unchanged", modules=("frame1", "frame2", "frame3"), then=("gradient-zero", "update-ratio-low", "overtraining"))  # fmt: skip
def verifier_thawed_by_a_wrong_name(t: Training) -> None:
    """All is frozen and then thawed by names, and the filter looks for "frame4": three layers stay as they were drawn. TrainCheck:
    parameters that are not updated."""
    t.optimizers = [t.optimize(t.model.parameters())]
    for name, parameter in t.model.named_parameters():
        parameter.requires_grad_(not name.startswith(("frame1", "frame2", "frame3")))


@fault(verifier, "input-range", "activation-saturated", modules=("", "frame1", "frame1.activation", "frame1.conv"), then=(*DIVERGES, *STUCK, *FITS, *FLAT, "poor-initialisation", "gradient-zero", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def verifier_features_as_whole_numbers(t: Training) -> None:
    """Features are stored in 16 bits and nobody scales them back, in front of layers of tanh: all units of the first are at their ends.
    SageMaker SaturatedActivation, NotNormalizedData."""
    t.model = verifier.Verifier(activation=nn.Tanh)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return (1000 * features).round(), speakers

    t.sample = sample


@fault(verifier, "nonfinite-optimizer", "nonfinite-parameter", "scheduler-ends-early", step=200, then=(*BROKEN, "nonfinite-activation", "schedule-unfinished"))  # fmt: skip
def verifier_polynomial_past_its_end(t: Training) -> None:
    """A rate of `(1 - step / 200) ** 0.9`, in arrays, for a run of 250 steps: a power of a negative number is NaN, and so is the rate.
    GRIST: power of negative numbers; Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: float((1 - torch.tensor(step / 200)) ** 0.9))


@fault(verifier, "dropout-high", modules=("embedding", ""), then=(*STUCK, "loss-spike"))
def verifier_keeps_a_twentieth(t: Training) -> None:
    """`Dropout(0.95)` in front of the embedding, where 0.95 was the share to keep. Humbatova: regularisation; TheDeepChecker:
    dropout."""
    t.model.embedding = nn.Sequential(nn.Dropout(0.95), t.model.embedding)


@fault(verifier, "update-ratio-high", "weight-norm-drift", then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "activation-saturated", "parameter-unchanged", "update-ratio-low", "gradient-imbalance"))  # fmt: skip
def verifier_loss_as_a_sum(t: Training) -> None:
    """`reduction="sum"`, with the rate for a mean: steps are 48 times too large. TheDeepChecker: missing reduction; SageMaker
    WeightUpdateRatio."""
    with_loss(t, lambda logits, speakers: F.cross_entropy(logits, speakers, reduction="sum"))


@fault(verifier, "parameter-unchanged", "update-ratio-low", modules=("frame1", "frame2", "frame3", "frame4"), then=("optimizer-frozen-parameters", "loss-plateau", "overtraining"))  # fmt: skip
def verifier_factor_of_the_network_is_zero(t: Training) -> None:
    """The frame layers are given their rate times a factor for fine-tuning, which is 0 for what is not pretrained. TrainCheck: parameters
    that are not updated; Humbatova: learning rate."""
    frames = [p for name, p in t.model.named_parameters() if name.startswith("frame")]
    rest = [p for name, p in t.model.named_parameters() if not name.startswith("frame")]
    t.optimizers = [torch.optim.SGD([{"params": frames, "lr": 0.02 * 0}, {"params": rest}], 0.02, 0.9)]


@fault(verifier, "input-drift", "input-range", then=(*DIVERGES, *STUCK, *FITS, "gradient-imbalance", "metric-constant", "dead-units"))  # fmt: skip
def verifier_masks_filled_with_the_floor(t: Training) -> None:
    """Frames are masked in training with -100, the floor of the decibels, behind the step that takes out mean and spread. Speech: masks of
    features; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train":
            start = torch.randint(verifier.FRAMES - 8, (len(features), 1, 1), generator=seeded(733, step))
            place = torch.arange(verifier.FRAMES)[:, None]
            features = features.masked_fill((place >= start) & (place < start + 8), -100.0)
        return features, speakers

    t.sample = sample


@fault(verifier, "loss-sign", then=(*DIVERGES, *STUCK, "overfit", "overtraining", "loss-input-mismatch"))
def verifier_likelihood_without_a_minus(t: Training) -> None:
    """The mean logarithm of the right speaker's share is minimised, without the minus in front: the right one is what is never said.
    TheDeepChecker: wrong sign of the loss; Humbatova: wrong loss."""
    with_loss(t, lambda logits, speakers: logits.log_softmax(1).gather(1, speakers[:, None]).mean())
