"""What goes wrong when pictures are enlarged: ranges, patches, layers, rates, losses, metrics."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

from faults import upscaler
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import (
    Batch,
    Observer,
    Tensors,
    Training,
    finish_update,
    plain_update,
    update_of_two,
)
from faults.upscaler import BATCH, WIDTH, Upscaler, measure, psnr, result

BODY = ("body", "body.0", "body.1", "body.2", "body.3")


@fault(upscaler, "input-range", "activation-exploding", modules=("", "head", "centre"), then=(*DIVERGES, *STUCK, "gradient-imbalance", "batch-order", "poor-initialisation", "dead-units", "gradient-zero"))  # fmt: skip
def small_pictures_in_bytes(t: Training) -> None:
    """Small pictures stay from 0 to 255, large ones go from 0 to 1. Humbatova: wrong preprocessing; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        return 255 * low, high

    t.sample = sample


@fault(upscaler, "input-drift", "input-range", step=49, then=("overfit", "overtraining", "metric-range", "loss-diverged"))  # fmt: skip
def validation_from_minus_one(t: Training) -> None:
    """The validation set is read with the transformation of a GAN, from -1 to 1; training is from 0 to 1. Humbatova: wrong
    preprocessing."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(2 * x - 1 if phase == "val" else x for x in plain(step, phase))


@fault(upscaler, "input-range", "activation-exploding", "gradient-exploding", modules=("", "head", "centre"), then=(*DIVERGES, *NONFINITE, *STUCK, "metric-range", "dead-units", "gradient-zero", "poor-initialisation"))  # fmt: skip
def both_sides_in_bytes(t: Training) -> None:
    """All pictures are from 0 to 255 and the mean that is taken off is that of 0 to 1: with SGD and squared errors. SageMaker
    NotNormalizedData; Humbatova: wrong preprocessing."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(255 * x for x in plain(step, phase))
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)
    t.forward = lambda model, batch: result(x := model(batch[0]), batch, F.mse_loss(x, batch[1]))


@fault(upscaler, "input-constant", "input-duplicate", then=("loss-plateau", "stalled-optimisation", "input-drift", "overfit", "overtraining"))  # fmt: skip
def patches_beside_the_picture(t: Training) -> None:
    """Places of patches are drawn for pictures of another size: two thirds lie outside and are filled with grey. TheDeepChecker: constant
    inputs; Humbatova: wrong data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        if phase == "train":
            low, high = low.clone(), high.clone()
            low[: 2 * BATCH // 3], high[: 2 * BATCH // 3] = 0.5, 0.5
        return low, high

    t.sample = sample


@fault(upscaler, "input-duplicate", then=("overfit", "overtraining"))
def readers_cut_the_same_patch(t: Training) -> None:
    """Four readers with one seed draw the same two patches. TrainCheck: workers with one seed, as with numpy's generator in PyTorch's
    loader."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        return (low[:2].repeat(4, 1, 1, 1), high[:2].repeat(4, 1, 1, 1)) if phase == "train" else (low, high)

    t.sample = sample


@fault(upscaler, "input-duplicate", "overfit", step=1, then=("overtraining", "loss-plateau"))
def cache_of_one_batch(t: Training) -> None:
    """The cache of patches keeps its first batch and returns it for ever. TrainCheck: data that is repeated; SageMaker Overfit."""
    plain = t.sample
    t.sample = lambda step, phase: plain(5 if phase == "train" else step, phase)


@fault(upscaler, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", modules=("body.1",), then=("parameter-unchanged", "units-symmetric", "activation-vanishing", "gradient-vanishing"))  # fmt: skip
def biases_of_a_quantised_file(t: Training) -> None:
    """The biases of a block are read from a quantised file without their scale: -30, before a ReLU. SageMaker DeadRelu."""
    nn.init.constant_(t.model.body[1].conv1.bias, -30.0)


@fault(upscaler, "gradient-zero", "parameter-unchanged", modules=BODY, then=("module-unused", "optimizer-misses-parameters", "gradient-vanishing"))  # fmt: skip
def body_under_no_grad(t: Training) -> None:
    """The residual blocks run under `no_grad`, which was put there to measure their memory. TrainCheck: parameters not updated; SageMaker
    UnchangedTensor."""
    t.model.body.forward = torch.no_grad()(t.model.body.forward)


@fault(upscaler, "gradient-zero", "units-symmetric", "poor-initialisation", "parameter-unchanged", "feature-constant", "dead-units", modules=BODY, then=("activation-vanishing", "gradient-vanishing", "module-unused"))  # fmt: skip
def zeros_in_both_convolutions(t: Training) -> None:
    """Residual branches are to begin at zero, and the loop over `named_parameters` takes both convolutions of each block.
    TheDeepChecker: zero weights; SageMaker AllZero."""
    for name, parameter in t.model.body.named_parameters():
        if "conv" in name:
            nn.init.zeros_(parameter)


@fault(upscaler, "poor-initialisation", "activation-exploding", modules=(*BODY, "merge", ""), then=(*DIVERGES, *STUCK, "gradient-imbalance", "dead-units"))  # fmt: skip
def kaiming_without_the_kernel(t: Training) -> None:
    """A hand-written initialisation divides by the channels and forgets the nine places of a kernel, and the residual scale: gains of 3.
    SageMaker PoorWeightInitialization; TheDeepChecker: initial weights."""
    for block in t.model.body:
        block.scale = 1.0
        for conv in (block.conv1, block.conv2):
            nn.init.normal_(conv.weight, std=math.sqrt(2 / WIDTH))


@fault(upscaler, "units-symmetric", "poor-initialisation", modules=("body.2",), then=("feature-constant", "gradient-imbalance", "dead-units", "gradient-zero", "activation-vanishing", "gradient-vanishing", "parameter-unchanged"))  # fmt: skip
def block_of_equal_filters(t: Training) -> None:
    """Both convolutions of a block are filled with the number that was meant as their deviation. TheDeepChecker: symmetry."""
    for conv in (t.model.body[2].conv1, t.model.body[2].conv2):
        nn.init.constant_(conv.weight, 0.03)
        nn.init.zeros_(conv.bias)


@fault(upscaler, "activation-saturated", "gradient-zero", "feature-constant", "output-constant", "poor-initialisation", "parameter-unchanged", modules=("tail", "tail.1", ""), then=(*STUCK, *FLAT, "update-ratio-low", "module-unused", "activation-exploding", "loss-input-mismatch"))  # fmt: skip
def pixels_before_a_sigmoid(t: Training) -> None:
    """A sigmoid is put behind the last layer, which still works in grey levels of 0 to 255 after a factor of its own. SageMaker
    SaturatedActivation; Humbatova: wrong activation function."""
    t.model.tail = nn.Sequential(t.model.tail, nn.Sigmoid())
    with torch.no_grad():
        t.model.tail[0].weight.mul_(255)
        t.model.tail[0].bias.fill_(127.5)


@fault(upscaler, "optimizer-misses-parameters", "parameter-unchanged", "optimizer-owns-others", modules=("upsample", "upsample.0", "tail"), then=("model-changed", "gradient-accumulation", "gradient-exploding", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def end_for_another_scale(t: Training) -> None:
    """The end is built anew for a factor of two when the optimizer already holds that of a factor of four. TrainCheck: parameters
    not in the optimizer."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    t.model.upsample, t.model.tail = upscaler.Upsampler(), nn.Conv2d(WIDTH, 3, 3, padding=1)


@fault(upscaler, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", "stalled-from-start", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-exploding", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def optimizer_of_the_teacher(t: Training) -> None:
    """The optimizer is built from `teacher`, two lines below `student`. TrainCheck: the optimizer holds other parameters."""
    t.optimizers = [t.optimize(list(copy.deepcopy(t.model).parameters()))]


@fault(upscaler, "optimizer-duplicate-parameters", modules=("tail", "upsample", "upsample.0", ""))
def end_in_two_optimizers(t: Training) -> None:
    """The last layers have an optimizer with a rate of their own, and are still in the first one. TrainCheck: optimizer; Humbatova: wrong
    optimiser."""
    last = [*t.model.upsample.parameters(), *t.model.tail.parameters()]
    t.optimizers = [t.optimize(list(t.model.parameters())), torch.optim.Adam(last, 3e-4)]
    t.update = update_of_two


@fault(upscaler, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "dead-units", "gradient-zero"))
def zeroing_in_the_wrong_branch(t: Training) -> None:
    """`zero_grad` has moved into the branch that saves pictures every 100 steps. TrainCheck: missing `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 100 == 99:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(upscaler, "update-ratio-low", "scheduler-ends-early", "loss-plateau", "stalled-optimisation", step=10, then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def milestones_in_epochs(t: Training) -> None:
    """A factor of a tenth after 2, 4, 6, 8 and 10, which were epochs, is applied after as many steps. TrainCheck: scheduler; Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: MultiStepLR(optimizer, [2, 4, 6, 8, 10], 0.1)


@fault(upscaler, "update-ratio-low", "scheduler-ends-early", "schedule-unfinished", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def one_cycle_of_a_million(t: Training) -> None:
    """`OneCycleLR` over a million steps, as in the paper, whose first rate is a ten-thousandth of its highest: in 250 steps it does
    not rise. Humbatova: learning rate; AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 3e-3, 1_000_000, div_factor=1e4)


@fault(upscaler, "update-ratio-high", "dead-units", "weight-norm-drift", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "activation-saturated", "output-constant"))  # fmt: skip
def rate_times_the_ranks(t: Training) -> None:
    """The rate is multiplied by 256 ranks, as the launcher says, and there is one. SageMaker WeightUpdateRatio and DeadRelu; Humbatova:
    learning rate."""
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3 * 256)


@fault(upscaler, "weight-norm-drift", step=20, then=(*STUCK, *FLAT, "gradient-vanishing", "output-constant", "update-ratio-high", "dead-units", "weight-decay-on-norms"))  # fmt: skip
def decay_of_fifteen(t: Training) -> None:
    """AdamW with a weight decay of 15, meant as 1.5e-1 of another scale: 4 % of all weights go in each step. Humbatova: regularisation;
    TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=15.0)


@fault(upscaler, "loss-sign", "activation-exploding", "weight-norm-drift", then=(*DIVERGES, *STUCK, "metric-range", "overfit", "overtraining", "dead-units", "parameter-unchanged"))  # fmt: skip
def psnr_is_minimised(t: Training) -> None:
    """The loss is the PSNR itself: the worse the pictures, the lower it is. Humbatova: wrong loss; TheDeepChecker: loss
    increases."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        error = (outputs - batch[1]).square().mean((1, 2, 3))
        return result(outputs, batch, -10 * torch.log10(error + 1e-8).mean())

    t.forward = forward


@fault(upscaler, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=100, then=(*NONFINITE, "input-constant"))  # fmt: skip
def root_of_a_padded_picture(t: Training) -> None:
    """The loss is a root of mean squares for each picture, without its padding; from step 100 on one is padding only: the root's
    slope at zero is infinite. GRIST: square root of zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        if phase == "train" and step >= 100:
            low[6], high[6] = 0.0, 0.0
        return low, high

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, real = model(batch[0]), (batch[1].amax((1, 2, 3)) > 0)[:, None, None, None]
        error = ((outputs - batch[1]) * real).square().mean((1, 2, 3))
        return result(outputs, batch, error.sqrt().mean())

    t.sample, t.forward = sample, forward


@fault(upscaler, "nonfinite-loss", "nonfinite-gradient", modules=("",), step=80, then=(*NONFINITE, "input-constant"))
def contrast_of_a_blank_patch(t: Training) -> None:
    """Errors are divided by the contrast of their picture, so that flat ones count as well; from step 80 on one is blank: its
    contrast is zero. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        if phase == "train" and step >= 80:
            low[3], high[3] = 0.0, 0.0
        return low, high

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        error = (outputs - batch[1]).abs().mean((1, 2, 3))
        return result(outputs, batch, (error / batch[1].std((1, 2, 3))).mean())

    t.sample, t.forward = sample, forward


@fault(upscaler, "metric-nonfinite", step=49)
def psnr_of_a_blank_region(t: Training) -> None:
    """PSNR is also shown for the border, whose mask is empty for pictures of this size: the mean of nothing. Humbatova: wrong metric."""
    t.measure = lambda tensors, batch: {
        **measure(tensors, batch),
        "border_psnr_db": psnr(tensors["outputs"][..., 40:], batch[1][..., 40:]),
    }


@fault(upscaler, "metric-range", step=49)
def likeness_added_up(t: Training) -> None:
    """SSIM is added up over colours and not divided by three. Humbatova: wrong metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        pairs = zip(tensors["outputs"].split(1, 1), batch[1].split(1, 1), strict=True)
        return {**measure(tensors, batch), "ssim": sum(upscaler.ssim(*pair) for pair in pairs)}

    t.measure = scores


@fault(upscaler, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))
def likeness_until_step_100(t: Training) -> None:
    """SSIM is slow, and is computed while `step < 100` only, a condition left from a test. Humbatova: wrong metric."""
    plain, now = t.validate, [0]

    def validate(training: Training, step: int, observer: Observer) -> None:
        now[0] = step
        plain(training, step, observer)

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = measure(tensors, batch)
        return known if now[0] < 100 else {"psnr_db": known["psnr_db"]}

    t.validate, t.measure = validate, scores


@fault(upscaler, "module-unused", "gradient-zero", "parameter-unchanged", modules=("merge",))
def skip_in_place_of_the_body(t: Training) -> None:
    """The convolution behind the blocks is built, but the long skip was rewritten without it. TrainCheck; Humbatova: missing layer."""

    class Short(Upscaler):
        def forward(self, low):
            features = self.head(self.centre(low))
            return self.restore(self.tail(self.upsample(features + self.body(features))))

    t.model = Short()


@fault(upscaler, "model-in-eval", modules=("", *BODY), then=("norm-input-variance",))
def never_trained_in_train_mode(t: Training) -> None:
    """The blocks have BatchNorm, as in SRResNet, and the model is put into eval mode once for a first picture, each epoch.
    TrainCheck: modes."""
    for block in t.model.body:
        block.activation = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU())

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.eval()
        return plain_update(training, step, observer)

    t.update = update
