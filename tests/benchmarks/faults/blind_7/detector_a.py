"""What goes wrong in detectors, once more: boxes, pictures, activations, the optimizer, names of metrics."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from faults import detector
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update

HEADS = ("objectness", "classes", "boxes")

# -- boxes and kinds -------------------------------------------------------------------------------------------------


@fault(detector, "nonfinite-loss", modules=("",), step=13, then=("loss-diverged", "metric-nonfinite"))
def detector_mean_of_no_large_things(t: Training) -> None:
    """The loss of boxes is told apart by size, a mean for small, medium and large things; a batch without a large one has the mean of no
    numbers. GRIST: division by zero; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        told, wanted = (x.movedim(1, -1)[has > 0] for x in (tensors["boxes"], box))
        sides = detector.ANCHOR * wanted[:, 2].exp()
        each = F.smooth_l1_loss(told, wanted, reduction="none").sum(1)
        placed = (each[sides < 7].mean() + each[(sides >= 7) & (sides < 10.4)].mean() + each[sides >= 10.4].mean()) / 3
        return {**tensors, "loss": tensors["objectness_loss"] + tensors["class_loss"] + 2 * placed, "box_loss": placed}

    t.forward = forward


@fault(detector, "loss-input-mismatch", modules=("classes", "classes.1", ""), then=("activation-saturated", "loss-plateau", "stalled-optimisation", "gradient-vanishing", "overtraining", "gradient-imbalance"))  # fmt: skip
def detector_softmax_of_kinds_in_front_of_its_loss(t: Training) -> None:
    """The map of kinds ends in a softmax for the display, and the cross entropy makes another: with three kinds it cannot fall below 0.55.
    Humbatova: wrong activation of the last layer; UMLAUT."""
    t.model.classes = nn.Sequential(t.model.classes, nn.Softmax(1))


@fault(detector, "stalled-optimisation", "loss-plateau", "prediction-collapse", then=(*STUCK, "overfit", "overtraining", "class-imbalance"))  # fmt: skip
def detector_annotations_of_the_next_picture(t: Training) -> None:
    """A picture that cannot be read is skipped in the list of pictures and not in that of annotations: from then on each has those of the
    next. Humbatova: wrong labels; TheDeepChecker."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return x, things.roll(1, 0)

    t.sample = sample


@fault(detector, "gradient-clipping", then=("gradient-exploding", "gradient-imbalance", "weight-norm-drift"))
def detector_sums_not_divided(t: Training) -> None:
    """The loss is multiplied by the numbers of cells and of pictures, as if it were their mean and the sum was wanted; the bound of 10
    for gradients now acts at each step. TheDeepChecker: wrong reduction; TrainCheck: wrong clip."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] * detector.GRID**2 * len(batch[0])}

    t.forward = forward


# -- pictures --------------------------------------------------------------------------------------------------------


@fault(detector, "input-range", "input-constant", "feature-constant", "output-constant", modules=("", "backbone", "backbone.stem", "backbone.stem.norm", "backbone.stem.conv"), then=(*STUCK, *FLAT, "class-imbalance", "overfit", "overtraining"))  # fmt: skip
def detector_pixels_divided_twice(t: Training) -> None:
    """Pixels are divided by 255 by the reader of pictures, and by 255 and the deviation of 58 again by the standardisation: all lie close
    to one number, and differ by a ten-thousandth. UMLAUT: input not normalised; SageMaker TensorVariance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return ((0.45 + 0.15 * x).clamp(0, 1) / 255 - 123.7) / 58.4, things

    t.sample = sample


@fault(detector, "input-dtype")
def detector_pictures_as_doubles(t: Training) -> None:
    """`np.asarray(picture) / 255.0` is float64 and stays so up to the model, which turns it back at its first line. TrainCheck: mistakes of
    dtype."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        return x.double(), things

    t.sample = sample
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))


@fault(detector, "overfit", "overtraining", "input-duplicate", step=1, then=("loss-plateau",))
def detector_first_batch_of_a_new_iterator(t: Training) -> None:
    """`next(iter(loader))` in the loop makes a new iterator for each step, and the loader does not shuffle: the first 16 pictures for ever.
    TrainCheck: duplicated data; SageMaker Overfit."""
    plain = t.sample
    t.model = detector.Detector(width=20)
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


# -- layers ----------------------------------------------------------------------------------------------------------


@fault(detector, "dropout-high", modules=("neck", "neck.1", *HEADS, ""), then=(*STUCK, *FLAT, "overtraining", "dead-units", "gradient-exploding", "activation-exploding", "class-imbalance", "loss-spike"))  # fmt: skip
def detector_blocks_that_are_kept(t: Training) -> None:
    """`Dropout2d(0.95)` behind the neck, the `keep_prob` of another library's DropBlock: one channel in twenty passes. TheDeepChecker:
    dropout; Humbatova: regularisation."""
    t.model.neck = nn.Sequential(t.model.neck, nn.Dropout2d(0.95))


@fault(detector, "activation-saturated", "poor-initialisation", modules=("backbone", "neck", ""), then=(*STUCK, "gradient-imbalance", "gradient-zero", "parameter-unchanged", "update-ratio-low", "prediction-collapse", "gradient-exploding", "loss-spike", "activation-exploding"))  # fmt: skip
def detector_tanh_of_wide_filters(t: Training) -> None:
    """Tanh and no norms, for a chip that has nothing else, and filters drawn with a deviation of two: every unit is at one of its ends.
    SageMaker SaturatedActivation and PoorWeightInitialization."""
    t.model = detector.Detector(norm=lambda channels: nn.Identity(), activation=nn.Tanh)
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            nn.init.normal_(module.weight, std=2.0)


@fault(detector, "units-symmetric", "poor-initialisation", modules=("backbone", "neck", *HEADS, ""), then=(*STUCK, *FLAT, "gradient-imbalance", "class-imbalance", "prediction-collapse"))  # fmt: skip
def detector_filters_of_one_number(t: Training) -> None:
    """All filters start at 0.02, which was to be their deviation: each layer has one filter, many times. TheDeepChecker: symmetric
    initialisation; Humbatova: wrong weights initialisation."""
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.02)
            if module is not t.model.objectness:
                nn.init.zeros_(module.bias)


# -- optimizer and metrics -------------------------------------------------------------------------------------------


@fault(detector, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-clipping", "gradient-exploding"))  # fmt: skip
def detector_optimizer_of_the_average(t: Training) -> None:
    """The optimizer is given the parameters of the averaged copy, which has the same names; the detector itself stays as it was.
    TrainCheck: parameters not in the optimizer."""
    average = copy.deepcopy(t.model)
    t.optimizers = [torch.optim.SGD(average.parameters(), 0.01, momentum=0.9)]


@fault(detector, "loss-diverged", "loss-sign", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-clipping", "activation-saturated", "dead-units", "prediction-collapse", "dtype-headroom", "gradient-imbalance"))  # fmt: skip
def detector_loss_maximised(t: Training) -> None:
    """`SGD(maximize=True)`, from a script that climbed a reward: the loss climbs. Humbatova: wrong optimiser settings; TheDeepChecker:
    wrong direction."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, maximize=True)


@fault(detector, "weight-norm-drift", "update-ratio-high", step=20, then=(*DIVERGES, "overtraining", *STUCK, *FLAT, "gradient-clipping", "dead-units", "prediction-collapse", "overfit", "activation-saturated", "dtype-headroom", "metric-constant"))  # fmt: skip
def detector_momentum_of_one(t: Training) -> None:
    """`momentum=1.0`: what was once added to the velocity never leaves it. Humbatova: wrong optimiser settings; AutoTrainer: oscillating
    loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=1.0, weight_decay=1e-4)


@fault(detector, "metric-phase-mismatch", "metric-missing", "metric-unexpected", step=49)
def detector_recall_at_another_name(t: Training) -> None:
    """Training logs `recall`, validation the same as `recal`: whoever keeps the best model by its recall finds none. Speech: metrics with
    another name in validation; Humbatova: wrong metrics."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        still = {name: value.detach() for name, value in tensors.items()}
        observer.log({"loss": float(still["loss"]), **detector.measure(still, batch)}, "train", step)
        return batch, tensors

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = detector.measure(tensors, batch)
        return {("recal" if name == "recall" else name): value for name, value in metrics.items()}

    t.update, t.measure = update, measure
