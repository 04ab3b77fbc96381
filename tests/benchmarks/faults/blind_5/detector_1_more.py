"""More of what goes wrong in detectors: terms, statistics, fused layers, letter boxes, what is logged."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from faults import detector
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, seeded


@fault(detector, "nonfinite-buffer", "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "backbone", "backbone.stem", "neck"), step=60, then=(*NONFINITE, *STUCK, "step-skipped"))  # fmt: skip
def broken_picture_in_statistics(t: Training) -> None:
    """A picture with an Inf at step 60; the loop leaves out the step of a loss that is not finite, and the running statistics keep it:
    each validation is NaN. TrainCheck: buffers."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train" and step == 60:
            x[3, 1, 5, 5] = math.inf
        return x, things

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        if tensors["loss"].isfinite():
            tensors["loss"].backward()
            observer.backward_done(training, step)
            training.optimizer.step()
        return batch, tensors

    t.sample, t.update = sample, update


@fault(detector, "loss-sign", "metric-constant", step=20, then=(*DIVERGES, *STUCK, "activation-vanishing", "gradient-vanishing", "gradient-zero", "overtraining"))  # fmt: skip
def overlap_in_place_of_its_loss(t: Training) -> None:
    """The overlap of boxes itself is added to the loss, not one minus it: boxes are driven off the things. Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        some = has > 0
        lies = detector.overlap(detector.corners(tensors["boxes"])[some], detector.corners(box)[some]).mean()
        return {**tensors, "loss": tensors["objectness_loss"] + tensors["class_loss"] + 2 * lies, "box_loss": lies}

    t.forward = forward


@fault(detector, "metric-type", step=49)
def recall_of_each_kind_in_a_list(t: Training) -> None:
    """Recalls of three kinds are logged as a list under one name, which no logger draws. Humbatova: wrong metrics; speech: metrics of
    another type."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = (tensors["logits"].argmax(-1) == tensors["targets"]).float()
        each = [float(right[tensors["targets"] == kind].mean()) for kind in range(detector.KINDS)]
        return {**detector.measure(tensors, batch), "recall_of_kinds": each}

    t.measure = measure


@fault(detector, "metric-always-none", step=99)
def average_precision_is_none(t: Training) -> None:
    """The average precision comes from a package that is not installed, and its wrapper returns None. Humbatova: missing metric."""
    t.measure = lambda tensors, batch: {**detector.measure(tensors, batch), "average_precision": None}


@fault(
    detector, "parameter-changed", modules=("backbone",), step=80, then=("gradient-zero", "optimizer-frozen-parameters")
)
def frozen_with_velocity(t: Training) -> None:
    """The backbone is frozen at step 80, and `zero_grad(set_to_none=False)` leaves zeros: momentum and decay move it on. TrainCheck:
    frozen parameters that change."""

    def before(training: Training, step: int) -> None:
        if step == 80:
            training.model.backbone.requires_grad_(requires_grad=False)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad(set_to_none=False)
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        observer.backward_done(training, step)
        training.optimizer.step()
        return batch, tensors

    t.before.append(before)
    t.update = update


@fault(
    detector,
    "input-constant",
    "input-duplicate",
    then=(*STUCK, "input-drift", "overfit", "overtraining", "loss-diverged"),
)
def letter_box_without_a_picture(t: Training) -> None:
    """The size within the letter box is rounded down to zero for whatever is wider than high: three of four pictures are padding and
    nothing else. TheDeepChecker: constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train":
            x[torch.rand(len(x), generator=seeded(12, step)) < 0.75] = 0.114
        return x, things

    t.sample = sample


@fault(detector, "model-changed", "optimizer-misses-parameters", "parameter-unchanged", "optimizer-owns-others", modules=("neck", "neck.conv"), step=100, then=("module-unused", "gradient-zero", "loss-spike", "overtraining", "gradient-accumulation"))  # fmt: skip
def fused_for_a_preview(t: Training) -> None:
    """At step 100 the neck's convolution and norm are fused for a fast preview, and the run goes on with the fused layer, of which the
    optimizer does not know. TrainCheck: parameters not in the optimizer."""

    def before(training: Training, step: int) -> None:
        if step == 100:
            neck = training.model.neck.eval()
            neck.conv, neck.norm = fuse_conv_bn_eval(neck.conv, neck.norm), nn.Identity()
            neck.conv.requires_grad_()

    t.before.append(before)
