"""What goes wrong in image classifiers: gains, pooling, splits, integers, precision, losses, schedules, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


@fault(classifier, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", "output-constant", modules=("block3", ""), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "update-ratio-low"))  # fmt: skip
def zero_gains_of_resnets(t: Training) -> None:
    """The gain of the last norm begins at zero, good for residual blocks; here is no shortcut, and a ReLU behind it: no gradient comes
    through. SageMaker AllZero; Humbatova: wrong weights initialisation."""
    nn.init.zeros_(t.model.block3.norm.weight)


@fault(classifier, "dropout-high", modules=("dropout",), then=(*STUCK, *FLAT, "overtraining", "loss-spike", "gradient-exploding"))  # fmt: skip
def dropout_of_97_percent(t: Training) -> None:
    """`Dropout(0.97)` in front of the head, where the configuration has the share that is kept. TheDeepChecker: dropout."""
    t.model = classifier.Classifier(dropout=0.97)


@fault(classifier, "activation-saturated", "poor-initialisation", "activation-exploding", modules=("block1", "block2", "block3"), then=(*STUCK, *FLAT, "gradient-exploding", "gradient-imbalance", "update-ratio-low", "overfit", "overtraining", "gradient-zero"))  # fmt: skip
def tanh_behind_large_filters(t: Training) -> None:
    """Filters drawn with the root of the fan-in as deviation where it divides, tanh and no norms: all is -1 or 1. SageMaker
    SaturatedActivation; TheDeepChecker."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity(), activation=nn.Tanh)
    for block in (t.model.block1, t.model.block2, t.model.block3):
        nn.init.normal_(block.conv.weight, 0, block.conv.weight[0].numel() ** 0.5)


class Statistics(nn.Module):
    """Mean and deviation of each channel, as speaker recognition does."""

    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.var((2, 3)).sqrt()], 1)


@fault(classifier, "nonfinite-gradient", "nonfinite-parameter", modules=("block3", "block3.pool", "block3.drop", ""), then=(*NONFINITE, *STUCK, "nonfinite-buffer", "dead-units"))  # fmt: skip
def deviation_of_a_dropped_channel(t: Training) -> None:
    """Deviations of channels are pooled behind a dropout of whole channels: the root of a variance of zero has an infinite slope.
    GRIST: root of zero."""
    t.model.block3.add_module("drop", nn.Dropout2d(0.1))
    t.model.block3.add_module("pool", Statistics())
    t.model.head = nn.Linear(32, classifier.CLASSES)


@fault(classifier, "class-imbalance", then=("overfit", "overtraining", "loss-diverged", "input-drift"))
def split_of_a_sorted_list(t: Training) -> None:
    """The list of files is sorted by class and cut at eighty percent: training has the first four classes, validation has all since it
    was drawn before. Humbatova: wrong split; SageMaker ClassImbalance."""
    plain, (x, y) = t.sample, classifier.pictures(classifier.ITEMS, 0)
    x, y = x[y < 4], y[y < 4]

    def sample(step: int, phase: str) -> Batch:
        start = 32 * step % 3000
        return (x[start : start + 32], y[start : start + 32]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(classifier, "input-constant", "input-duplicate", "feature-constant", then=(*STUCK, *FLAT, "output-constant", "dead-units", "gradient-zero", "gradient-vanishing", "input-range", "gradient-exploding", "gradient-imbalance", "prediction-collapse"))  # fmt: skip
def floor_division_by_255(t: Training) -> None:
    """`x // 255` of integers: only a pixel of 255 is more than zero. TheDeepChecker: constant inputs; Humbatova: wrong
    preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return ((127 + 25 * x).clamp(0, 254).long() // 255).float(), y

    t.sample = sample


@fault(classifier, "input-dtype")
def doubled_for_numpy(t: Training) -> None:
    """NumPy makes float64 of the pictures, and the error about types was answered by `model.double()`: twice the memory. TrainCheck:
    dtype; Humbatova: wrong type of data."""
    t.model, plain = t.model.double(), t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x.double(), y

    t.sample = sample


@fault(classifier, "loss-input-mismatch", modules=("head", ""), then=(*STUCK, "gradient-vanishing", "gradient-zero", "overfit", "activation-saturated"))  # fmt: skip
def probabilities_into_nll(t: Training) -> None:
    """`Softmax` at the end where `nll_loss` asks for `LogSoftmax`: the loss lies between -1 and 0. Humbatova: wrong loss for the last
    layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(1))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        shares = model(batch[0])
        return {"loss": F.nll_loss(shares, batch[1]), "logits": shares, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "step-skipped", "nonfinite-gradient", "dtype-headroom", step=2, then=("gradient-exploding", "parameter-unchanged", "nonfinite-activation", "nonfinite-loss"))  # fmt: skip
def scaler_grows_at_every_step(t: Training) -> None:
    """`GradScaler(growth_interval=1)`: the scale doubles after each good step, so that about every other step overflows and is left
    out. TrainCheck: scaler misuse."""
    t.precision, t.scaled, t.steps = torch.float16, True, 120

    def before(training: Training, step: int) -> None:
        training.scaler.set_growth_interval(1)

    t.before.append(before)


@fault(classifier, "metric-range", step=49)
def accuracy_over_another_batch_size(t: Training) -> None:
    """Right answers are divided by the batch size of the configuration, 16; the loader of the validation set has 32. Humbatova: wrong
    metrics; UMLAUT: accuracy above one."""
    t.measure = lambda tensors, batch: {"accuracy": float((tensors["logits"].argmax(1) == batch[1]).sum()) / 16}


class Slow(OneCycleLR):
    """Steps once in fifty calls."""

    calls = 0

    def step(self, epoch=None) -> None:
        self.calls += 1
        if self.calls % 50 == 1:
            super().step(epoch)


@fault(classifier, "schedule-unfinished", "update-ratio-low", then=(*STUCK, "loss-plateau", "stalled-optimisation"))
def one_cycle_in_epochs(t: Training) -> None:
    """A one-cycle schedule of as many steps as there are batches is stepped at the end of each epoch: it never leaves its start.
    Humbatova: learning rate; TrainCheck: schedules."""

    def schedule(optimizer: torch.optim.Optimizer) -> LRScheduler:
        return Slow(optimizer, 0.02, total_steps=t.steps, div_factor=1e4)

    t.schedule = schedule


@fault(classifier, "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "gradient-zero", "gradient-vanishing"))  # fmt: skip
def weight_of_the_only_term(t: Training) -> None:
    """The weight of a side task, 1e-5, has moved to the only term that is left. Humbatova: wrong loss; SageMaker WeightUpdateRatio."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = classifier.forward(model, batch)
        return {**tensors, "loss": 1e-5 * tensors["loss"]}

    t.forward = forward


class Helped(classifier.Classifier):
    """A second head in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.helper = nn.Linear(16 * 25, classifier.CLASSES)

    def forward(self, x):
        middle = self.block2(self.block1(x))
        self.guess = self.helper(middle.flatten(1))
        return self.head(self.block3(middle).flatten(1))


@fault(
    classifier, "module-unused", "parameter-unchanged", "gradient-zero", modules=("helper",), then=("update-ratio-low",)
)
def helper_not_in_the_loss(t: Training) -> None:
    """The second head of deep supervision runs, and its loss was never added. TrainCheck: parameters without gradients; SageMaker
    UnchangedTensor."""
    t.model = Helped()


@fault(classifier, "nonfinite-optimizer", "nonfinite-parameter", "update-ratio-high", step=150, then=(*DIVERGES, *NONFINITE, *STUCK, "dead-units", "nonfinite-buffer"))  # fmt: skip
def rate_over_the_steps_left(t: Training) -> None:
    """The rate is divided by the share of steps that are left, where it should be multiplied: at the end of the schedule it is
    infinite. GRIST: division by zero; Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: float(1 / torch.tensor((200 - step) / 200)))
