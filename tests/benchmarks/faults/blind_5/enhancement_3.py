"""What goes wrong when speech is enhanced: modes, types, batches, masks, rates, optimizers, metrics."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR

from faults import enhancement
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, update_of_two
from faults.enhancement import Enhancer, measure

LAYERS = ("layer1", "layer2", "layer3")


@fault(enhancement, "dropout-high", modules=LAYERS, then=(*STUCK, "gradient-zero", "dead-units", "activation-vanishing", "feature-constant"))  # fmt: skip
def dropout_keeps_one_in_twenty(t: Training) -> None:
    """The share to keep, 0.95, is given to `Dropout`, which takes the share to drop. Humbatova: regularisation; TheDeepChecker:
    underfitting."""
    t.model = Enhancer(activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.95)))


@fault(enhancement, "validation-in-train-mode", modules=("", *LAYERS), step=49)
def scored_with_dropout(t: Training) -> None:
    """The scores are computed under `no_grad`, which is taken for `eval`: dropout acts. TrainCheck: modes."""
    t.model = Enhancer(activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.3)))

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": float(tensors["loss"]), **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(enhancement, "input-dtype", then=("precision-loss",))
def spectra_of_numpy(t: Training) -> None:
    """Spectra come from numpy as float64 and are converted in the loop, after they were moved. TrainCheck: dtype."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part.double() for part in plain(step, phase))
    t.forward = lambda model, batch: enhancement.forward(model, tuple(part.float() for part in batch))


@fault(enhancement, "metric-nonfinite", step=49)
def ratio_of_empty_bins(t: Training) -> None:
    """The SNR is averaged over bins, and between the harmonics there is nothing: a logarithm of zero. GRIST: log of zero;
    Humbatova: wrong metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["outputs"] - batch[1]).square() + 1e-9
        return {**measure(tensors, batch), "bin_snr_db": float(10 * torch.log10(batch[1].square() / error).mean())}

    t.measure = scores


@fault(enhancement, "metric-grad", step=24)
def mean_loss_with_its_graphs(t: Training) -> None:
    """The mean of the last 25 losses is logged as a tensor that still has its graphs. Humbatova: memory; PyTorch: `total_loss +=
    loss`."""
    losses: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        losses.append(tensors["loss"])
        if (step + 1) % 25 == 0:
            observer.log({"mean_loss": torch.stack(losses).mean()}, "train", step)
            losses.clear()
        return batch, tensors

    t.update = update


@fault(enhancement, "metric-type", step=49)
def scores_of_all_items(t: Training) -> None:
    """The SNR of each item is returned, in place of their mean. Humbatova: wrong metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["outputs"] - batch[1]).square().sum((1, 2)) + 1e-9
        return {"snr_db": 10 * torch.log10(batch[1].square().sum((1, 2)) / error)}

    t.measure = scores


@fault(enhancement, "optimizer-duplicate-parameters", modules=("mask", ""))
def mask_in_both_optimizers(t: Training) -> None:
    """The mask's layer has an optimizer with a higher rate, and stays in the one of all. TrainCheck: optimizer; Humbatova: wrong
    optimiser."""
    t.optimizers = [t.optimize(list(t.model.parameters())), torch.optim.Adam(t.model.mask.parameters(), 3e-3)]
    t.update = update_of_two


@fault(enhancement, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "dead-units", "gradient-zero", "activation-saturated"))  # fmt: skip
def all_gradients_summed(t: Training) -> None:
    """The loop was rewritten for two models and zeroes the gradients of neither. TrainCheck: missing `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(enhancement, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def clipped_to_ten_to_minus_five(t: Training) -> None:
    """SGD, and a bound of 1e-5 for gradients whose norm is 0.1: the decay's number in the wrong line. TrainCheck: clipping;
    AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    t.clip = 1e-5


@fault(enhancement, "optimizer-frozen-parameters", "parameter-unchanged", modules=LAYERS, then=(*STUCK, "gradient-zero"))  # fmt: skip
def frozen_by_a_prefix(t: Training) -> None:
    """`startswith("layer")` was to freeze the first layer of a trained model; it takes all three, of a new one. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    for name, parameter in t.model.named_parameters():
        parameter.requires_grad_(not name.startswith("layer"))


@fault(enhancement, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "audio-nonfinite", modules=("", "layer1", "layer1.conv"), then=NONFINITE)  # fmt: skip
def deviation_of_an_empty_bin(t: Training) -> None:
    """Spectra are divided by deviations out of a file; the lowest bin was filtered out, and is 0 / 0. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        noisy[:, 0] = 0.0
        return noisy / noisy.std((0, 2), keepdim=True), clean

    t.sample = sample


@fault(enhancement, "activation-saturated", "output-silent", "gradient-vanishing", "poor-initialisation", "parameter-unchanged", "update-ratio-low", modules=("mask", "sigmoid", ""), then=(*STUCK, "gradient-zero", "feature-constant", "activation-vanishing", "units-symmetric"))  # fmt: skip
def mask_shut_by_forty(t: Training) -> None:
    """The bias before the masks' sigmoid is given in dB, -40: no mask opens. SageMaker SaturatedActivation; Humbatova: initial
    weights."""
    nn.init.constant_(t.model.mask.bias, -40.0)


@fault(enhancement, "input-duplicate", "audio-duplicate", then=("overfit", "overtraining"))
def two_readers_with_one_seed(t: Training) -> None:
    """Two readers draw the same five clips: each batch holds them twice. TrainCheck: workers with one seed."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return (noisy[:5].repeat(2, 1, 1), clean[:5].repeat(2, 1, 1)) if phase == "train" else (noisy, clean)

    t.sample = sample


@fault(enhancement, "input-constant", "audio-silent", "input-duplicate", "audio-duplicate", step=100, then=("loss-plateau", "input-drift", "norm-input-variance", "stalled-optimisation", "loss-spike"))  # fmt: skip
def clips_behind_the_end(t: Training) -> None:
    """From step 100 on offsets are in samples of another rate: seven of ten clips lie behind the end of their files, and are zeros.
    TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train" and step >= 100:
            noisy[:7], clean[:7] = 0.0, 0.0
        return noisy, clean

    t.sample = sample


@fault(enhancement, "weight-norm-drift", "feature-constant", step=10, then=(*STUCK, *FLAT, "update-ratio-high", "output-constant", "dead-units", "gradient-zero", "weight-decay-on-norms"))  # fmt: skip
def decoupled_decay_of_fifty(t: Training) -> None:
    """A decay of 50 for AdamW, from a configuration in which it was multiplied by the square of the rate: 5 % in each step. Humbatova:
    regularisation; TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=50.0)


@fault(enhancement, "update-ratio-high", "weight-norm-drift", "loss-diverged", step=60, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "parameter-unchanged", "output-silent", "overfit"))  # fmt: skip
def rate_grows_for_ever(t: Training) -> None:
    """`ExponentialLR` is given a factor of 1.05, for 0.95: after 200 steps the rate is 17. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 1.05)


@fault(enhancement, "feature-constant", "activation-vanishing", modules=("layer1", "layer1.conv", ""), then=(*STUCK, *FLAT, "gradient-imbalance", "update-ratio-low", "module-unused", "poor-initialisation", "dead-units"))  # fmt: skip
def features_scaled_to_nothing(t: Training) -> None:
    """Features are divided by 2 ** 31 inside of the model, a number for 32-bit samples: the first layer sees its own bias only.
    Humbatova: wrong preprocessing; SageMaker TensorVariance."""
    t.model.layer1.register_forward_pre_hook(lambda module, args: (args[0] / 2**31,))


@fault(enhancement, "dead-units", "output-silent", "gradient-zero", "poor-initialisation", "feature-constant", "parameter-unchanged", modules=("mask", "sigmoid", ""), then=(*STUCK, *FLAT, "units-symmetric", "update-ratio-low", "activation-saturated", "module-unused"))  # fmt: skip
def rectified_mask_never_opens(t: Training) -> None:
    """The masks' sigmoid is replaced by a ReLU, and the bias of -6 that kept the sigmoid nearly closed at first stays. SageMaker
    DeadRelu."""
    t.model.sigmoid = nn.ReLU()
    nn.init.constant_(t.model.mask.bias, -6.0)


@fault(enhancement, "model-changed", "optimizer-misses-parameters", "parameter-unchanged", "optimizer-owns-others", modules=("mask",), step=120, then=(*DIVERGES, *STUCK, "module-unused", "gradient-zero", "gradient-accumulation", "gradient-imbalance"))  # fmt: skip
def mask_exchanged_in_the_middle(t: Training) -> None:
    """At step 120 the mask's layer is made anew, for another number of bins, and the optimizer is not told. TrainCheck: parameters
    not in the optimizer."""

    def exchange(training: Training, step: int) -> None:
        if step == 120:
            training.model.mask = nn.Conv1d(enhancement.WIDTH, enhancement.BINS, 1)

    t.before.append(exchange)
