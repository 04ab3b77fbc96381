"""What goes wrong in image classifiers."""

from __future__ import annotations

import math

import torch
from torch import nn

from faults import classifier
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Training, seeded


@fault(classifier, "dead-units", modules=("block2",), then=(*STUCK, "feature-constant", "gradient-zero", "gradient-vanishing", "norm-input-variance", "parameter-unchanged", "module-unused", "poor-initialisation"))  # fmt: skip
def dead_relu(t: Training) -> None:
    """A shift of -6 after the second normalisation: its ReLU never opens. SageMaker DeadRelu; TheDeepChecker."""
    nn.init.constant_(t.model.block2.norm.bias, -6.0)


@fault(classifier, "update-ratio-high", "loss-diverged", "gradient-exploding", "activation-exploding", "loss-spike", then=(*NONFINITE, *DIVERGES, *STUCK, "dead-units"))  # fmt: skip
def rate_too_high(t: Training) -> None:
    """A learning rate of 5 where 0.01 works. TheDeepChecker: diverging; Humbatova: learning rate."""
    t.optimize = lambda p: torch.optim.SGD(p, 5.0, momentum=0.9)


@fault(classifier, "loss-plateau", "stalled-optimisation", "prediction-collapse", step=60)
def labels_shuffled(t: Training) -> None:
    """Labels of another picture: the collate function sorts only one of the two. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, y = plain(step, phase)
        return x, y[torch.randperm(len(y), generator=seeded(1, step))]

    t.sample = sample


@fault(classifier, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("head",))
def head_replaced_too_late(t: Training) -> None:
    """The head for the new classes is put in after the optimizer was built. TrainCheck: huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.head = nn.Linear(t.model.head.in_features, classifier.CLASSES)


@fault(classifier, "input-drift", step=49)
def validation_not_normalised(t: Training) -> None:
    """Pictures of 0 to 255 in validation, normalised ones in training. SageMaker CheckInputImages."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, y = plain(step, phase)
        return (x * 50 + 110 if phase == "val" else x), y

    t.sample = sample


@fault(classifier, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "block1"), step=120, then=NONFINITE)  # fmt: skip
def corrupt_picture(t: Training) -> None:
    """One pixel of one picture is NaN from step 120 on. SageMaker ExplodingTensor; TheDeepChecker: corrupt data."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, y = plain(step, phase)
        if phase == "train" and step >= 120:
            x = x.clone()
            x[3, 0, 2, 2] = math.nan
        return x, y

    t.sample = sample


@fault(classifier, "loss-input-mismatch", "activation-saturated", "gradient-vanishing", "loss-plateau", "stalled-optimisation", modules=("head",))  # fmt: skip
def softmax_twice(t: Training) -> None:
    """The model ends in a softmax, and the loss has another one. Humbatova: wrong loss for the last layer."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(-1))
    t.optimize = lambda p: torch.optim.SGD(p, 0.2, momentum=0.9)


@fault(classifier, "gradient-zero", "parameter-unchanged", "module-unused", modules=("block1", "block2", "block3"))
def features_detached(t: Training) -> None:
    """A `detach()` left over from debugging, between features and head. SageMaker UnchangedTensor; TrainCheck."""
    t.model.block3.register_forward_hook(lambda module, args, output: output.detach())


@fault(classifier, "class-imbalance", "prediction-collapse", step=20)
def one_class_in_thirty(t: Training) -> None:
    """The sampler draws one class in 29 of 30 cases; validation is balanced. SageMaker ClassImbalance."""
    x, y = classifier.pictures(
        4000, 3, torch.where(torch.rand(4000, generator=seeded(5)) < 29 / 30, 2, torch.arange(4000) % 5)
    )
    plain = t.sample

    def sample(step: int, phase: str):
        chosen = torch.randint(len(x), (classifier.BATCH,), generator=seeded(step))
        return (x[chosen], y[chosen]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(classifier, "gradient-accumulation", "gradient-exploding", "update-ratio-high", "loss-diverged", "weight-norm-drift", step=5, then=(*DIVERGES, *NONFINITE, *STUCK, "dead-units"))  # fmt: skip
def zero_grad_forgotten(t: Training) -> None:
    """Gradients of all steps add up. TrainCheck: missing `zero_grad`."""

    def keep(training: Training, step: int) -> None:
        training.optimizer.zero_grad = lambda set_to_none=True: None

    t.before.append(keep)


@fault(classifier, "units-symmetric", "poor-initialisation", modules=("block2",), then=(*STUCK, "feature-constant"))  # fmt: skip
def constant_weights(t: Training) -> None:
    """All weights of the second convolution are 0.05: its channels stay one. TheDeepChecker: symmetry; SageMaker
    PoorWeightInitialization."""
    nn.init.constant_(t.model.block2.conv.weight, 0.05)
    nn.init.constant_(t.model.block2.conv.bias, 0.0)


@fault(classifier, "overfit", "overtraining", step=100)
def twenty_four_pictures(t: Training) -> None:
    """A `subset=24` from debugging was never taken out: the pictures are learnt by heart. SageMaker Overfit."""
    x, y = classifier.pictures(24, 3)
    plain = t.sample
    t.sample = lambda step, phase: (x, y) if phase == "train" else plain(step, phase)
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)
    t.steps = 400


@fault(classifier, "input-constant", step=100, then=(*STUCK, "loss-spike", "loss-diverged", "norm-input-variance", "feature-constant", "gradient-zero", "dead-units", "input-drift", "gradient-vanishing", "activation-vanishing"))  # fmt: skip
def black_pictures(t: Training) -> None:
    """From step 100 on the loader returns zeros for files that it cannot read. TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, y = plain(step, phase)
        return (torch.zeros_like(x) if phase == "train" and step >= 100 else x), y

    t.sample = sample


@fault(classifier, "class-imbalance", "prediction-collapse", "loss-spike", "loss-plateau", "stalled-optimisation", step=20)  # fmt: skip
def pictures_without_shuffling(t: Training) -> None:
    """Sorted by class, ten steps of each in turn: the loss swings and never comes down. Humbatova: no shuffling."""
    x, y = classifier.pictures(4000, 3)
    plain = t.sample

    def sample(step: int, phase: str):
        if phase != "train":
            return plain(step, phase)
        rows = (y == step // 10 % classifier.CLASSES).nonzero()[:, 0]
        chosen = rows[torch.randint(len(rows), (classifier.BATCH,), generator=seeded(step))]
        return x[chosen], y[chosen]

    t.sample = sample
