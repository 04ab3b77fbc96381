"""What goes wrong when speakers are separated: optimizers, signs, samplers, masks, levels, assignments, metrics."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn

from faults import separation
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, update_of_two
from faults.separation import CHANNELS, pit, shown

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous", "stalled-from-start")
THREE = ("layers.0", "layers.1", "layers.2")


@fault(separation, "optimizer-misses-parameters", "parameter-unchanged", modules=("mask",), then=(*STUCK, *COLLAPSED, "model-changed", "gradient-accumulation", "gradient-clipping", "gradient-imbalance", "gradient-exploding"))  # fmt: skip
def mask_made_after_the_optimizer(t: Training) -> None:
    """The layer of the masks is made anew for two speakers when the optimizer is there already, and holds the one of before.
    TrainCheck: parameters not in the optimizer; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    t.model.mask = nn.Conv1d(CHANNELS, 2 * CHANNELS, 1)


@fault(separation, "loss-sign", then=(*COLLAPSED, *STUCK, *DIVERGES, "output-silent", "loss-at-80-db", "activation-saturated", "metric-range", "overfit", "overtraining"))  # fmt: skip
def minus_left_out(t: Training) -> None:
    """The loss is the SI-SDR itself: the better an estimate, the higher the loss. Humbatova: wrong loss; speech: ratios in
    dB used as losses."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(-pit(estimates, batch[1]), estimates, batch)

    t.forward = forward


@fault(separation, "input-duplicate", "audio-duplicate", "overfit", step=1, then=("overtraining", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def generator_made_in_every_step(t: Training) -> None:
    """The generator that draws the mixtures is seeded anew in each step: the same six for ever. TrainCheck: data that is
    repeated; TheDeepChecker: overfitting."""
    plain, t.steps = t.sample, 400
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


@fault(separation, "input-duplicate", "audio-duplicate", then=("overfit",))
def readers_with_one_seed(t: Training) -> None:
    """Three readers draw with one seed: each batch of six holds two mixtures, three times each. TrainCheck: workers with one
    seed, as in numpy's generator and PyTorch's loader."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return (mixture[:2].repeat(3, 1), references[:2].repeat(3, 1, 1)) if phase == "train" else (mixture, references)

    t.sample = sample


@fault(separation, "parameter-unchanged", "gradient-zero", "stalled-from-start", then=(*STUCK, "optimizer-owns-others", *COLLAPSED, "update-ratio-low", "stalled-optimisation", "gradient-vanishing", "module-unused"))  # fmt: skip
def zeroed_after_backward(t: Training) -> None:
    """`zero_grad` stands between `backward` and `step`: there is never a gradient to step with. TrainCheck: misplaced
    `zero_grad`."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(separation, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *COLLAPSED, *FLAT, "activation-saturated", "gradient-zero", "dead-units"))  # fmt: skip
def gradients_kept_for_ever(t: Training) -> None:
    """No `zero_grad` at all, and no clipping that would hide it: each step repeats all gradients so far. TrainCheck: missing
    `zero_grad`."""
    t.clip = None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(separation, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, *COLLAPSED, "gradient-exploding", "parameter-unchanged"))  # fmt: skip
def bound_of_another_loss(t: Training) -> None:
    """SGD with gradients clipped to 1e-4, a bound from a loss of spectra; that of dB has gradients of 10. TrainCheck:
    clipping; AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9)
    t.clip = 1e-4


@fault(separation, "activation-saturated", "poor-initialisation", modules=("encoder", "sigmoid", "mask"), then=(*STUCK, *COLLAPSED, "activation-exploding", "gradient-vanishing", "gradient-imbalance", "gradient-zero", "output-silent", "update-ratio-low"))  # fmt: skip
def filters_far_too_large(t: Training) -> None:
    """The encoder starts with filters 300 times too large, and what goes past the normalisations shuts the masks' sigmoid.
    SageMaker PoorWeightInitialization and SaturatedActivation."""
    with torch.no_grad():
        t.model.encoder.weight.mul_(300.0)


@fault(separation, "dead-units", "gradient-zero", "feature-constant", modules=("layers.1",), then=("parameter-unchanged", "units-symmetric", "poor-initialisation", "activation-vanishing", "gradient-vanishing"))  # fmt: skip
def block_shut_by_its_bias(t: Training) -> None:
    """ReLUs in place of PReLUs, and a bias of -20 in the second block, taken from a gate: it stays shut. SageMaker DeadRelu."""
    t.model = separation.Separator(activation=nn.ReLU)
    nn.init.constant_(t.model.layers[1].conv.bias, -20.0)


@fault(separation, "gradient-zero", "dead-units", "units-symmetric", "poor-initialisation", "parameter-unchanged", "feature-constant", modules=("layers.0", "layers.1", "layers.2"), then=("activation-vanishing", "gradient-vanishing", "module-unused"))  # fmt: skip
def both_ends_at_zero(t: Training) -> None:
    """Branches are to begin as nothing, and zeros are written into both of their convolutions, not only into the last:
    neither gets a gradient. TheDeepChecker: zero weights; SageMaker AllZero."""
    for layer in t.model.layers:
        for part in (layer.conv, layer.out):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)


class ByHand(nn.Module):
    """The shares of both speakers: (batch, 2 * channels, time)."""

    def forward(self, x):
        first, second = x.exp().chunk(2, 1)
        return torch.cat([first, second], 1) / (first + second).repeat(1, 2, 1)


@fault(separation, "nonfinite-activation", "nonfinite-loss", modules=("sigmoid",), step=120, then=(*NONFINITE, "activation-exploding", "input-drift", "input-range", "loss-spike"))  # fmt: skip
def shares_by_hand(t: Training) -> None:
    """A softmax over both speakers without the maximum taken off meets loud recordings from step 120 on: Inf / Inf. GRIST:
    overflow of `exp`."""
    t.model.sigmoid, plain = ByHand(), t.sample

    def sample(step: int, phase: str) -> Batch:
        gain = 100.0 if phase == "train" and step >= 120 and step % 10 == 0 else 1.0
        return tuple(gain * part for part in plain(step, phase))

    t.sample = sample


@fault(separation, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=130, then=(*NONFINITE, "output-silent", "input-constant", "loss-at-80-db", "references-alike"))  # fmt: skip
def level_of_a_pause(t: Training) -> None:
    """Levels are compared as well, as roots of mean squares: from step 130 on an item is silent, the loss finite, and the slope
    of the root infinite. GRIST: square root of zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "train" and step >= 130:
            mixture[1], references[1] = 0.0, 0.0
        return mixture, references

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        level, wanted = (x.square().mean((1, 2)).sqrt() for x in (estimates, batch[1]))
        return shown(pit(estimates, batch[1]) + (level - wanted).abs().mean(), estimates, batch)

    t.sample, t.forward = sample, forward


@fault(separation, "model-in-eval", modules=("", *THREE), then=("norm-input-variance",))
def statistics_never_updated(t: Training) -> None:
    """`eval` for a first look at the outputs, and no `train` after it: BatchNorm keeps statistics of zero and one. TrainCheck:
    modes."""
    t.model = separation.Separator(norm=nn.BatchNorm1d)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.eval()
        return plain_update(training, step, observer)

    t.update = update


@fault(separation, "metric-nonfinite", step=49, then=("input-constant", "loss-at-80-db", "input-drift", "output-silent", "norm-input-variance", "overfit"))  # fmt: skip
def improvement_over_silence(t: Training) -> None:
    """What is gained over the mixture is divided by what the mixture has, in dB without a floor: one item of the validation
    set is silent, and the mean is NaN. GRIST: log of zero; Humbatova: wrong metric."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "val":
            mixture[0], references[0] = 0.0, 0.0
        return mixture, references

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["estimates"].sum(1) - batch[0]).square().sum(1)
        snr = 10 * torch.log10(batch[0].square().sum(1) / error)
        return {"si_sdr_db": -float(pit(tensors["estimates"][1:], batch[1][1:])), "snr_of_sum_db": float(snr.mean())}

    t.sample, t.measure = sample, measure


class Binary(nn.Module):
    """Masks of zero and one."""

    def forward(self, x):
        return (x.sigmoid() > 0.5).float()


@fault(separation, "gradient-zero", "parameter-unchanged", "module-unused", modules=("mask", "layers", "sigmoid"), then=(*STUCK, *COLLAPSED, "gradient-vanishing", "activation-saturated"))  # fmt: skip
def masks_of_zero_and_one(t: Training) -> None:
    """Masks are compared with a half, as in the paper's evaluation: no gradient comes through. TrainCheck; SageMaker
    UnchangedTensor; Humbatova: wrong activation function."""
    t.model.sigmoid = Binary()


@fault(separation, "update-ratio-high", "activation-saturated", "activation-exploding", then=(*DIVERGES, *STUCK, *COLLAPSED, *FLAT, "dead-units", "parameter-unchanged", "module-unused", "dtype-headroom", "poor-initialisation", "output-silent", "gradient-clipping", "loss-at-80-db", "gradient-zero", "output-constant"))  # fmt: skip
def rate_of_sgd_for_adam(t: Training) -> None:
    """A learning rate of 0.5, good for SGD, is left when Adam comes. SageMaker WeightUpdateRatio; UMLAUT: learning rate."""
    t.optimize = lambda p: torch.optim.Adam(p, 0.5)


@fault(separation, "weight-norm-drift", "activation-vanishing", "output-silent", step=20, then=(*STUCK, *COLLAPSED, *FLAT, *DIVERGES, "loss-at-80-db", "units-symmetric", "dead-units", "precision-headroom", "output-constant", "overfit", "overtraining"))  # fmt: skip
def decay_like_a_rate(t: Training) -> None:
    """A decoupled weight decay of 25 at a rate of 2e-3: each step takes 5 % from all weights. Humbatova: regularisation;
    TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=25.0)


@fault(
    separation,
    "overfit",
    "input-duplicate",
    "audio-duplicate",
    step=100,
    then=("overtraining", "loss-plateau", "gradient-clipping"),
)
def twelve_mixtures(t: Training) -> None:
    """The list of files is cut for a dry run and left so: twelve mixtures, again and again. SageMaker Overfit."""
    plain, t.steps = t.sample, 500
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3)
    t.sample = lambda step, phase: plain(step % 2 if phase == "train" else step, phase)


@fault(separation, "audio-scale", "input-range", "input-drift", "activation-exploding", "activation-saturated", then=(*STUCK, *COLLAPSED, "gradient-vanishing", "gradient-imbalance", "gradient-zero", "poor-initialisation", "output-silent"))  # fmt: skip
def samples_of_sixteen_bits(t: Training) -> None:
    """A reader gives samples as integers up to 32767, and they are only made floats. Speech: integer and float readers;
    Humbatova: wrong preprocessing; SageMaker NotNormalizedData."""
    plain = t.sample
    t.sample = lambda step, phase: tuple((8000 * part).round() for part in plain(step, phase))


@fault(separation, "nonfinite-buffer", "nonfinite-input", "input-nonfinite", "audio-nonfinite", modules=THREE, step=110, then=(*NONFINITE, "step-skipped", "gradient-zero", "overfit"))  # fmt: skip
def bad_batch_left_in_statistics(t: Training) -> None:
    """A damaged recording gives Inf at step 110. The loop leaves out steps whose loss is NaN, but BatchNorm has seen it:
    validation is NaN from then on. TrainCheck: buffers."""
    t.model, plain = separation.Separator(norm=nn.BatchNorm1d), t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "train" and step == 110:
            mixture[2, 100] = torch.inf
        return mixture, references

    def leave_out(training: Training, step: int) -> None:
        if any(p.grad is not None and not p.grad.isfinite().all() for p in training.model.parameters()):
            training.optimizer.zero_grad()

    t.sample = sample
    t.after_backward.append(leave_out)


@fault(separation, "optimizer-duplicate-parameters", modules=("encoder", "decoder", ""), then=DIVERGES)  # fmt: skip
def filters_in_two_optimizers(t: Training) -> None:
    """Encoder and decoder have an optimizer of their own, and are still in the one of all. TrainCheck: optimizer; Humbatova:
    wrong optimiser."""
    filters = list(chain(t.model.encoder.parameters(), t.model.decoder.parameters()))
    t.optimizers = [torch.optim.Adam(t.model.parameters(), 2e-3), torch.optim.Adam(filters, 1e-2)]
    t.update = update_of_two


@fault(separation, "optimizer-frozen-parameters", "parameter-unchanged", modules=("layers", *THREE), then=(*STUCK, *COLLAPSED))  # fmt: skip
def blocks_frozen_from_scratch(t: Training) -> None:
    """The blocks are frozen as in the fine-tuning script that this one was copied from; here nothing was loaded into them.
    TrainCheck: frozen parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    t.model.layers.requires_grad_(False)


@fault(separation, "norm-input-variance", "activation-vanishing", "input-range", modules=("layers.0", "layers.0.norm", "encoder", ""), then=(*STUCK, *COLLAPSED, *FLAT, "output-silent", "gradient-imbalance", "loss-at-80-db", "dtype-headroom", "precision-headroom", "gradient-exploding", "gradient-clipping"))  # fmt: skip
def samples_divided_twice(t: Training) -> None:
    """Samples are divided by 32768 by the reader and once more by the data set: the first normalisation sees less than its
    epsilon. Humbatova: wrong preprocessing; SageMaker TensorVariance."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part / 32768 for part in plain(step, phase))


@fault(separation, "units-symmetric", "poor-initialisation", modules=("layers.1",), then=("feature-constant", "gradient-vanishing"))  # fmt: skip
def block_filled_with_a_constant(t: Training) -> None:
    """The second block's convolutions are filled with one number, as its normalisation is: 24 units do the work of one.
    TheDeepChecker: symmetry."""
    for part in (t.model.layers[1].conv, t.model.layers[1].out):
        nn.init.constant_(part.weight, 0.05)
        nn.init.zeros_(part.bias)


@fault(separation, "audio-clipping", "audio-mixture", then=("batch-order", "loss-plateau", "stalled-optimisation", "activation-saturated"))  # fmt: skip
def mixtures_cut_off(t: Training) -> None:
    """Mixtures were saved as integers, which ends them at -1 and 1, references as floats, which go to 6. Humbatova: wrong
    preprocessing; speech: mixtures made in advance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return mixture.clamp(-1, 1), references

    t.sample = sample


@fault(separation, "batch-order", "audio-mixture", "loss-plateau", "stalled-optimisation", then=(*COLLAPSED, *STUCK, "output-silent", "overfit"))  # fmt: skip
def mixtures_played_backwards(t: Training) -> None:
    """Two thirds of the mixtures are turned in time to have more data, without their references. Humbatova: wrong data
    augmentation."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "train":
            mixture[:4] = mixture[:4].flip(1)
        return mixture, references

    t.sample = sample
