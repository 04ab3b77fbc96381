"""What goes wrong in detectors: boxes, objectness, kinds, pictures, the optimizer, schedules, modes, metrics."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from faults import detector
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded

# -- boxes -----------------------------------------------------------------------------------------------------------


def with_boxes(t: Training, term) -> None:
    """The loss of boxes is `term(told, wanted)` of the four numbers of each thing, (things, 4) both."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        told, wanted = (x.movedim(1, -1)[has > 0] for x in (tensors["boxes"], box))
        placed = term(told, wanted)
        loss = tensors["objectness_loss"] + tensors["class_loss"] + 2 * placed
        return {**tensors, "loss": loss, "box_loss": placed}

    t.forward = forward


@fault(detector, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=(*NONFINITE, *STUCK, "nonfinite-buffer", "output-nonfinite"))  # fmt: skip
def roots_of_raw_sides(t: Training) -> None:
    """The loss compares roots of sides, as YOLO does, and the sides come from a layer without an activation: roots of negative
    numbers. GRIST: root; Humbatova: missing activation."""

    def term(told, wanted):
        sides = (told[:, 2:].sqrt() - wanted[:, 2:].exp().sqrt()).square()
        return F.smooth_l1_loss(told[:, :2], wanted[:, :2]) + sides.mean()

    with_boxes(t, term)


@fault(detector, "nonfinite-loss", "nonfinite-gradient", step=90, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "loss-spike"))  # fmt: skip
def box_without_width(t: Training) -> None:
    """From step 90 on some annotations are clicks without a drag, boxes of width zero, and the target is the logarithm of the width.
    GRIST: logarithm of zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train" and step >= 90:
            things[2, 0, 0], things[2, 0, 3] = 1, 0.0
        return x, things

    t.sample = sample
    with_boxes(t, F.mse_loss)


@fault(detector, "gradient-exploding", "loss-diverged", "update-ratio-high", "gradient-imbalance", "activation-exploding", "nonfinite-loss", "nonfinite-gradient", modules=("boxes", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "nonfinite-buffer", "gradient-clipping", "dtype-headroom", "dead-units", "prediction-collapse"))  # fmt: skip
def squared_pixels_behind_exp(t: Training) -> None:
    """Sides are compared in pixels behind their exponential, by a squared error and without the clipping of gradients: one step too far,
    and the next error is astronomic. GRIST: overflow of exp; Humbatova: wrong loss."""
    t.clip = None
    with_boxes(t, lambda told, wanted: (detector.ANCHOR * (told.exp() - wanted.exp())).square().sum(1).mean())


@fault(detector, "gradient-imbalance", "gradient-clipping", "gradient-exploding", modules=("boxes", "neck", "backbone", ""), then=(*DIVERGES, *STUCK, "class-imbalance", "prediction-collapse", "metric-constant", "update-ratio-low", "overtraining"))  # fmt: skip
def corners_in_pixels_as_targets(t: Training) -> None:
    """Targets are corners of the picture in pixels, 0 to 32, with a squared error: this term is a hundred times the others, and all
    are clipped together. Humbatova: wrong loss; TheDeepChecker: unscaled targets."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        told, wanted = tensors["boxes"].movedim(1, -1)[has > 0], detector.corners(box)[has > 0]
        placed = F.mse_loss(told, wanted, reduction="sum") / has.sum()
        loss = tensors["objectness_loss"] + tensors["class_loss"] + 2 * placed
        return {**tensors, "loss": loss, "box_loss": placed}

    t.forward = forward


@fault(detector, "gradient-zero", "parameter-unchanged", "module-unused", modules=("boxes",), then=("update-ratio-low", "loss-plateau", "overtraining", "metric-constant"))  # fmt: skip
def boxes_decoded_for_display(t: Training) -> None:
    """Boxes are decoded by the function that draws them, under `no_grad()`: their loss is a number without a gradient. TrainCheck:
    parameters without gradients; SageMaker UnchangedTensor."""

    def term(told, wanted):
        with torch.no_grad():
            return F.smooth_l1_loss(told, wanted, reduction="sum") / len(told)

    with_boxes(t, term)


@fault(detector, "dead-units", "poor-initialisation", "gradient-zero", "feature-constant", "output-constant", modules=("neck", ""), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "metric-constant", "class-imbalance", "update-ratio-low"))  # fmt: skip
def prior_in_the_norm_of_the_neck(t: Training) -> None:
    """The logarithm of the prior, -11.5, is written into the last bias that is found by its name, that of the neck's norm: its ReLU never
    opens. SageMaker DeadRelu; Humbatova: wrong weights initialisation."""
    t.model = detector.Detector(activation=nn.ReLU)
    nn.init.constant_(t.model.neck.norm.bias, -11.5)


@fault(detector, "loss-spike", "input-range", step=30, then=(*DIVERGES, "gradient-clipping", "gradient-imbalance"))  # fmt: skip
def one_annotation_in_micrometres(t: Training) -> None:
    """One annotation file in thirty has coordinates in another unit, a thousand times the pixels. Humbatova: wrong labels;
    TheDeepChecker: outliers."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train" and step % 30 == 0 and step > 0:
            things[4, :, 1:] *= 1000
        return x, things

    t.sample = sample


# -- objectness and kinds --------------------------------------------------------------------------------------------


@fault(detector, "loss-input-mismatch", "activation-saturated", modules=("objectness", ""), then=("metric-constant", "loss-plateau", "stalled-optimisation", "gradient-vanishing", "gradient-zero", "class-imbalance", "prediction-collapse", "overtraining"))  # fmt: skip
def sigmoid_of_objectness_twice(t: Training) -> None:
    """The model ends in a sigmoid for the display of scores, and the loss makes it again: no cell can be told as empty. Humbatova:
    wrong loss for the last layer; UMLAUT."""
    t.model.objectness = nn.Sequential(t.model.objectness, nn.Sigmoid())


@fault(detector, "class-imbalance", then=("overfit", "overtraining", "prediction-collapse", "loss-plateau"))
def crosses_hardly_annotated(t: Training) -> None:
    """The annotators of the training set were told of discs and squares; one cross in fifty has been marked, and the kinds are not
    weighed. SageMaker ClassImbalance; Humbatova: unbalanced data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train":
            lost = (things[..., 0] == 2) & (torch.rand(things.shape[:2], generator=seeded(6, step)) > 0.02)
            things[lost] = torch.tensor([-1.0, 0, 0, 1, 1])
        return x, things

    t.sample = sample


@fault(detector, "prediction-collapse", "class-imbalance", then=("overfit", "overtraining", "gradient-vanishing", "loss-diverged", "output-constant"))  # fmt: skip
def kinds_cut_to_zero(t: Training) -> None:
    """Kinds are numbered on over three data sets, and `kind // 3` was written for the training set where `kind % 3` is meant: all are 0.
    Humbatova: wrong labels; SageMaker ClassImbalance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train":
            things[..., 0] = torch.where(things[..., 0] >= 0, 0.0, -1.0)
        return x, things

    t.sample = sample


@fault(detector, "nonfinite-loss", "nonfinite-gradient", step=5, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "activation-saturated", "loss-spike", "output-nonfinite"))  # fmt: skip
def focal_by_hand(t: Training) -> None:
    """A focal loss by hand of the sigmoid: where it is 1 to all digits, the logarithm of the rest is -Inf. Scores are sharpened by a
    temperature of 0.1. GRIST: logarithm of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, p = detector.assigned(batch[1])[0], torch.sigmoid(tensors["scores"] / 0.1)
        each = has * (1 - p).square() * p.log() + (1 - has) * p.square() * (1 - p).log()
        found = -each.sum() / has.sum()
        return {**tensors, "loss": found + tensors["class_loss"] + 2 * tensors["box_loss"], "objectness_loss": found}

    t.forward = forward


# -- pictures --------------------------------------------------------------------------------------------------------


@fault(detector, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "backbone", "backbone.stem"), step=20, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "output-nonfinite"))  # fmt: skip
def gamma_of_standardised_pictures(t: Training) -> None:
    """The augmentation of brightness, `x ** gamma`, comes behind the standardisation: negative numbers to a broken power are NaN. One
    batch in twenty-one has it. GRIST: power of negative numbers; Humbatova: order of preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return (x**0.8 if phase == "train" and step % 21 == 20 else x), things

    t.sample = sample


@fault(detector, "input-duplicate", then=("overfit", "overtraining", "loss-plateau"))
def cache_without_a_key(t: Training) -> None:
    """Decoded pictures are cached in the worker, by a key that forgot the number of the picture: each of two workers gives its first
    one eight times. TrainCheck: duplicated data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return (x[:2].repeat_interleave(8, 0), things[:2].repeat_interleave(8, 0)) if phase == "train" else (x, things)

    t.sample = sample


@fault(detector, "input-range", then=("gradient-imbalance", "gradient-exploding", "gradient-vanishing", "update-ratio-low", "loss-spike", *DIVERGES, *STUCK, *FLAT))  # fmt: skip
def mean_of_another_unit(t: Training) -> None:
    """Pixels of 0 to 255, less a mean and divided by a deviation that are written for 0 to 1: inputs of up to a thousand. UMLAUT: input
    not normalised; SageMaker CheckInputImages."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return ((0.45 + 0.15 * x).clamp(0, 1) * 255 - 0.45) / 0.225, things

    t.sample = sample


@fault(
    detector,
    "input-drift",
    step=49,
    then=("prediction-collapse", "overfit", "overtraining", "loss-diverged", "metric-constant", "input-range"),
)
def night_in_validation(t: Training) -> None:
    """Validation has pictures of the infra-red camera, dark and of a fifth of the contrast, and training has none. Humbatova: wrong
    selection of data; SageMaker CheckInputImages."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return (0.2 * x - 1.5 if phase == "val" else x), things

    t.sample = sample


@fault(detector, "overfit", "overtraining", "input-duplicate", step=1, then=("weight-norm-drift", "loss-plateau"))  # fmt: skip
def coco_of_eight(t: Training) -> None:
    """`coco8.yaml`, the eight pictures of the smoke test, is still the data set of the long run. SageMaker Overfit; TheDeepChecker:
    overfitting."""
    x, things = detector.scenes(8, 5)
    plain = t.sample
    t.model = detector.Detector(width=20)
    t.sample = lambda step, phase: (x, things) if phase == "train" else plain(step, phase)


# -- optimizer -------------------------------------------------------------------------------------------------------


@fault(detector, "optimizer-misses-parameters", "parameter-unchanged", modules=("objectness", "classes", "boxes"), then=("gradient-exploding", "gradient-imbalance", "gradient-clipping", "optimizer-owns-others", "gradient-accumulation"))  # fmt: skip
def heads_in_no_group(t: Training) -> None:
    """A rate for the backbone, another one for the neck, and no group for the three heads. TrainCheck: parameters not in the optimizer."""
    groups = [{"params": t.model.backbone.parameters()}, {"params": t.model.neck.parameters(), "lr": 0.02}]
    t.optimizers = [torch.optim.SGD(groups, 0.01, momentum=0.9)]


@fault(
    detector,
    "optimizer-frozen-parameters",
    modules=("backbone",),
    then=("parameter-unchanged", "gradient-zero", "loss-plateau", "overtraining"),
)
def frozen_like_a_pretrained_one(t: Training) -> None:
    """`backbone.requires_grad_(False)` from the fine-tuning script; this backbone is random, and the optimizer has it. Humbatova:
    training process; TrainCheck: frozen parameters."""
    t.model.backbone.requires_grad_(requires_grad=False)
    t.optimizers = [torch.optim.SGD(t.model.parameters(), 0.01, momentum=0.9)]


@fault(
    detector,
    "gradient-accumulation",
    step=1,
    then=(*DIVERGES, *STUCK, *FLAT, "gradient-clipping", "dead-units", *NONFINITE),
)
def stepped_at_each_of_four(t: Training) -> None:
    """Gradients of four batches are accumulated and zeroed every fourth, as planned, but the optimizer steps at each. TrainCheck:
    misplaced `zero_grad`."""
    t.clip = None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 4 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(detector, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def clipped_to_a_thousandth(t: Training) -> None:
    """`max_norm=0.001`, where the configuration of the detector says 10. TrainCheck: wrong clip; Humbatova: wrong argument."""
    t.clip = 1e-3


@fault(detector, "update-ratio-high", "loss-diverged", "loss-spike", "gradient-exploding", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "nonfinite-buffer", "activation-saturated", "metric-constant", "gradient-clipping"))  # fmt: skip
def rate_for_a_batch_of_4096(t: Training) -> None:
    """The linear rule of rates with the batch size of the recipe, 4096, in a run with batches of 16: 2.56. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01 * 4096 / 16, momentum=0.9)


@fault(detector, "update-ratio-low", "scheduler-ends-early", "stalled-optimisation", step=30, then=(*STUCK, "parameter-unchanged", "overtraining"))  # fmt: skip
def milestones_in_batches(t: Training) -> None:
    """`StepLR(8)`, eight epochs, is stepped at each batch: a tenth every eight batches. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.schedule = lambda optimizer: StepLR(optimizer, 8)


@fault(detector, "weight-norm-drift", step=5, then=("loss-spike", *STUCK, *FLAT, "update-ratio-low", "weight-decay-on-norms", "dead-units", "update-ratio-high", "metric-constant", "loss-diverged"))  # fmt: skip
def decay_of_adamw_in_sgd(t: Training) -> None:
    """A decay of 2 from another optimizer's sweep, multiplied by no rate of 1e-4 any more: weights, gains of norms too, fall to
    nothing. Humbatova: regularisation; SageMaker TensorVariance."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=2.0)


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(detector, "metric-range", "metric-constant", step=49)
def recall_of_absent_sizes(t: Training) -> None:
    """The evaluation writes -1 for sizes that the set does not have, here large ones, and it is logged as their recall.
    Humbatova: wrong metrics; COCO's own convention."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = plain(tensors, batch)
        sides, lies = batch[1][..., 3].amax(), metrics["recall"]
        return {**metrics, "recall_large": lies if float(sides) > 24 else -1.0}

    t.measure = measure


@fault(detector, "metric-constant", step=49)
def threshold_in_percent(t: Training) -> None:
    """Scores from 0 to 1 are compared with a threshold of 50: precision and recall are 0 throughout. Humbatova: wrong metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        shown = torch.where(tensors["scores"].sigmoid() > 50, 1.0, -1.0)
        return detector.measure({**tensors, "scores": shown}, batch)

    t.measure = measure


@fault(detector, "metric-grad")
def terms_kept_with_graph(t: Training) -> None:
    """Terms of the loss are added up for the progress bar as tensors, with all graphs behind them. PyTorch FAQ; TrainCheck: memory."""
    sums: dict[str, torch.Tensor] = {}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        for name in ("objectness_loss", "class_loss", "box_loss"):
            sums[name] = sums.get(name, 0.0) + tensors[name]
        observer.log({name: value / (step + 1) for name, value in sums.items()}, "train", step)
        return batch, tensors

    t.update, t.steps = update, 120


@fault(detector, "validation-in-train-mode", step=49, then=("metric-phase-mismatch",))
def evaluated_without_eval(t: Training) -> None:
    """The evaluation has `torch.no_grad()` and no `model.eval()`: norms take the validation set into their statistics. TrainCheck: wrong
    mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
            metrics = {"loss": float(tensors["loss"]), **training.measure(tensors, batch)}
        observer.log(metrics, "val", step)

    t.validate = validate


@fault(detector, "metric-nonfinite", step=49)
def precision_of_what_is_never_told(t: Training) -> None:
    """Precision at a score of 0.999999: nothing is told, and 0 / 0 is the mean of none. GRIST: division by zero; Humbatova: wrong
    metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        sure, has = tensors["scores"] > math.log(1e6 - 1), detector.assigned(batch[1])[0]
        strict = float((sure * has).sum() / sure.sum())
        return {**detector.measure(tensors, batch), "strict_precision": strict}

    t.measure = measure
