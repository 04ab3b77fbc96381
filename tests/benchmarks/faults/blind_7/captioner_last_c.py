"""The last of what goes wrong in captioners: entropies, likelihoods, modes, missing metrics, rare words, scales of weights, copies."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import captioner
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded, update_of_two

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")
BROKEN = (*NONFINITE, *STUCK, "nonfinite-buffer", "loss-spike")


@fault(captioner, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=BROKEN)
def entropy_of_masked_regions(t: Training) -> None:
    """The four corners are masked in the attention, and the entropy of its weights is `p * log(p)` by hand: 0 * log(0). GRIST: logarithm
    of zero."""
    corners = torch.zeros(16, dtype=torch.bool)
    corners[[0, 3, 12, 15]] = True
    t.model.decoder.attention.softmax.register_forward_pre_hook(
        lambda module, args: (args[0].masked_fill(corners, -math.inf),)
    )

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors, (logits, looks) = captioner.forward(model, batch), model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), ignore_index=captioner.NOTHING)
        return {**tensors, "loss": loss - 0.01 * (looks * looks.log()).sum(2).mean(), "logits": logits}

    t.forward = forward


@fault(captioner, "loss-input-mismatch", modules=("", "decoder", "decoder.head"), then=(*DIVERGES, *STUCK, *FITS, "loss-sign", "activation-saturated"))  # fmt: skip
def captioner_likelihood_of_raw_scores(t: Training) -> None:
    """`nll_loss` of the head's scores, without `log_softmax`: the loss has no lowest value, and scores grow without end. Humbatova: wrong
    loss for the last layer; UMLAUT."""

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = captioner.forward(model, batch)
        loss = F.nll_loss(tensors["logits"].flatten(0, 1), batch[2].flatten(), ignore_index=captioner.NOTHING)
        return {**tensors, "loss": loss}

    t.forward = forward


@fault(captioner, "model-in-eval", step=20, then=(*FITS, "watch-starved", "probe-read-nothing"))
def samples_written_in_eval_mode(t: Training) -> None:
    """At step 20 some captions are written for the log, in eval mode, and nothing turns it back. TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 20)
        return plain_update(training, step, observer)

    t.update = update


@fault(captioner, "metric-vanished", step=149, then=("metric-missing", "metric-type", "metric-always-none"))
def captioner_scores_nothing_later(t: Training) -> None:
    """The file of captions that are compared grows too large for the tool that scores them; its exception is caught, and None is the score
    from then on. Speech: metrics that are missing in validation."""
    plain, count = t.measure, [0]

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        count[0] += 1
        metrics = plain(tensors, batch)
        return metrics if count[0] <= 4 else {**metrics, "exact": None}

    t.measure = measure


@fault(captioner, "class-imbalance", "input-drift", then=(*STUCK, *FITS, "input-duplicate"))
def captioner_mostly_alone_and_red(t: Training) -> None:
    """The pictures of the training are those of a shop, red squares alone in 98 of 100; the validation has all kinds. SageMaker
    ClassImbalance; Humbatova: unbalanced data."""
    plain, (pictures, previous, following) = t.sample, captioner.pictures(12000, seeded(0, 12000))
    usual = ((following[:, 0] == 5) & (following[:, 1] == 10) & (following[:, 2] == captioner.END)).float()
    weights = 0.98 * usual / usual.sum() + 0.02 * (1 - usual) / (1 - usual).sum()

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        chosen = torch.multinomial(weights, captioner.BATCH, generator=seeded(751, step))
        return pictures[chosen], previous[chosen], following[chosen]

    t.sample = sample


@fault(captioner, "optimizer-duplicate-parameters", modules=("encoder", ""), then=("update-ratio-high",))
def captioner_encoder_in_both_optimizers(t: Training) -> None:
    """The decoder's optimizer is built from `model.parameters()`, which are those of the encoder too: two steps for it each time.
    TrainCheck: parameters in two optimizers."""
    t.optimizers = [torch.optim.Adam(part.parameters(), 4e-3) for part in (t.model, t.model.encoder)]
    t.update = update_of_two


@fault(captioner, "parameter-changed", modules=("encoder",), step=80, then=("weight-decay-on-norms", "optimizer-frozen-parameters", "weight-norm-drift", "gradient-zero", "update-ratio-low"))  # fmt: skip
def encoder_frozen_but_decayed(t: Training) -> None:
    """The encoder is frozen from step 80 on, with gradients of zero and not None: AdamW's moments and its decay go on. TrainCheck: frozen
    parameters that change."""
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.1)

    def freeze(training: Training, step: int) -> None:
        if step == 80:
            for parameter in training.model.encoder.parameters():
                parameter.requires_grad_(False)
                parameter.grad = torch.zeros_like(parameter)
            training.optimizer.zero_grad = lambda: [
                p.grad.zero_() for p in training.model.parameters() if p.grad is not None
            ]

    t.before.append(freeze)


@fault(captioner, "poor-initialisation", "activation-vanishing", "feature-constant", modules=("encoder.conv1", "encoder.conv2", "encoder.conv3", "encoder"), then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "dead-units", "update-ratio-high"))  # fmt: skip
def captioner_deviation_of_a_large_model(t: Training) -> None:
    """`std=0.001`, from a model a hundred times as wide, in an encoder without norms: each layer divides the signal by about a hundred, and
    regions differ by their places only. SageMaker PoorWeightInitialization; AutoTrainer: vanishing gradient."""
    t.model = captioner.Captioner(norm=lambda width: nn.Identity(), activation=nn.LeakyReLU)
    for conv in (t.model.encoder.conv1, t.model.encoder.conv2, t.model.encoder.conv3):
        nn.init.normal_(conv.weight, std=0.001)


@fault(captioner, "scheduler-ends-early", then=("schedule-unfinished", "loss-spike"))
def captioner_cosine_of_one_device(t: Training) -> None:
    """`T_max` is the number of steps on four devices, 50, in a run on one: the rate is zero at step 50, and climbs again. Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 50)


@fault(captioner, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "encoder", "encoder.conv1"), step=90, then=(*BROKEN, "nonfinite-loss"))  # fmt: skip
def pictures_by_their_own_deviation(t: Training) -> None:
    """Each picture is standardised by its own mean and deviation, and from step 90 on some are of one colour: 0 / 0. GRIST: division by
    zero; TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        pictures, previous, following = plain(step, phase)
        if phase == "train" and step >= 90:
            pictures = pictures.clone()
            pictures[step % captioner.BATCH] = 0.5
        mean, spread = pictures.mean((1, 2, 3), keepdim=True), pictures.std((1, 2, 3), keepdim=True)
        return (pictures - mean) / spread, previous, following

    t.sample = sample


@fault(captioner, "metric-phase-mismatch", step=49, then=("metric-aggregate",))
def captioner_logs_the_loss_at_hand(t: Training) -> None:
    """The validation logs `loss`, and that variable is still the one of the last training step; its own is called `val_loss` and thrown
    away. Humbatova: wrong validation metric."""
    last = {}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last["loss"] = float(tensors["loss"].detach())
        return batch, tensors

    plain = t.measure
    t.update, t.measure = update, lambda tensors, batch: {**plain(tensors, batch), **last}


@fault(captioner, "metric-range", step=49)
def captioner_accuracy_in_percent(t: Training) -> None:
    """The accuracy is multiplied by 100 for a table of scores, which all are in percent, and its name stays. Humbatova: wrong validation
    metric."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = plain(tensors, batch)
        return {**metrics, "accuracy": 100 * metrics["accuracy"]}

    t.measure = measure


@fault(
    captioner,
    "input-constant",
    "input-duplicate",
    then=(*STUCK, *FITS),
)
def captioner_cropped_outside(t: Training) -> None:
    """Crops are made in pixels of the original pictures, from pictures that have been made smaller: two in three lie outside and are black.
    TheDeepChecker: constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        pictures, previous, following = plain(step, phase)
        inside = torch.rand(len(pictures), 1, 1, 1, generator=seeded(752, step, len(phase))) < 1 / 3
        return pictures.where(inside, -1.5), previous, following

    t.sample = sample


class ByHand(nn.Module):
    """A softmax at a low temperature."""

    def forward(self, scores):
        powers = (scores / 0.02).exp()
        return powers / powers.sum(1, keepdim=True)


@fault(captioner, "nonfinite-activation", modules=("decoder.attention.softmax", "decoder.attention"), step=3, then=(*BROKEN, "nonfinite-loss", "activation-saturated", "nonfinite-gradient", "activation-exploding"))  # fmt: skip
def attention_softmax_by_hand(t: Training) -> None:
    """A softmax of exponentials, without taking off the highest score, at a low temperature: Inf / Inf when scores have grown a little.
    GRIST: overflow of exp."""
    t.model.decoder.attention.softmax = ByHand()


@fault(
    captioner,
    "module-unused",
    "parameter-unchanged",
    "gradient-zero",
    modules=("decoder.first_cell",),
    then=("update-ratio-low",),
)
def state_and_cell_from_one_layer(t: Training) -> None:
    """A line copied without its second change: the cell begins with what the layer for the state says, and that for the cell never runs.
    TrainCheck: parameters that are not updated; Humbatova: wrong variable."""
    decoder = t.model.decoder

    def begin(regions):
        mean = regions.mean(1)
        return torch.tanh(decoder.first_state(mean)), torch.tanh(decoder.first_state(mean))

    decoder.begin = begin
