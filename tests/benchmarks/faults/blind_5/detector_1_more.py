"""More of what goes wrong in detectors: terms, statistics, fused layers, letter boxes, what is logged."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import detector
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded


@fault(detector, "nonfinite-buffer", "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "backbone", "backbone.stem", "neck"), step=60, then=(*NONFINITE, *STUCK, "step-skipped"))  # fmt: skip
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


@fault(detector, "metric-always-none", step=49)
def average_precision_is_none(t: Training) -> None:
    """The average precision comes from a package that is not installed, and its wrapper returns None. Humbatova: missing metric."""
    t.measure = lambda tensors, batch: {**detector.measure(tensors, batch), "average_precision": None}


@fault(
    detector,
    "parameter-changed",
    modules=("backbone",),
    step=80,
    then=("loss-plateau", "overtraining", "overfit", "loss-diverged", "gradient-zero", "optimizer-frozen-parameters"),
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


@fault(detector, "model-changed", "optimizer-misses-parameters", "parameter-unchanged", modules=("neck", "neck.conv"), step=100, then=("gradient-exploding", "gradient-imbalance", "gradient-clipping", "module-unused", "gradient-zero", "loss-spike", "overtraining", "gradient-accumulation", "optimizer-owns-others"))  # fmt: skip
def fused_for_a_preview(t: Training) -> None:
    """At step 100 the neck's convolution and norm are fused for a fast preview, and the run goes on with the fused layer, of which the
    optimizer does not know. TrainCheck: parameters not in the optimizer."""

    def before(training: Training, step: int) -> None:
        if step == 100:
            neck = training.model.neck.eval()
            neck.conv, neck.norm = fuse_conv_bn_eval(neck.conv, neck.norm), nn.Identity()
            neck.conv.requires_grad_()

    t.before.append(before)


@fault(detector, "gradient-zero", "parameter-unchanged", "module-unused", modules=("backbone",), then=("update-ratio-low", "loss-plateau", "overtraining"))  # fmt: skip
def features_detached_in_front_of_the_neck(t: Training) -> None:
    """A `detach()` from an experiment with a frozen backbone: it requires gradients and never gets one. TrainCheck: cut graph; SageMaker
    UnchangedTensor."""
    t.model.backbone.register_forward_hook(lambda module, args, output: output.detach())


@fault(detector, "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "gradient-vanishing"))  # fmt: skip
def divided_by_every_cell_and_batch(t: Training) -> None:
    """The loss is divided by the number of things, then by that of cells, and by that of pictures: a thousandth of what the rate was
    set for. TheDeepChecker: wrong reduction; SageMaker WeightUpdateRatio."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] / (detector.GRID**2 * len(batch[0]))}

    t.forward = forward


@fault(
    detector,
    "scheduler-ends-early",
    then=("update-ratio-low", "loss-plateau", "loss-spike", "overtraining", "schedule-unfinished"),
)
def cosine_of_half_the_pictures(t: Training) -> None:
    """`T_max` is counted for batches of 32, and the loader gives 16: at half of the run the rate is zero, and rises again. Humbatova:
    learning rate; TrainCheck: schedules."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 100)


@fault(detector, "activation-exploding", "poor-initialisation", "gradient-exploding", modules=("backbone", "neck", "objectness", "classes", "boxes", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-imbalance", "gradient-clipping", "activation-saturated", "dtype-headroom", "gradient-vanishing", "prediction-collapse"))  # fmt: skip
def filters_of_deviation_one_without_norms(t: Training) -> None:
    """`nn.init.normal_(weight)` for all convolutions of a detector whose norms were folded away: each multiplies the signal by ten.
    SageMaker PoorWeightInitialization; TheDeepChecker."""
    t.model = detector.Detector(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter)


@fault(detector, "model-in-eval", step=50, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def boxes_drawn_in_eval(t: Training) -> None:
    """At step 50 boxes are drawn for the log, in eval mode, and the run goes on in it: norms keep early statistics. TrainCheck: wrong
    mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 50)
        return plain_update(training, step, observer)

    t.update = update


@fault(
    detector,
    "optimizer-duplicate-parameters",
    modules=("boxes", "objectness", "classes"),
    then=("update-ratio-high", "loss-spike"),
)
def heads_given_twice(t: Training) -> None:
    """`[*model.parameters(), *heads]`, so that heads are surely in: torch warns, and each step moves them twice. TrainCheck: optimizers
    and their parameters."""
    heads = [p for head in (t.model.objectness, t.model.classes, t.model.boxes) for p in head.parameters()]
    t.optimize = lambda p: torch.optim.SGD([*t.model.parameters(), *heads], 0.01, momentum=0.9)


@fault(
    detector,
    "module-unused",
    "parameter-unchanged",
    "gradient-zero",
    modules=("backbone.stage2",),
    then=("update-ratio-low",),
)
def second_stage_in_no_sum(t: Training) -> None:
    """The residual stage runs, and what it returns is dropped: `self.stage2(x); return x`. TrainCheck: parameters without gradients;
    SageMaker UnchangedTensor."""
    backbone = t.model.backbone

    def forward(x):
        x = backbone.stage1(backbone.stem(x))
        backbone.stage2(x)
        return x

    backbone.forward = forward
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)


@fault(detector, "metric-vanished", "metric-missing", step=99)
def recall_of_the_first_evaluation_only(t: Training) -> None:
    """The evaluator is reset in the wrong place, and after the first evaluation it returns no recall. Speech: metrics that are missing in
    validation; Humbatova: wrong metrics."""
    calls: list[int] = []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = detector.measure(tensors, batch)
        return metrics if len(calls) <= 2 else {k: v for k, v in metrics.items() if k != "recall"}

    t.measure = measure
