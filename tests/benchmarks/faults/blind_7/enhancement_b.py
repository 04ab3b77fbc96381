"""More that goes wrong in speech enhancement: masks, running means, gains, integers, averages, steps that are never made."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR

from faults import enhancement
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded

ALL = ("layer1", "layer2", "layer3", "mask")


class Binary(enhancement.Enhancer):
    def forward(self, noisy):
        x = self.layer1(torch.log1p(noisy))
        x = x + self.layer2(x)
        return self.sigmoid(self.mask(x + self.layer3(x))).round() * noisy


@fault(enhancement, "gradient-zero", "parameter-unchanged", modules=("", *ALL, "sigmoid"), then=(*STUCK, *FLAT, "update-ratio-low", "module-unused", "overtraining"))  # fmt: skip
def masks_rounded_in_training(t: Training) -> None:
    """Binary masks, as in the paper on ideal ones: they are rounded in training as well, and rounding has no slope. TheDeepChecker:
    zero gradients; SageMaker UnchangedTensor."""
    t.model = Binary()


@fault(enhancement, "metric-phase-mismatch", step=29, then=("metric-aggregate",))
def enhancer_loss_of_the_last_batch(t: Training) -> None:
    """`metrics["loss"] = loss` in the function that validates: its own is called `val_loss`, `loss` is that of the last training step.
    Humbatova: wrong metrics; speech: metrics in validation."""
    t.val_every, last = 30, {}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last["loss"] = float(tensors["loss"].detach())
        observer.log(dict(last), "train", step)
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            snr = training.measure(training.forward(training.model, batch), batch)
        observer.log({**snr, "loss": last["loss"]}, "val", step)

    t.update, t.validate = update, validate


class Cepstral(enhancement.Enhancer):
    """Logarithms of spectra, their running mean taken away."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(enhancement.BINS))

    def forward(self, noisy):
        x = noisy.log()
        if self.training:
            self.mean.lerp_(x.mean((0, 2)), 0.02)
        x = (x.clamp(min=-8.0) - self.mean[:, None]).relu()
        x = self.layer1(x)
        x = x + self.layer2(x)
        return self.sigmoid(self.mask(x + self.layer3(x))) * noisy


@fault(enhancement, "nonfinite-buffer", "nonfinite-activation", modules=("", "layer1", "layer1.conv"), step=80, then=(*NONFINITE, *STUCK, "nonfinite-input", "audio-silent", "input-constant"))  # fmt: skip
def enhancer_mean_of_a_silent_file(t: Training) -> None:
    """Logarithms have a floor where they are used, not where their running mean is taken: a file of zeros at step 80 makes the mean
    -Inf for ever. GRIST: log of zero; TrainCheck: buffers."""
    t.model, plain = Cepstral(), t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train" and step == 80:
            noisy[3], clean[3] = 0.0, 0.0
        return noisy, clean

    t.sample = sample


@fault(enhancement, "update-ratio-high", "loss-diverged", "loss-spike", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "gradient-vanishing", "parameter-unchanged", "output-silent"))  # fmt: skip
def enhancer_average_that_forgets_nothing(t: Training) -> None:
    """`RMSprop(alpha=1.0)`: the mean of squares stays at its first value, zero, and gradients are divided by the epsilon alone.
    Humbatova: optimiser's parameters; GRIST: division by nearly zero."""
    t.optimize = lambda p: torch.optim.RMSprop(p, 1e-3, alpha=1.0)


@fault(enhancement, "parameter-changed", modules=("layer1", "layer2"), step=100, then=("optimizer-frozen-parameters", "gradient-zero", "weight-decay-on-norms", "weight-norm-drift"))  # fmt: skip
def enhancer_adapted_in_its_end(t: Training) -> None:
    """From step 100 on only the end is to be adapted; the first layers are frozen, their gradients are set to zero, and Adam's moments
    and the decay go on. TrainCheck: frozen parameters that change."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3, weight_decay=1e-3)

    def before(training: Training, step: int) -> None:
        if step == 100:
            training.model.layer1.requires_grad_(requires_grad=False)
            training.model.layer2.requires_grad_(requires_grad=False)
            plain = training.optimizer.zero_grad
            training.optimizer.zero_grad = lambda: plain(set_to_none=False)

    t.before.append(before)


@fault(enhancement, "input-range", "input-drift", then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "gradient-clipping", "activation-saturated", "dead-units", "overfit", "overtraining", "audio-scale", "audio-peak", "audio-silent", "output-silent"))  # fmt: skip
def enhancer_gain_of_ten_to_the_decibel(t: Training) -> None:
    """Levels are varied by -10 to 10 dB in training, as `10 ** gain`, without the division by 20: ten powers of ten up or down.
    Humbatova: wrong preprocessing; speech: dB scale."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        gain = 10 ** (20 * torch.rand(len(noisy), 1, 1, generator=seeded(21, step)) - 10) if phase == "train" else 1.0
        return noisy * gain, clean * gain

    t.sample = sample


@fault(enhancement, "parameter-unchanged", "step-skipped", "gradient-accumulation", "stalled-optimisation", step=1, then=(*STUCK, "update-ratio-low", "gradient-exploding"))  # fmt: skip
def enhancer_step_never_reached(t: Training) -> None:
    """Gradients of 512 batches are added up before a step, a number for eight devices and an hour: this run has 300. TrainCheck:
    parameters not updated, accumulation."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        (tensors["loss"] / 512).backward()
        if (step + 1) % 512 == 0:
            finish_update(training, step, observer)
            training.optimizer.zero_grad()
        else:
            observer.backward_done(training, step)
        return batch, tensors

    t.update = update


@fault(enhancement, "audio-silent", "output-silent", then=(*STUCK, "batch-order", "audio-mixture", *FLAT, "activation-saturated", "dead-units", "gradient-zero", "gradient-vanishing", "metric-constant", "weight-norm-drift"))  # fmt: skip
def enhancer_targets_cut_to_integers(t: Training) -> None:
    """Clean spectra are cached as integers without a scale, and hardly one is above 1: all targets are silent, and the mask closes.
    Humbatova: wrong labels, type of data; speech: integer and float."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return noisy / 3, (clean / 3).to(torch.int16).float()

    t.sample = sample
    t.measure = lambda tensors, batch: {"error": float((tensors["outputs"] - batch[1]).square().mean())}


@fault(enhancement, "nonfinite-loss", "nonfinite-gradient", "audio-silent", step=110, then=(*NONFINITE, *STUCK))
def enhancer_ratio_of_a_pause(t: Training) -> None:
    """The loss is the logarithm of signal over error; at step 110 the clean speech of an item is a pause, and the ratio zero. GRIST: log
    of zero; speech: silent references."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train" and step == 110:
            noisy[2], clean[2] = noisy[2] - clean[2], 0.0
        return noisy, clean

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        ratio = batch[1].square().sum((1, 2)) / (outputs - batch[1]).square().sum((1, 2))
        return {"loss": -10 / math.log(10) * ratio.log().mean(), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(enhancement, "input-constant", "audio-silent", "input-duplicate", "audio-duplicate", "input-drift", then=(*STUCK, *FLAT, "norm-input-variance", "output-silent", "batch-order", "audio-mixture"))  # fmt: skip
def enhancer_masks_of_all_frames(t: Training) -> None:
    """SpecAugment with a width in percent where a share is meant, for seven items of ten: all of their frames are zeros. TheDeepChecker:
    constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train":
            for item in range(7):
                width = min(int(30.0 * enhancement.FRAMES), enhancement.FRAMES)
                noisy[item, :, :width] = 0.0
        return noisy, clean

    t.sample = sample


@fault(enhancement, "update-ratio-high", "loss-spike", "loss-diverged", "weight-norm-drift", step=1, then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "dead-units", "activation-saturated", "gradient-zero", "gradient-vanishing", "output-silent", "parameter-unchanged", "schedule-unfinished"))  # fmt: skip
def enhancer_cycle_up_to_five(t: Training) -> None:
    """`CyclicLR` between 1e-3 and 5, from a network that was trained by SGD without norms, here with Adam. Humbatova: learning rate;
    SageMaker WeightUpdateRatio; AutoTrainer: oscillating loss."""
    t.schedule = lambda optimizer: CyclicLR(optimizer, 1e-3, 5.0, step_size_up=40, cycle_momentum=False)


@fault(enhancement, "optimizer-misses-parameters", "parameter-unchanged", modules=("layer1.norm", "layer2.norm", "layer3.norm"), then=("gradient-imbalance", "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def enhancer_norms_in_no_group(t: Training) -> None:
    """Parameters are gathered from all convolutions, and nobody thought of the norms. TrainCheck: parameters not in the optimizer."""
    convolutions = [m for m in t.model.modules() if isinstance(m, nn.Conv1d)]
    t.optimizers = [t.optimize([p for m in convolutions for p in m.parameters()])]


class Softplus(nn.Module):
    """`log(1 + exp(100 x)) / 100`, as it stands in the paper."""

    def forward(self, x):
        return torch.log(1 + torch.exp(100 * x)) / 100


@fault(enhancement, "nonfinite-activation", modules=("sigmoid",), then=(*NONFINITE, *STUCK))
def enhancer_softplus_by_hand(t: Training) -> None:
    """Gains beyond 1 are wanted, and a softplus is written by hand: exp overflows from 0.89 on. GRIST: overflow of exp."""
    t.model.sigmoid = Softplus()


@fault(enhancement, "metric-phase-mismatch", "metric-always-none", step=49, then=("metric-missing",))
def enhancer_score_only_in_training(t: Training) -> None:
    """The score of a batch is kept in the branch for training; validation reports its default, None, and the early stopping waits for it.
    Humbatova: wrong metrics; speech: metrics that are missing in validation."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        if step % 10 == 0:
            observer.log(
                {"loss": float(tensors["loss"].detach()), **enhancement.measure(tensors, batch)}, "train", step
            )
        return batch, tensors

    t.update = update
    t.measure = lambda tensors, batch: {"snr_db": None}
