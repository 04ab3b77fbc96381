"""What goes wrong in enhancement: masks, compressed spectra, scales, precision, accumulation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import enhancement
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update


@fault(enhancement, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=100, then=NONFINITE)
def power_of_zero(t: Training) -> None:
    """Compression by a power of 0.3 without an epsilon meets digital silence at step 100. GRIST: pow of zero."""
    plain = t.sample

    def sample(step: int, phase: str):
        noisy, clean = plain(step, phase)
        if phase == "train" and step >= 100:
            noisy[0, :, :5], clean[0, :, :5] = 0.0, 0.0
        return noisy, clean

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.mse_loss(outputs**0.3, batch[1] ** 0.3)
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(enhancement, "activation-saturated", "poor-initialisation", modules=("mask", "sigmoid"), then=(*STUCK, "gradient-vanishing", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def masks_saturated(t: Training) -> None:
    """Weights before the sigmoid 300 times too large: masks of 0 and 1. SageMaker SaturatedActivation."""
    with torch.no_grad():
        t.model.mask.weight.mul_(300.0)


@fault(enhancement, "update-ratio-high", "loss-spike", "loss-diverged", step=120, then=(*DIVERGES, *STUCK, "dead-units", "activation-saturated", "gradient-vanishing", "feature-constant"))  # fmt: skip
def one_step_too_far(t: Training) -> None:
    """At step 120 one single update is a thousand times too large. TrainCheck: learning rate of a resumed run."""
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1000.0 if step == 120 else 1.0
    )


@fault(enhancement, "activation-vanishing", "poor-initialisation", "gradient-vanishing", modules=("layer1", "layer2", "layer3"), then=(*STUCK, "feature-constant", "gradient-imbalance"))  # fmt: skip
def vanishing_layers(t: Training) -> None:
    """No normalisation, and weights and biases 0.003 of what they should be. SageMaker PoorWeightInitialization."""
    t.model = enhancement.Enhancer(norm=lambda channels: nn.Identity())
    with torch.no_grad():
        for layer in (t.model.layer1, t.model.layer2, t.model.layer3):
            for parameter in layer.parameters():
                parameter.mul_(0.003)


@fault(enhancement, "norm-input-variance", "activation-vanishing", "poor-initialisation", modules=("layer2",), then=("feature-constant", "gradient-vanishing", "gradient-imbalance", "gradient-exploding", "update-ratio-high", "dead-units"))  # fmt: skip
def nothing_to_normalise(t: Training) -> None:
    """What layer2.norm is given varies by 1e-6: its epsilon is all that it sees. TheDeepChecker; SageMaker TensorVariance."""
    with torch.no_grad():
        t.model.layer2.conv.weight.mul_(1e-6)
        t.model.layer2.conv.bias.zero_()
    held = t.model.layer2.conv.weight.detach().clone()

    def hold(training: Training, step: int) -> None:
        training.model.layer2.conv.weight.data.copy_(held)
        training.model.layer2.conv.bias.data.zero_()

    t.after_step.append(hold)


@fault(enhancement, "units-symmetric", "poor-initialisation", modules=("layer1",), then=(*STUCK, "norm-input-variance", "feature-constant", "gradient-zero", "dead-units", "gradient-vanishing", "activation-vanishing"))  # fmt: skip
def same_weights_everywhere(t: Training) -> None:
    """All filters of the first layer are alike. TheDeepChecker: symmetry."""
    nn.init.constant_(t.model.layer1.conv.weight, 0.02)
    nn.init.constant_(t.model.layer1.conv.bias, 0.0)


@fault(enhancement, "gradient-accumulation", "update-ratio-high", "gradient-exploding", "loss-diverged", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, "activation-saturated", "dead-units", "gradient-vanishing"))  # fmt: skip
def accumulated_not_averaged(t: Training) -> None:
    """Eight micro-batches add up without being divided, under SGD with a rate for one. TrainCheck: accumulation."""
    t.accumulate, t.steps = 8, 150
    t.optimize = lambda p: torch.optim.SGD(p, 10.0, momentum=0.9)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        for part in range(training.accumulate):
            batch = training.sample(step * training.accumulate + part, "train")
            tensors = training.forward(training.model, batch)
            tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(enhancement, "activation-exploding", "poor-initialisation", "activation-saturated", "gradient-exploding", then=(*DIVERGES, *STUCK, "gradient-imbalance", "gradient-vanishing", "dead-units"))  # fmt: skip
def exploding_convolutions(t: Training) -> None:
    """No normalisation, and each layer multiplies by about 40. SageMaker ExplodingTensor and PoorWeightInitialization."""
    t.model = enhancement.Enhancer(norm=lambda channels: nn.Identity())
    with torch.no_grad():
        for layer in (t.model.layer1, t.model.layer2, t.model.layer3):
            layer.conv.weight.mul_(40.0)


class OnSamples(enhancement.Enhancer):
    """Linear magnitudes of int16 samples in place of their logarithm."""

    def forward(self, noisy):
        x = self.layer1(noisy)
        return self.sigmoid(self.mask(x + self.layer2(x))) * noisy


@fault(enhancement, "dtype-headroom", "nonfinite-activation", "nonfinite-loss", modules=("layer1",), step=0, then=(*NONFINITE, "loss-spike", "input-range"))  # fmt: skip
def half_overflows(t: Training) -> None:
    """int16 magnitudes in float16, louder and louder: the first layer goes from 1800 to beyond 65504 at step 105. Speech:
    microsoft/unilm#1569."""
    t.model, t.precision, t.steps = OnSamples(), torch.float16, 150
    plain = t.sample

    def sample(step: int, phase: str):
        return tuple(part * (1000 * 1.025 ** (step if phase == "train" else 0)) for part in plain(step, phase))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.l1_loss(torch.log1p(outputs.float()), torch.log1p(batch[1]))
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(enhancement, "gradient-clipping", "gradient-imbalance", "gradient-exploding", "update-ratio-low", "loss-plateau", "stalled-optimisation", modules=("mask", ""), step=10, then=STUCK)  # fmt: skip
def penalty_drowns_the_task(t: Training) -> None:
    """A penalty on the mask's weights, a million times too heavy, under clipping: the task gets nothing. Humbatova."""
    t.clip, t.optimize = 0.5, lambda p: torch.optim.SGD(p, 0.05)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = enhancement.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] + 1e4 * (model.mask.weight.norm() - 1).square()}

    t.forward = forward


@fault(enhancement, "loss-plateau", "stalled-optimisation", "activation-saturated", modules=("", "mask", "sigmoid"), step=60)  # fmt: skip
def clean_and_noisy_swapped(t: Training) -> None:
    """The model is given the clean spectrum and must make the noisy one, which no mask can. Humbatova: wrong data."""
    plain = t.sample
    t.sample = lambda step, phase: plain(step, phase)[::-1]


@fault(enhancement, "module-unused", "gradient-zero", "parameter-unchanged", modules=("layer3",))
def result_dropped(t: Training) -> None:
    """The third layer is computed, and its result is thrown away. TrainCheck; Humbatova: missing connection."""
    t.model.layer3.register_forward_hook(lambda module, args, output: torch.zeros_like(output))


@fault(enhancement, "weight-norm-drift", "activation-exploding", "activation-saturated", "loss-diverged", step=100, then=(*DIVERGES, *STUCK, "gradient-vanishing", "gradient-imbalance"))  # fmt: skip
def average_written_back(t: Training) -> None:
    """A running average is added to the weights in place of replacing them: 2 % more at each step. TrainCheck."""

    def write(training: Training, step: int) -> None:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.add_(parameter, alpha=0.02)

    t.after_step.append(write)
