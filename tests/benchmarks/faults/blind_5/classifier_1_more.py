"""More of what goes wrong in image classifiers: small filters, pooling, weights of classes, names and modes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import classifier
from faults._fault import FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update


@fault(classifier, "activation-vanishing", "poor-initialisation", "gradient-vanishing", "feature-constant", modules=("block1", "block2", "block3", ""), then=(*STUCK, *FLAT, "output-constant", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def filters_of_a_thousandth(t: Training) -> None:
    """`normal_(std=0.001)`, from the last layer of a detector, for all filters, without norms: the head sees its biases only. SageMaker
    PoorWeightInitialization; AutoTrainer: vanishing gradient."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    for block in (t.model.block1, t.model.block2, t.model.block3):
        nn.init.normal_(block.conv.weight, 0, 1e-3)
        nn.init.zeros_(block.conv.bias)


@fault(classifier, "metric-phase-mismatch", "metric-missing", "metric-unexpected", step=24)
def accuracy_with_one_c(t: Training) -> None:
    """Training logs `accuracy`, validation `acuracy`: whoever keeps the best model by its name finds none. Humbatova: wrong metrics;
    speech: metrics of another name."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        observer.log({"loss": float(tensors["loss"]), **classifier.measure(tensors, batch)}, "train", step)
        return batch, tensors

    t.update, t.val_every = update, 25
    t.measure = lambda tensors, batch: {"acuracy": classifier.measure(tensors, batch)["accuracy"]}


@fault(classifier, "feature-constant", "activation-vanishing", "output-constant", "gradient-vanishing", modules=("block3", "block3.pool", "head", ""), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "dead-units", "gradient-zero", "update-ratio-low"))  # fmt: skip
def mean_behind_an_instance_norm(t: Training) -> None:
    """InstanceNorm takes the mean of each channel away, and global average pooling right behind it asks for that mean: zero for all
    pictures. TheDeepChecker: wrong normalisation; Humbatova: order of layers."""
    t.model.block3.norm, t.model.block3.activation = nn.InstanceNorm2d(16), nn.Identity()
    t.model.block3.add_module("pool", nn.AdaptiveAvgPool2d(1))
    t.model.head = nn.Linear(16, classifier.CLASSES)


@fault(
    classifier, "nonfinite-loss", "nonfinite-gradient", then=(*NONFINITE, *STUCK, "nonfinite-buffer", "class-imbalance")
)
def weight_of_an_absent_class(t: Training) -> None:
    """Classes are weighed by one over their counts, smoothed labels ask for all of them, and a sixth class has no picture yet: 1 / 0.
    GRIST: division by zero."""
    t.model.head = nn.Linear(144, classifier.CLASSES + 1)
    weights = classifier.ITEMS / torch.bincount(classifier.pictures(classifier.ITEMS, 0)[1], minlength=6).float()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.cross_entropy(logits, batch[1], weights, label_smoothing=0.1)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "validation-in-train-mode", step=49)
def images_validated_with_dropout(t: Training) -> None:
    """The function that validates lost its `model.eval()` in a merge: dropout and batch statistics stay on. TrainCheck: wrong mode."""
    t.model = classifier.Classifier(dropout=0.4)

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
            metrics = {"loss": float(tensors["loss"]), **training.measure(tensors, batch)}
        observer.log(metrics, "val", step)

    t.validate = validate
