"""More of what goes wrong in acoustic models: first weights, modes, two optimizers, empty inputs, closed gates, signs, sums."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import vocoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, update_of_two
from faults.vocoder import guide, measure, shown, spectral

DECODER = ("decoder", "decoder.0", "decoder.1", "decoder.2")


@fault(vocoder, "units-symmetric", "poor-initialisation", modules=DECODER, then=("feature-constant", "gradient-zero", "gradient-imbalance", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def vocoder_stack_of_one_number(t: Training) -> None:
    """All filters of the dilated stack begin at 0.02, the deviation in place of draws with it: 32 gated units compute one feature.
    TheDeepChecker: symmetry; SageMaker PoorWeightInitialization."""
    for layer in t.model.decoder:
        for part in (layer.conv, layer.out):
            nn.init.constant_(part.weight, 0.02)
            nn.init.zeros_(part.bias)


@fault(vocoder, "validation-in-train-mode", modules=("", "encoder", "prenet", "postnet"), step=49, then=("overtraining",))  # fmt: skip
def vocoder_validated_while_training(t: Training) -> None:
    """The validation is under `no_grad` and leaves the mode as it is: norms take its clips in, and dropout is on. TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": float(tensors["loss"]), **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(vocoder, "model-in-eval", step=60, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def vocoder_speaks_and_stays_in_eval(t: Training) -> None:
    """From step 60 on each step begins with a clip to listen to, for which `eval()` is called; nobody calls `train()` after it.
    TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step >= 60:
            training.model.eval()
        return plain_update(training, step, observer)

    t.update = update


@fault(vocoder, "optimizer-duplicate-parameters", modules=("mel", "stop", "postnet", ""), then=("update-ratio-high", "loss-spike"))  # fmt: skip
def vocoder_heads_in_two_optimizers(t: Training) -> None:
    """Heads and postnet have an optimizer of their own, and are in that of the whole model as well. TrainCheck: optimizer and
    parameters."""
    heads = [p for part in (t.model.mel, t.model.stop, t.model.postnet) for p in part.parameters()]
    t.optimizers = [t.optimize(t.model.parameters()), t.optimize(heads)]
    t.update = update_of_two


@fault(vocoder, "scheduler-ends-early", step=20, then=("schedule-restarted", "schedule-unfinished", "loss-spike", "update-ratio-low", "update-ratio-high", "loss-plateau"))  # fmt: skip
def vocoder_cosine_of_twenty_epochs(t: Training) -> None:
    """`CosineAnnealingLR(20)`, for 20 epochs, is stepped after each batch: the rate is zero at step 20 and rises again. Humbatova: learning
    rate; TrainCheck: scheduler."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 20)


@fault(vocoder, "input-constant", "input-duplicate", "feature-constant", modules=("encoder", "attention", ""), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "attention-head-dead", "overtraining", "units-symmetric"))  # fmt: skip
def vocoder_reads_unknown_phones(t: Training) -> None:
    """The lexicon is not found, and each text becomes seven times the unknown phone. TheDeepChecker: constant inputs; Humbatova: missing
    preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        previous, phones, *rest = plain(step, phase)
        return previous, torch.ones_like(phones), *rest

    t.sample = sample


@fault(vocoder, "input-dtype", then=("precision-loss",))
def vocoder_frames_in_float64(t: Training) -> None:
    """Frames come from numpy's logarithms, in float64, and are converted in each step. TrainCheck: dtype; Humbatova: wrong type."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        previous, phones, mels, *rest = plain(step, phase)
        return previous.double(), phones, mels.double(), *rest

    t.sample = sample
    t.forward = lambda model, batch: vocoder.forward(model, (batch[0].float(), batch[1], batch[2].float(), *batch[3:]))


@fault(vocoder, "metric-nonfinite", step=49)
def vocoder_error_of_no_loud_frame(t: Training) -> None:
    """An error over frames louder than -20 dB is given mels that are normalised, and a sign was lost: no frame is above 20, and the mean of
    none is NaN. GRIST: division by zero; Humbatova: wrong validation metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        loud = batch[2].amax(-1) > 20
        return {**measure(tensors, batch), "loud_error": float((tensors["outputs"] - batch[2])[loud].abs().mean())}

    t.measure = scores


@fault(vocoder, "activation-saturated", "gradient-vanishing", "activation-vanishing", "feature-constant", modules=(*DECODER,), then=(*STUCK, *FLAT, "poor-initialisation", "gradient-zero", "parameter-unchanged", "gradient-imbalance", "module-unused", "dead-units", "units-symmetric", "update-ratio-low"))  # fmt: skip
def vocoder_gates_begin_closed(t: Training) -> None:
    """The bias that was to open gates at first has the wrong sign and is 20: all gates of the stack are shut. SageMaker
    SaturatedActivation; TheDeepChecker: biases."""
    for layer in t.model.decoder:
        nn.init.constant_(layer.conv.bias[vocoder.WIDTH :], -20.0)


def summed(outputs: tuple[torch.Tensor, ...], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences of frames and what stops cost, both not averaged."""
    frames = ((outputs[1] - batch[2]).abs() + (outputs[0] - batch[2]).abs()) * batch[4][..., None]
    return frames.sum(), F.binary_cross_entropy_with_logits(outputs[2], batch[3], reduction="sum")


@fault(vocoder, "update-ratio-high", "gradient-exploding", "loss-diverged", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "gradient-imbalance", "class-imbalance"))  # fmt: skip
def vocoder_sums_over_all_frames(t: Training) -> None:
    """L1 and stops are sums over clips, frames and bands, where the recipe, SGD without a bound, has means. TheDeepChecker: wrong reduction;
    Humbatova: wrong loss."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)), None

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        return shown(sum(summed(outputs, batch)) + guide(outputs[3], batch), outputs, batch)

    t.forward = forward


@fault(vocoder, "input-constant", "input-duplicate", "feature-constant", modules=("", "prenet", "gru"), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "parameter-unchanged", "units-symmetric", "output-constant", "audio-silent", "module-unused"))  # fmt: skip
def vocoder_hears_nothing_of_itself(t: Training) -> None:
    """The tensor of previous frames is allocated with zeros, and the line that fills it is missing. SageMaker AllZero; TheDeepChecker:
    constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        previous, *rest = plain(step, phase)
        return torch.zeros_like(previous), *rest

    t.sample = sample


@fault(vocoder, "loss-sign", "activation-exploding", modules=("stop", ""), then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "gradient-clipping", "activation-saturated", "overfit", "overtraining", "class-imbalance", "dtype-headroom", "metric-constant"))  # fmt: skip
def vocoder_rewarded_for_wrong_stops(t: Training) -> None:
    """The term of the stop token is a log-likelihood by name and a cross entropy by value, and is subtracted: the loss falls below zero
    without end. TheDeepChecker: wrong sign; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        rough, fine, stop, weights = outputs
        likelihood = F.binary_cross_entropy_with_logits(stop, batch[3], batch[4].float())
        frames = spectral(rough, batch[2], batch[4]) + spectral(fine, batch[2], batch[4])
        return shown(frames + guide(weights, batch) - likelihood, outputs, batch)

    t.forward = forward


@fault(vocoder, "optimizer-frozen-parameters", "parameter-unchanged", "gradient-zero", modules=("encoder",), then=("module-unused", "update-ratio-low"))  # fmt: skip
def vocoder_encoder_frozen_from_scratch(t: Training) -> None:
    """The script froze a pretrained encoder; this one begins at random, and stays so, in the optimizer. TrainCheck: frozen parameters;
    SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.encoder.requires_grad_(False)


@fault(vocoder, "metric-constant", step=99, then=("metric-range",))
def vocoder_threshold_of_another_scale(t: Training) -> None:
    """The threshold of logits, 3, is kept for probabilities: no stop is ever found, and the recall is exactly 0.0. Humbatova: wrong
    validation metric; speech: stop tokens."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said = tensors["stop_logits"].sigmoid() > 3
        return {**measure(tensors, batch), "stop_recall": float(said[batch[3] > 0].float().mean())}

    t.measure = scores


@fault(vocoder, "weight-norm-drift", "activation-vanishing", "feature-constant", then=(*STUCK, *FLAT, "dead-units", "weight-decay-on-norms", "gradient-zero", "gradient-imbalance", "units-symmetric", "class-imbalance", "update-ratio-high", "attention-head-dead"))  # fmt: skip
def vocoder_decays_by_a_half(t: Training) -> None:
    """`weight_decay=0.5` for Adam, which adds it to the gradient: the penalty is all that is learnt. Humbatova: regularisation;
    TheDeepChecker: parameters."""
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3, betas=(0.9, 0.99), weight_decay=0.5)


@fault(vocoder, "activation-saturated", "poor-initialisation", modules=("postnet",), then=("gradient-imbalance", "gradient-exploding", "gradient-clipping", "gradient-vanishing", "activation-exploding", "loss-plateau", "stalled-optimisation", "update-ratio-low"))  # fmt: skip
def vocoder_postnet_far_too_large(t: Training) -> None:
    """The first layer of the postnet is drawn with a deviation of 5, a fan that was multiplied instead of divided by: its tanh is -1 or 1.
    SageMaker SaturatedActivation and PoorWeightInitialization."""
    nn.init.normal_(t.model.postnet[0].weight, std=5.0)
