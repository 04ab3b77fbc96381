"""What goes wrong in image classifiers: losses, rates of groups, weights of classes, augmentation, surgery."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


@fault(classifier, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", "activation-saturated", modules=("head", ""), then=(*STUCK, *FLAT, "dead-units", "weight-norm-drift", "update-ratio-low", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def sigmoid_before_its_loss(t: Training) -> None:
    """One against all others with `binary_cross_entropy_with_logits`, and the model ends in a sigmoid already. Humbatova: wrong
    loss for the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Sigmoid())
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits, F.one_hot(batch[1], classifier.CLASSES).float())
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "update-ratio-high", "weight-norm-drift", "loss-spike", "loss-diverged", "gradient-exploding", modules=("head",), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-imbalance", "gradient-zero", "activation-saturated", "dtype-headroom"))  # fmt: skip
def factor_of_the_head(t: Training) -> None:
    """The new head should learn ten times as fast as the rest, but the configuration's factor of 1000 is taken: a rate of 10.
    Humbatova: learning rate; AutoTrainer: oscillating loss."""
    head = list(t.model.head.parameters())
    rest = [p for name, p in t.model.named_parameters() if not name.startswith("head")]
    t.optimize = lambda p: torch.optim.SGD([{"params": rest}, {"params": head, "lr": 10.0}], 0.01, momentum=0.9)


@fault(classifier, "class-imbalance", "prediction-collapse", then=("overfit", "overtraining"))
def weights_of_classes_upside_down(t: Training) -> None:
    """One class is 25 times rarer than the others, in validation as well, and classes are weighed by their share where its
    inverse was meant: it is never predicted. SageMaker ClassImbalance; Humbatova: wrong loss."""
    rare = lambda n, seed: torch.where(torch.rand(n, generator=seeded(seed)) < 0.01, 4, torch.arange(n) % 4)  # noqa: E731
    data = {
        "train": classifier.pictures(4000, 51, rare(4000, 51)),
        "val": classifier.pictures(800, 52, rare(800, 52)),
    }
    weight = torch.bincount(data["train"][1], minlength=classifier.CLASSES) / 800

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (classifier.BATCH,), generator=seeded(51, step, len(phase)))
        return x[chosen], y[chosen]

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], weight), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(classifier, "input-constant", "input-duplicate", "input-drift", then=(*STUCK, "overfit", "overtraining", "norm-input-variance", "feature-constant"))  # fmt: skip
def erased_completely(t: Training) -> None:
    """Random erasing with an area in percent where a share is meant: seven of ten pictures are erased from edge to edge.
    TheDeepChecker: constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        kept = torch.rand(len(x), 1, 1, 1, generator=seeded(53, step)) > 0.7
        return (x * kept if phase == "train" else x), y

    t.sample = sample


@fault(classifier, "model-changed", "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("head",), step=120, then=(*DIVERGES, "gradient-zero", "module-unused", "gradient-imbalance", "overfit", "loss-plateau", "stalled-optimisation", "update-ratio-low", "class-imbalance"))  # fmt: skip
def head_grown_in_the_middle(t: Training) -> None:
    """A sixth class is announced at step 120, and the head is built anew for it: the optimizer goes on with the old one.
    TrainCheck: huggingface/accelerate#2665; Humbatova: training process."""

    def grow(training: Training, step: int) -> None:
        if step == 120:
            training.model.head = nn.Linear(training.model.head.in_features, classifier.CLASSES + 1)

    t.before.append(grow)
