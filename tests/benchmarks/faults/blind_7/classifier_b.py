"""More that goes wrong in image classifiers: pixels, norms, regression of class numbers, rates, modes, metrics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update

NORMS = ("block1.norm", "block2.norm", "block3.norm")


@fault(classifier, "input-nonfinite", "nonfinite-input", "nonfinite-activation", then=(*NONFINITE, *STUCK, "nonfinite-buffer"))  # fmt: skip
def pixels_gamma_of_negatives(t: Training) -> None:
    """Gamma correction, a power of 0.45, has moved behind the standardisation: a root of negative numbers. GRIST: pow of a negative
    number; Humbatova: order of preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x.pow(0.45), y

    t.sample = sample


@fault(classifier, "norm-input-variance", "activation-vanishing", modules=("block1", "block2", "block3", *NORMS, ""), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "parameter-unchanged", "class-imbalance", "overtraining", "update-ratio-low", "module-unused"))  # fmt: skip
def picture_norms_of_keras(t: Training) -> None:
    """`BatchNorm2d(channels, 99, 0.001)`: from code with a momentum in percent and an epsilon, in that order; here the epsilon comes
    first, and is 99. Humbatova: layer properties; TheDeepChecker: wrong normalisation."""
    t.model = classifier.Classifier(norm=lambda channels: nn.BatchNorm2d(channels, 99, 0.001))


@fault(classifier, "output-constant", "stalled-optimisation", "loss-input-mismatch", modules=("", "head"), step=20, then=(*STUCK, *FLAT, "overtraining", "metric-constant", "loss-spike", "dead-units"))  # fmt: skip
def picture_column_minus_row(t: Training) -> None:
    """Class numbers are grades, and regressed: (32, 1) minus (32,) is (32, 32), each answer is compared with all grades, and the mean
    is best. UMLAUT: shapes; Humbatova: wrong tensor shape."""
    t.model.head = nn.Linear(144, 1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": (outputs - batch[1]).square().mean(), "outputs": outputs, "targets": batch[1]}

    t.forward = forward
    t.measure = lambda tensors, batch: {"error": float((tensors["outputs"][:, 0] - batch[1]).abs().mean())}


@fault(classifier, "scheduler-ends-early", "loss-diverged", step=100, then=(*DIVERGES, "loss-sign", *NONFINITE, *STUCK, *FLAT, "schedule-unfinished", "dead-units", "class-imbalance", "gradient-zero"))  # fmt: skip
def picture_rate_below_zero(t: Training) -> None:
    """A line to zero over 100 steps, without an end: after that the rate is negative, and the loss is climbed. Humbatova: learning
    rate; TheDeepChecker: diverging loss."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 - step / 100)


@fault(classifier, "update-ratio-high", "loss-diverged", "loss-spike", "weight-norm-drift", step=25, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-zero", "update-ratio-low", "class-imbalance"))  # fmt: skip
def picture_search_of_rates_kept(t: Training) -> None:
    """A search for the best rate runs up to 100 in 60 steps, and the weights that were kept from before it are not loaded back.
    Humbatova: training process; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 10 ** (step / 10 - 2) if step < 60 else 1.0)


class Contrast(classifier.Classifier):
    def forward(self, x):
        return super().forward((x - x.mean(0)) / (x.std(0) + 1e-5))


@fault(classifier, "nonfinite-activation", modules=("", "block1", "block1.conv"), step=124, then=(*NONFINITE, *STUCK, "nonfinite-input", "nonfinite-buffer", "batch-leak"))  # fmt: skip
def pictures_left_over_at_the_end(t: Training) -> None:
    """Each pixel is divided by its deviation over the batch; the last batch of the epoch has one picture, and none: 0 / 0. GRIST:
    division by zero."""
    plain, t.model = t.sample, Contrast()

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x[:1], y[:1]) if phase == "train" and step % 125 == 124 else (x, y)

    t.sample = sample


@fault(classifier, "activation-exploding", "gradient-exploding", "loss-diverged", "update-ratio-high", modules=("block1", "block2", "block3", "head", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-imbalance", "class-imbalance", "gradient-clipping", "poor-initialisation", "precision-headroom", "dtype-headroom"))  # fmt: skip
def picture_leak_of_twenty(t: Training) -> None:
    """`LeakyReLU(20)`, a slope in percent: what is negative is made twenty times larger by each layer, and nothing normalises.
    SageMaker ExplodingTensor; Humbatova: wrong activation."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity(), activation=lambda: nn.LeakyReLU(20))


@fault(classifier, "model-in-eval", modules=("", *NORMS), then=(*STUCK, "activation-vanishing", "gradient-vanishing", "overfit", "overtraining", "watch-starved", "probe-read-nothing"))  # fmt: skip
def picture_norms_frozen_at_birth(t: Training) -> None:
    """Norms are kept in eval mode, as in fine-tuning a detector's backbone; this one is trained from scratch, and they have seen no
    picture. TrainCheck: wrong mode, buffers."""
    t.model = classifier.Classifier(dropout=0.1)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        for module in training.model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d) and module.training)
        return plain_update(training, step, observer)

    t.update = update


@fault(classifier, "metric-type", step=49)
def picture_accuracy_of_classes(t: Training) -> None:
    """The accuracy is a tensor of one number a class: who keeps the best model by it compares five numbers. Humbatova: wrong metrics;
    speech: metrics of another type."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = (tensors["logits"].argmax(1) == batch[1]).float()
        one_hot = F.one_hot(batch[1], classifier.CLASSES).float()
        return {"accuracy": right @ one_hot / one_hot.sum(0).clamp(min=1)}

    t.measure = measure


@fault(classifier, "update-ratio-low", "stalled-optimisation", "loss-plateau", then=(*STUCK, *FLAT, "parameter-unchanged", "class-imbalance"))  # fmt: skip
def picture_rate_for_adadelta(t: Training) -> None:
    """Adadelta finds its own steps and is meant for a rate of 1; it gets the 1e-3 of Adam. Humbatova: learning rate, optimiser;
    SageMaker WeightUpdateRatio."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.Adadelta(p, 1e-3)


@fault(classifier, "activation-saturated", "feature-constant", "output-constant", "prediction-collapse", "gradient-zero", "gradient-vanishing", modules=("block1", "block2", "block3", "head", ""), then=(*STUCK, *FLAT, "dead-units", "parameter-unchanged", "module-unused", "units-symmetric", "update-ratio-low", "class-imbalance", "poor-initialisation"))  # fmt: skip
def picture_relu_of_six_negative(t: Training) -> None:
    """`Hardtanh(-6, -0.5)` for a ReLU6 with a leak, bounds and slope mixed up: whatever is above -0.5 is cut to it, and passes no
    gradient. TheDeepChecker: saturated activation; Humbatova: wrong activation."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity(), activation=lambda: nn.Hardtanh(-6.0, -0.5))


@fault(classifier, "input-constant", "input-duplicate", then=(*STUCK, *FLAT, "dead-units", "update-ratio-low", "gradient-zero", "class-imbalance", "gradient-vanishing"))  # fmt: skip
def picture_of_the_alpha_channel(t: Training) -> None:
    """Pictures have got a fourth channel, and `picture[-1]` now reads how opaque they are: 1 everywhere. TheDeepChecker: constant inputs;
    Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return torch.cat([x, torch.ones_like(x)], 1)[:, -1:], y

    t.sample = sample


class Cosines(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


@fault(classifier, "loss-input-mismatch", modules=("head", ""), then=(*STUCK, "gradient-vanishing", "update-ratio-low", "overtraining", "parameter-unchanged"))  # fmt: skip
def picture_cosines_without_temperature(t: Training) -> None:
    """The head compares directions, as for faces, and the factor of 30 in front of the cross entropy is missing: no score is beyond 1.
    Humbatova: wrong loss for the last layer; UMLAUT."""
    t.model.head = Cosines(144, classifier.CLASSES, bias=False)


@fault(classifier, "nonfinite-activation", modules=("head", "head.parametrizations", "head.parametrizations.weight", "head.parametrizations.weight.0"), then=(*NONFINITE, *STUCK))  # fmt: skip
def picture_head_of_length_zero(t: Training) -> None:
    """The head's weights begin at zero, and are split into length and direction by `weight_norm`: 0 / 0. GRIST: division by zero;
    Humbatova: initial weights."""
    nn.init.zeros_(t.model.head.weight)
    nn.utils.parametrizations.weight_norm(t.model.head)
