"""What goes wrong around networks of point clouds: optimizers, classes and parts, losses by hand, modes, metrics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import points
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

# -- optimizers ------------------------------------------------------------------------------------------------------


@fault(points, "optimizer-misses-parameters", "parameter-unchanged", modules=("segment1", "segment2", "part"), then=("gradient-exploding", "gradient-imbalance", "gradient-accumulation", "optimizer-owns-others"))  # fmt: skip
def branch_of_parts_added_late(t: Training) -> None:
    """The classifier came first, with its optimizer; the layers that find parts are made behind it. TrainCheck: parameters not in
    the optimizer."""
    t.optimizers = [t.optimize(t.model.parameters())]
    fresh = points.PointNet()
    t.model.segment1, t.model.segment2, t.model.part = fresh.segment1, fresh.segment2, fresh.part


@fault(points, "optimizer-frozen-parameters", "parameter-unchanged", modules=("transform", "local1", "local2", "deep1", "deep2"), then=("gradient-zero", "module-unused"))  # fmt: skip
def encoder_frozen_without_weights(t: Training) -> None:
    """All in front of the pool is frozen as in fine-tuning, but these weights are random: nothing was loaded. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    for part in (t.model.transform, t.model.local1, t.model.local2, t.model.deep1, t.model.deep2):
        part.requires_grad_(requires_grad=False)


@fault(points, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "gradient-imbalance", "dead-units", "class-imbalance", "gradient-zero"))  # fmt: skip
def zeroed_once_in_an_epoch(t: Training) -> None:
    """`zero_grad()` stands beside `for epoch`, not beside `for batch`: gradients of 58 batches add up. TrainCheck: misplaced
    `zero_grad`."""

    def before(training: Training, step: int) -> None:
        optimizer = training.optimizer
        if step == 0:
            training.epoch = optimizer.zero_grad
            optimizer.zero_grad = lambda *args, **kwargs: None
        if step % 58 == 0:
            training.epoch()

    t.before.append(before)


@fault(points, "model-in-eval", step=30, then=("overfit", "overtraining", "loss-spike", "watch-starved", "probe-read-nothing"))  # fmt: skip
def points_validated_for_good(t: Training) -> None:
    """`model.train()` stands in front of the loop over epochs only; the first validation, at step 30, leaves eval mode on. TrainCheck:
    wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 30)
        return plain_update(training, step, observer)

    t.update = update


@fault(points, "validation-in-train-mode", step=29, modules=("",), then=("overfit", "overtraining", "batch-leak"))
def votes_with_dropout(t: Training) -> None:
    """Validation takes its mean over poses with the model as it is, in train mode, so that the votes differ. TrainCheck: wrong mode;
    Humbatova: training process."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        metrics = []
        with observer.phase("val"), torch.no_grad():
            for i in range(2):
                batch = training.sample(step * 2 + i, "val")
                tensors = training.forward(training.model, batch)
                metrics.append({"loss": float(tensors["loss"]), **training.measure(tensors, batch)})
        observer.log({name: sum(m[name] for m in metrics) / 2 for name in metrics[0]}, "val", step)

    t.validate = validate


@fault(points, "dropout-high", modules=("dropout",), then=(*STUCK, *FLAT, "overtraining", "prediction-collapse", "class-imbalance"))  # fmt: skip
def points_kept_as_dropped(t: Training) -> None:
    """The first code of PointNet has `keep_prob`; its 0.95 is handed to a layer that takes the share to drop. TheDeepChecker: dropout;
    Humbatova: layer properties."""
    t.model.dropout.p = 0.95


# -- classes and parts -----------------------------------------------------------------------------------------------


@fault(points, "stalled-optimisation", step=30, then=(*STUCK, *FLAT, "overfit", "overtraining"))  # fmt: skip
def classes_of_another_listing(t: Training) -> None:
    """Clouds come sorted by size, their classes as the folder lists them; parts lie in the files of the clouds. Humbatova: wrong
    labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        return x, y[torch.randperm(len(y), generator=seeded(11, step))], parts

    t.sample = sample


@fault(points, "overfit", "overtraining", "input-duplicate", step=1, then=("weight-norm-drift", "loss-plateau", "input-drift"))  # fmt: skip
def two_dozen_models(t: Training) -> None:
    """`clouds[:24]` and no augmentation, from a first test, stay: one batch is learnt by heart. SageMaker Overfit; TheDeepChecker:
    overfitting."""
    plain = t.sample
    kept = plain(0, "train")

    def sample(step: int, phase: str) -> Batch:
        order = torch.randperm(24, generator=seeded(12, step))
        return tuple(value[order] for value in kept) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(points, "nonfinite-loss", step=1, then=(*NONFINITE, *STUCK, "nonfinite-buffer"))
def weights_of_the_parts_at_hand(t: Training) -> None:
    """Parts are weighed by one over their counts in the batch, scaled to a sum of one; a batch without an edge gives Inf / Inf. GRIST:
    division by zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        weight = 1 / torch.bincount(batch[2].flatten(), minlength=len(points.PARTS))
        loss = F.cross_entropy(logits, batch[1]) + F.cross_entropy(found, batch[2], weight / weight.sum())
        loss = loss + 0.01 * points.orthogonality(matrix)
        return {"loss": loss, "logits": logits, "targets": batch[1], "points": found}

    t.forward = forward


@fault(points, "nonfinite-gradient", "nonfinite-parameter", modules=("", "transform", "transform.matrix"), then=(*NONFINITE, *STUCK))  # fmt: skip
def distance_of_a_point_to_itself(t: Training) -> None:
    """A term keeps the distances between the points when they are turned; the root of the squares has an infinite slope for a point
    and itself. GRIST: slope of a root at zero."""

    def distances(x: torch.Tensor) -> torch.Tensor:
        return (x[:, :, :, None] - x[:, :, None, :]).square().sum(1).sqrt()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        kept = (distances(matrix @ batch[0]) - distances(batch[0])).abs().mean()
        loss = F.cross_entropy(logits, batch[1]) + F.cross_entropy(found, batch[2]) + 0.1 * kept
        return {"loss": loss, "logits": logits, "targets": batch[1], "points": found}

    t.forward = forward


@fault(points, "loss-input-mismatch", modules=("part", ""), then=(*STUCK, "gradient-vanishing", "gradient-zero", "activation-saturated", "overfit", "overtraining"))  # fmt: skip
def parts_through_a_softmax(t: Training) -> None:
    """The layers of the parts end in a softmax, for the pictures of a demo, and cross entropy makes another. Humbatova: wrong loss for
    the last layer; UMLAUT."""
    t.model.part = nn.Sequential(t.model.part, nn.Softmax(1))


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(points, "metric-nonfinite", step=29, then=("metric-range",))
def iou_of_a_part_that_nobody_has(t: Training) -> None:
    """The data set lists a fifth part, which no shape has: its union is empty, and the mean over parts is 0 / 0. GRIST: division by
    zero; Humbatova: wrong metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        found = tensors["points"].argmax(1)
        iou = [((found == c) & (batch[2] == c)).sum() / ((found == c) | (batch[2] == c)).sum() for c in range(5)]
        return {**points.measure(tensors, batch), "part_iou": float(sum(iou) / 5)}

    t.measure = measure


@fault(points, "metric-constant", step=29)
def iou_of_numbers_from_four(t: Training) -> None:
    """Parts are numbered through all shapes in the annotation, from 4 on, and from 0 in the model; the metric compares the two: 0.
    Humbatova: wrong metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        found, wanted = tensors["points"].argmax(1), batch[2] + len(points.PARTS)
        iou = [
            ((found == c) & (wanted == c)).sum() / ((found == c) | (wanted == c)).sum().clamp(min=1) for c in range(4)
        ]
        return {**points.measure(tensors, batch), "part_iou": float(sum(iou) / 4)}

    t.measure = measure


@fault(points, "metric-phase-mismatch", "metric-missing", "metric-unexpected", step=29)
def miou_and_part_iou(t: Training) -> None:
    """Training calls it `part_iou`, validation `parts_iou`, and the checkpoint with the best one is chosen by the first name. speech:
    metrics of another name in validation; Humbatova: wrong metrics."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        observer.log({"loss": float(tensors["loss"]), **points.measure(tensors, batch)}, "train", step)
        return batch, tensors

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        values = points.measure(tensors, batch)
        return {"shape_accuracy": values["shape_accuracy"], "parts_iou": values["part_iou"]}

    t.update, t.measure = update, measure
