"""What goes wrong in acoustic models: stop tokens, prenets, levels in decibels, postnets, attention, logarithms, sets that are too small."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import vocoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import (
    Batch,
    Observer,
    Tensors,
    Training,
    clipped_before_unscaling_update,
    finish_update,
    plain_update,
    seeded,
)
from faults.vocoder import measure, shown, terms


def in_batches(t: Training, phases: tuple[str, ...], change) -> None:
    """Replace batches of these phases by `change(batch, step)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(plain(step, phase), step) if phase in phases else plain(step, phase)


def with_term(t: Training, term) -> None:
    """Add `term(outputs, batch)` to the loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        return shown(terms(outputs, batch) + term(outputs, batch), outputs, batch)

    t.forward = forward


def levels(batch: Batch, gain: float, offset: float) -> Batch:
    """Frames on another scale; padding stays zero."""
    previous, phones, mels, stops, kept = batch
    return (gain * previous + offset * F.pad(kept[:, :-1], (1, 0))[..., None] * (previous != 0), phones, (gain * mels + offset) * kept[..., None], stops, kept)  # fmt: skip


@fault(vocoder, "loss-input-mismatch", modules=("stop", "stop.1", ""), then=(*STUCK, "class-imbalance", "gradient-vanishing", "activation-saturated", "gradient-imbalance"))  # fmt: skip
def stop_probability_for_logit(t: Training) -> None:
    """The stop head ends in a sigmoid, as synthesis wants a probability, and the loss is that of logits. Humbatova: wrong loss for the
    last layer; UMLAUT."""
    t.model.stop = nn.Sequential(t.model.stop, nn.Sigmoid())


@fault(vocoder, "dropout-high", modules=("prenet", "prenet.2"), then=("feature-constant", "loss-plateau", "stalled-optimisation", "input-drift", "loss-spike", "dead-units"))  # fmt: skip
def prenet_keeps_a_twentieth(t: Training) -> None:
    """The prenet's share to keep, 0.95, is given to `Dropout`. Humbatova: wrong layer argument; TheDeepChecker: regularisation."""
    t.model.prenet[2].p = 0.95


@fault(vocoder, "input-nonfinite", "nonfinite-input", step=80, then=(*NONFINITE, "nonfinite-buffer", "audio-nonfinite", "audio-silent", "metric-constant"))  # fmt: skip
def mel_of_digital_silence(t: Training) -> None:
    """From step 80 on one clip has a pause of zeros, and its mels are logarithms without a floor: minus infinity. GRIST: log of zero;
    speech: log mel features of silence."""

    def pause(batch: Batch, step: int) -> Batch:
        if step >= 80:
            batch[0][4, 3:5], batch[2][4, 2:4] = -torch.inf, -torch.inf
        return batch

    in_batches(t, ("train",), pause)


@fault(vocoder, "optimizer-misses-parameters", "parameter-unchanged", modules=("postnet",), then=("gradient-accumulation", "gradient-clipping", "model-changed", "optimizer-owns-others", "gradient-exploding", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def postnet_swapped_for_a_wider_one(t: Training) -> None:
    """The postnet is replaced by a wider one, below the line that builds the optimizer. TrainCheck: parameters that are not in the
    optimizer; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    first, second = (nn.Conv1d(*size, 5, padding=2) for size in ((vocoder.MELS, 64), (64, vocoder.MELS)))
    t.model.postnet = nn.Sequential(first, nn.Tanh(), second)


@fault(vocoder, "gradient-zero", "parameter-unchanged", "module-unused", modules=("mel",), then=("update-ratio-low", "loss-plateau", "stalled-optimisation", "gradient-vanishing"))  # fmt: skip
def rough_frames_detached(t: Training) -> None:
    """`detach()` behind the linear layer of the mels, there to draw them, cuts both terms of the spectrum off: only the postnet learns
    from frames. TrainCheck: no gradients; SageMaker UnchangedTensor."""
    t.model.mel.register_forward_hook(lambda module, args, output: output.detach())


@fault(vocoder, "input-range", "activation-saturated", modules=("prenet", "gru", "prenet.0", "", "decoder", "postnet"), then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "gradient-clipping", "dead-units", "gradient-zero", "update-ratio-low", "overtraining", "dtype-headroom", "attention-head-dead", "audio-scale"))  # fmt: skip
def frames_left_in_decibels(t: Training) -> None:
    """Mels are in dB, -110 to -10, and the line that takes mean and deviation out is missing. SageMaker
    NotNormalizedData; Humbatova: missing preprocessing."""
    in_batches(t, ("train", "val"), lambda batch, step: levels(batch, 20.0, -60.0))


@fault(vocoder, "input-drift", "input-range", step=49, then=("overfit", "overtraining", "activation-saturated", "activation-exploding", "metric-constant", "audio-scale", "dead-units", "loss-diverged", "prediction-collapse"))  # fmt: skip
def validation_frames_not_normalised(t: Training) -> None:
    """Only the loader of training normalises its mels; those of validation are in dB. Humbatova: preprocessing that differs;
    TrainCheck: data."""
    in_batches(t, ("val",), lambda batch, step: levels(batch, 12.0, -40.0))


@fault(vocoder, "update-ratio-high", "loss-diverged", "weight-norm-drift", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-clipping", "gradient-zero", "gradient-imbalance", "overtraining", "parameter-unchanged", "class-imbalance"))  # fmt: skip
def rate_without_its_thousandth(t: Training) -> None:
    """`lr: 4` of a table in thousandths goes to Adam as it is. Humbatova: learning rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 4.0, betas=(0.9, 0.99))


@fault(vocoder, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "gradient-clipping", "activation-saturated", "dead-units", "overfit", "overtraining"))  # fmt: skip
def vocoder_zeroed_once_an_epoch(t: Training) -> None:
    """`zero_grad()` stands in the loop over epochs, of 100 batches, and not in that over batches. TrainCheck: zero_grad is misplaced."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 100 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update, t.clip = update, None
    t.optimize = lambda p: torch.optim.SGD(p, 0.05)


@fault(vocoder, "prediction-collapse", "metric-constant", "class-imbalance", "input-constant", then=(*STUCK, "input-drift", "input-duplicate", "overfit", "overtraining", "metric-phase-mismatch"))  # fmt: skip
def stops_cut_off_by_the_crop(t: Training) -> None:
    """Training clips are cut before their last frame, to save memory, so that none has a stop: the model never says it. Humbatova:
    wrong labels; SageMaker ClassImbalance; speech: stop tokens."""

    def crop(batch: Batch, step: int) -> Batch:
        previous, phones, mels, stops, kept = batch
        return previous, phones, mels, torch.zeros_like(stops), kept & (stops == 0)

    in_batches(t, ("train",), crop)


@fault(vocoder, "poor-initialisation", "activation-saturated", "gradient-exploding", modules=("gru",), then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "gradient-clipping", "gradient-zero", "update-ratio-low"))  # fmt: skip
def gates_drawn_with_a_deviation_of_five(t: Training) -> None:
    """Weights of the GRU are drawn with a deviation of 5, where 1 over 5 was written: gates and states are -1, 0 or 1. SageMaker
    PoorWeightInitialization and SaturatedActivation; TheDeepChecker."""
    for weight in (t.model.gru.weight_ih_l0, t.model.gru.weight_hh_l0):
        nn.init.normal_(weight, std=5.0)


@fault(vocoder, "dead-units", "gradient-zero", "feature-constant", "parameter-unchanged", modules=("prenet", "prenet.1", "prenet.4"), then=("poor-initialisation", "activation-vanishing", "module-unused", "update-ratio-low", *STUCK, *FLAT))  # fmt: skip
def prenet_shut_by_its_biases(t: Training) -> None:
    """Both biases of the prenet begin at -8: no ReLU opens, and the model does not hear what it said. SageMaker DeadRelu;
    TheDeepChecker: biases."""
    for layer in (t.model.prenet[0], t.model.prenet[3]):
        nn.init.constant_(layer.bias, -8.0)


@fault(vocoder, "nonfinite-gradient", "nonfinite-parameter", modules=("", "postnet", "postnet.3", "mel"), then=(*NONFINITE, "nonfinite-buffer", "metric-constant"))  # fmt: skip
def distance_of_padding(t: Training) -> None:
    """A Euclidean distance for each frame, by hand; where both are padding it is zero, and the root has an infinite slope. GRIST: sqrt
    at zero."""

    def distance(outputs, batch):
        squares = ((outputs[1] - batch[2]) * batch[4][..., None]).square().sum(-1)
        return squares.sqrt().mean()

    with_term(t, distance)


@fault(vocoder, "nonfinite-loss", modules=("",), then=(*NONFINITE, *STUCK, "loss-spike", "gradient-exploding", "nonfinite-buffer", "gradient-clipping", "parameter-unchanged", "update-ratio-low", "step-skipped"))  # fmt: skip
def energy_without_its_twentieth(t: Training) -> None:
    """Decibels become magnitudes by `10 ** db`, where `10 ** (db / 20)` was meant: the loss is infinite. GRIST: overflow of a power."""

    def linear(outputs, batch):
        said, heard = (10 ** (16 * x[batch[4]] + 10) for x in (outputs[1], batch[2]))
        return 0.1 * (said - heard).abs().mean()

    with_term(t, linear)


@fault(vocoder, "nonfinite-activation", modules=("attention", "attention.softmax"), then=(*NONFINITE, "nonfinite-buffer", "metric-constant"))  # fmt: skip
def softmax_over_frames(t: Training) -> None:
    """The softmax of the attention runs over frames, axis 1, and not over phones; a phone of padding is masked in all frames, and 0 / 0
    is NaN. Humbatova: wrong axis; GRIST: division by zero."""
    t.model.attention.softmax = nn.Softmax(1)


@fault(vocoder, "input-duplicate", "audio-duplicate", then=("overfit", "overtraining", "loss-spike"))
def three_utterances_four_times(t: Training) -> None:
    """Four workers have one seed: each batch holds three utterances four times. TrainCheck: data that repeats over workers;
    TheDeepChecker."""
    in_batches(t, ("train",), lambda batch, step: tuple(part[:3].repeat(4, *[1] * (part.ndim - 1)) for part in batch))


@fault(vocoder, "overfit", "overtraining", "input-duplicate", step=1, then=("input-drift", "loss-plateau"))  # fmt: skip
def fourteen_utterances(t: Training) -> None:
    """The list of files of the smoke test, 14 of them, is that of the training. SageMaker Overfit; TheDeepChecker."""
    few = vocoder.speech(14, seeded(5))
    rows = lambda step: torch.randperm(14, generator=seeded(6, step))[: vocoder.BATCH]  # noqa: E731 - one line beside its use
    in_batches(t, ("train",), lambda batch, step: tuple(part[rows(step)] for part in few))


@fault(vocoder, "update-ratio-low", "schedule-unfinished", then=(*STUCK, "schedule-unreachable", "metric-constant"))
def warm_up_counted_in_samples(t: Training) -> None:
    """The warm-up, of a million frames, is counted in steps: the last rate is 8e-7. Humbatova: learning rate;
    AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: (step + 1) / 1_000_000)


@fault(vocoder, "gradient-clipping", "update-ratio-low", then=(*STUCK, "gradient-exploding", "parameter-unchanged"))  # fmt: skip
def vocoder_clipped_before_unscaling(t: Training) -> None:
    """Gradients are clipped to 1 while they are multiplied by the scaler's 65536, under SGD. TrainCheck: scaler and clipping;
    PyTorch's notes on AMP."""
    t.optimize, t.scaled = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)), True
    t.update = clipped_before_unscaling_update


@fault(vocoder, "metric-range", step=49)
def stops_right_of_each_clip(t: Training) -> None:
    """The accuracy of stops is the number of right frames divided by that of clips: 16 of them. Humbatova: wrong validation metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = ((tensors["stop_logits"] > 0) == (batch[3] > 0)) & batch[4]
        return {**measure(tensors, batch), "stop_accuracy": float(right.sum() / len(right))}

    t.measure = scores


class WithSpeakers(vocoder.Vocoder):
    """With a table of speakers for the prenet's states."""

    def __init__(self) -> None:
        super().__init__()
        self.speakers = nn.Sequential(nn.Embedding(8, vocoder.WIDTH), nn.Linear(vocoder.WIDTH, vocoder.WIDTH))

    def forward(self, previous, phones, speaker=None):
        states = self.prenet(previous)
        if speaker is not None:
            states = states + self.speakers(speaker)[:, None]
        return super().forward(previous, phones)


@fault(vocoder, "module-unused", "gradient-zero", "parameter-unchanged", modules=("speakers",))
def speakers_not_handed_on(t: Training) -> None:
    """A table of speakers is added, and the loop still calls the model without them. Humbatova: missing argument; SageMaker
    UnchangedTensor."""
    t.model = WithSpeakers()


@fault(vocoder, "metric-grad", step=0, then=("metric-phase-mismatch",))
def spectral_loss_kept_with_its_graph(t: Training) -> None:
    """The sum of the losses so far is logged as a tensor, and with it the graphs of all steps. PyTorch FAQ: `total_loss += loss`;
    TrainCheck: memory."""
    total = [torch.zeros(())]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        total[0] = total[0] + tensors["loss"]
        observer.log({"mean_loss": total[0] / (step + 1)}, "train", step)
        return batch, tensors

    t.update, t.steps = update, 60
