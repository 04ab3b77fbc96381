"""What goes wrong in image classifiers: optimizer settings, schedules, scales of pictures, last layers, groups, metrics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, StepLR

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

# -- optimizer and schedule ------------------------------------------------------------------------------------------


@fault(classifier, "update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def rate_over_all_pictures(t: Training) -> None:
    """The learning rate is divided by the number of pictures, of which the loss is a mean already: 2.5e-6. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01 / classifier.ITEMS, momentum=0.9)


@fault(classifier, "weight-norm-drift", step=20, then=("activation-vanishing", *STUCK, *FLAT, "dead-units", "update-ratio-low", "loss-diverged", "weight-decay-on-norms", "gradient-exploding"))  # fmt: skip
def momentum_given_as_decay(t: Training) -> None:
    """`SGD(p, 0.01, 0, 0, 0.9)`: by position the 0.9 is no momentum but the weight decay. Humbatova: parameters of the
    optimiser; TheDeepChecker: wrong regularisation."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, 0, 0, 0.9)


@fault(classifier, "weight-norm-drift", "update-ratio-high", "loss-diverged", "activation-exploding", "dead-units", step=20, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero"))  # fmt: skip
def momentum_without_decay(t: Training) -> None:
    """A momentum of 1.0: velocities add up for ever and forget nothing. Humbatova: parameters of the optimiser; AutoTrainer:
    oscillating loss."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=1.0)


@fault(classifier, "update-ratio-high", "loss-diverged", "loss-spike", "gradient-exploding", "dead-units", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "gradient-zero", "class-imbalance"))  # fmt: skip
def sum_over_the_pictures(t: Training) -> None:
    """`reduction="sum"` at the rate of the mean, in a network without normalisation: steps 32 times too large.
    TheDeepChecker: missing reduction; Humbatova: wrong loss."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], reduction="sum"), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "update-ratio-high", "loss-spike", "loss-diverged", "gradient-exploding", step=70, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "overfit"))  # fmt: skip
def milestones_times_ten(t: Training) -> None:
    """`StepLR(gamma=10)`: the rate is multiplied by ten at each milestone where a tenth is meant. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.schedule = lambda optimizer: StepLR(optimizer, 70, gamma=10)


@fault(classifier, "update-ratio-low", "loss-plateau", "stalled-optimisation", "scheduler-ends-early", step=60, then=(*STUCK, "parameter-unchanged", "overtraining"))  # fmt: skip
def decayed_at_every_batch(t: Training) -> None:
    """`ExponentialLR(0.85)` is meant for epochs and stepped at every batch: nothing moves after the first hundred. Humbatova:
    learning rate; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.85)


@fault(classifier, "scheduler-ends-early", then=("loss-spike", "overtraining", "schedule-unfinished"))
def cosine_of_too_few_batches(t: Training) -> None:
    """`T_max` is counted without the second half of the data set: the cosine is over at step 150, and the rate rises again.
    Humbatova: learning rate; TrainCheck: schedules."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 150)
    t.optimize = lambda p: torch.optim.SGD(p, 0.03, momentum=0.9)


@fault(classifier, "gradient-clipping", "update-ratio-low", "loss-plateau", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "gradient-exploding"))  # fmt: skip
def clipped_to_the_rate(t: Training) -> None:
    """`clip_grad_norm_(parameters, lr)`: the bound is the second argument, and gets a rate of 0.001. TrainCheck: wrong clip."""
    t.clip = 1e-3
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(classifier, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=("gradient-accumulation", "gradient-exploding", *STUCK, "update-ratio-low"))  # fmt: skip
def optimizer_of_the_first_fold(t: Training) -> None:
    """Cross-validation builds a new model for each fold and goes on with the optimizer of the first. TrainCheck: parameters not
    in the optimizer; Humbatova: training process."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = classifier.Classifier()


@fault(classifier, "optimizer-misses-parameters", "parameter-unchanged", modules=("block2",), then=("gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def group_of_one_block_forgotten(t: Training) -> None:
    """Groups with rates of their own are made by hand, one for each block, and the second block has none. TrainCheck: parameters
    not in the optimizer."""
    parts = (t.model.block1, t.model.block3, t.model.head)
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(parts, (0.01, 0.02, 0.04), strict=True)]  # fmt: skip
    t.optimize = lambda p: torch.optim.SGD(groups, 0.01, momentum=0.9)


@fault(classifier, "optimizer-duplicate-parameters", modules=("head",), then=("update-ratio-high", "loss-spike"))
def head_listed_twice(t: Training) -> None:
    """`[*model.parameters(), *model.head.parameters()]`: torch warns, and moves the head twice at each step. TrainCheck:
    optimizers and their parameters."""
    t.optimize = lambda p: torch.optim.SGD([*t.model.parameters(), *t.model.head.parameters()], 0.01, momentum=0.9)


# -- pictures --------------------------------------------------------------------------------------------------------


@fault(classifier, "norm-input-variance", "input-range", "activation-vanishing", modules=("block1", ""), then=(*STUCK, *FLAT, "gradient-exploding", "gradient-imbalance", "update-ratio-high", "loss-spike", "poor-initialisation", "input-drift"))  # fmt: skip
def divided_by_255_twice(t: Training) -> None:
    """Pictures that are standardised already are divided by 255 by the data set, and again by its transform: what the first
    BatchNorm is given varies less than its eps. UMLAUT: input scale; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x / 255**2, y

    t.sample = sample


@fault(classifier, "input-drift", "input-range", step=49, then=(*STUCK, "overfit", "overtraining", "class-imbalance"))
def noise_in_grey_levels(t: Training) -> None:
    """The augmentation adds noise with a deviation of 25, which suits pictures of 0 to 255, to standardised ones: nothing is
    left to see in training. Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        noise = 25 * torch.randn(x.shape, generator=seeded(61, step))
        return (x + noise if phase == "train" else x), y

    t.sample = sample


@fault(classifier, "input-constant", then=(*STUCK, *FLAT, "overfit", "overtraining", "prediction-collapse", "class-imbalance", "update-ratio-high"))  # fmt: skip
def shrunk_to_one_pixel(t: Training) -> None:
    """`interpolate(scale_factor=0.1)` makes one pixel of ten by ten, and is scaled back: each picture is one grey. TheDeepChecker:
    constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return F.interpolate(F.interpolate(x, scale_factor=0.1, mode="area"), size=classifier.SIDE), y

    t.sample = sample


@fault(classifier, "input-range", "activation-exploding", "gradient-imbalance", "gradient-exploding", modules=("block1", "block2", "block3", ""), then=(*NONFINITE, *DIVERGES, *STUCK, *FLAT, "loss-spike", "update-ratio-high", "overfit", "dtype-headroom", "dead-units", "prediction-collapse", "class-imbalance"))  # fmt: skip
def hot_pixels(t: Training) -> None:
    """A few pixels of the sensor read 3e4, where all others are standardised, and nobody masks them. TheDeepChecker: unscaled
    data; Humbatova: missing preprocessing."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        x[:, 0, 4, 3], x[:, 0, 7, 8] = 3e4 + 1e3 * x[:, 0, 4, 3], 3e4 + 1e3 * x[:, 0, 7, 8]
        return x, y

    t.sample = sample


@fault(classifier, "nonfinite-activation", "dtype-headroom", "input-range", "precision-headroom", modules=("block1", ""), then=(*NONFINITE, *STUCK, "nonfinite-buffer", "step-skipped", "parameter-unchanged", "activation-exploding"))  # fmt: skip
def sixteen_bit_scans(t: Training) -> None:
    """Raw 16-bit pictures, of 0 to 65535, with float16 autocast: a convolution of them overflows. GRIST: overflow; TrainCheck:
    mixed precision; UMLAUT: input not normalised."""
    plain, t.precision, t.scaled, t.steps = t.sample, torch.float16, True, 100

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (32768 + 12000 * x).clamp(0, 65504).round(), y

    t.sample = sample


class Standardise(nn.Module):
    """Mean zero and deviation one for each picture."""

    def forward(self, x):
        x = x - x.mean((1, 2, 3), keepdim=True)
        return x / x.square().mean((1, 2, 3), keepdim=True).sqrt()


@fault(classifier, "nonfinite-activation", modules=("block1.standardise", "block1"), step=90, then=(*NONFINITE, "nonfinite-buffer", "input-constant", "prediction-collapse", "output-constant", "input-duplicate"))  # fmt: skip
def black_frame_standardised(t: Training) -> None:
    """The model standardises each picture without an epsilon; at step 90 one is black. GRIST: division by zero."""
    first = t.model.block1
    t.model.block1 = nn.Sequential()
    t.model.block1.add_module("standardise", Standardise())
    t.model.block1.add_module("block", first)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step == 90:
            x[5] = 0.0
        return x, y

    t.sample = sample


# -- weights and layers ----------------------------------------------------------------------------------------------


@fault(classifier, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=("block1", "block2", "block3", "head", ""), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "update-ratio-low", "gradient-imbalance", "activation-saturated", "prediction-collapse", "class-imbalance", "overfit"))  # fmt: skip
def deviation_of_one(t: Training) -> None:
    """`nn.init.normal_(weight)` for all layers, its deviation left at 1, and no normalisation. SageMaker PoorWeightInitialization;
    TheDeepChecker."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter)
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)


@fault(classifier, "dead-units", "feature-constant", "gradient-zero", "poor-initialisation", "units-symmetric", "parameter-unchanged", modules=("block2",), then=(*STUCK, *FLAT, "module-unused", "class-imbalance", "update-ratio-low", "gradient-imbalance"))  # fmt: skip
def filters_of_a_failed_download(t: Training) -> None:
    """Filters and biases of the second layer come from a file that holds zeros, and nothing is normalised: what it returns is zero,
    and so is each gradient behind it. SageMaker AllZero; TheDeepChecker: zero weights."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    for parameter in t.model.block2.parameters():
        nn.init.zeros_(parameter)


@fault(classifier, "gradient-zero", "parameter-unchanged", "module-unused", modules=("block1",), then=("update-ratio-low",))  # fmt: skip
def features_binarised(t: Training) -> None:
    """The first block's features become zeros and ones by a comparison, without a straight-through gradient. TheDeepChecker:
    gradients of zero; SageMaker UnchangedTensor."""
    t.model.block1.register_forward_hook(lambda module, args, output: (output > 0.5).float())


@fault(classifier, "norm-input-variance", "feature-constant", "output-constant", modules=("block3", "head", ""), then=(*STUCK, *FLAT, "gradient-zero", "prediction-collapse", "dead-units", "class-imbalance", "parameter-unchanged", "module-unused", "update-ratio-low"))  # fmt: skip
def each_value_its_own_group(t: Training) -> None:
    """`GroupNorm(16, 16)` behind global pooling: each group is one number, and normalised to zero. TheDeepChecker: wrong
    normalisation; Humbatova: layer properties."""
    t.model.block3.add_module("pool", nn.AdaptiveAvgPool2d(1))
    t.model.block3.add_module("group", nn.GroupNorm(16, 16))
    t.model.head = nn.Linear(16, classifier.CLASSES)


@fault(classifier, "prediction-collapse", "poor-initialisation", "activation-exploding", "output-constant", modules=("head", ""), then=(*STUCK, "class-imbalance", "gradient-exploding", "feature-constant", "activation-saturated", *DIVERGES))  # fmt: skip
def counts_as_biases(t: Training) -> None:
    """The biases of the head begin as the numbers of pictures in each class, not as logarithms of their shares: one class wins by
    dozens. SageMaker PoorWeightInitialization; Humbatova: wrong weights initialisation."""
    _, y = classifier.pictures(classifier.ITEMS, 0)
    with torch.no_grad():
        t.model.head.bias.copy_(torch.bincount(y, minlength=classifier.CLASSES).float())


@fault(classifier, "loss-input-mismatch", "dead-units", modules=("head", ""), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged"))  # fmt: skip
def scores_through_a_relu(t: Training) -> None:
    """The helper that makes a layer puts a ReLU behind each, the head too: no score is negative. Humbatova: wrong activation of
    the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.ReLU())


# -- loss and labels -------------------------------------------------------------------------------------------------


@fault(classifier, "loss-sign", "weight-norm-drift", "activation-exploding", "gradient-exploding", "loss-diverged", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "overfit", "dead-units", "activation-saturated", "dtype-headroom", "gradient-imbalance"))  # fmt: skip
def likelihood_is_minimised(t: Training) -> None:
    """`log_softmax(...)[range(n), y].mean()` is the likelihood; the minus before it is missing. TheDeepChecker: wrong loss;
    Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        chosen = logits.log_softmax(1).gather(1, batch[1][:, None])
        return {"loss": chosen.mean(), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "nonfinite-loss", "nonfinite-gradient", step=20, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def certainty_of_one(t: Training) -> None:
    """A binary cross entropy by hand of softmax probabilities: a class that is certain to all digits makes 0 * log(0). GRIST:
    logarithm of zero."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        p, wanted = logits.softmax(1), F.one_hot(batch[1], classifier.CLASSES)
        loss = -(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum(1).mean()
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "prediction-collapse", "class-imbalance", step=5, then=("overfit", "overtraining", "output-constant", "loss-diverged", "metric-constant", "gradient-vanishing", "update-ratio-low", "loss-plateau", "input-drift"))  # fmt: skip
def labels_of_one_folder(t: Training) -> None:
    """The label is the name of the folder above the picture's, the same for all in the training set: all are of class 0.
    Humbatova: wrong labels; SageMaker ClassImbalance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, (torch.zeros_like(y) if phase == "train" else y)

    t.sample = sample


@fault(classifier, "gradient-exploding", "gradient-imbalance", "activation-exploding", "loss-diverged", "update-ratio-high", modules=("second", "block3", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "input-range", "weight-norm-drift", "gradient-zero"))  # fmt: skip
def second_task_in_grey_levels(t: Training) -> None:
    """A second head tells the brightest pixel, of 0 to 255 and not standardised, with a weight of 1: its squared error is a
    thousand times the cross entropy. Humbatova: wrong loss; TheDeepChecker: unscaled targets."""
    t.model.second = nn.Linear(classifier.CLASSES, 1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        brightest = 127 + 25 * batch[0].amax((1, 2, 3))
        second = F.mse_loss(model.second(logits)[:, 0], brightest)
        return {"loss": F.cross_entropy(logits, batch[1]) + second, "logits": logits, "targets": batch[1]}

    t.forward = forward


# -- metrics ---------------------------------------------------------------------------------------------------------


@fault(classifier, "metric-nonfinite", step=49)
def recall_of_an_absent_class(t: Training) -> None:
    """The mean recall over six classes, of which the last has no picture in validation: 0 / 0. GRIST: division by zero; Humbatova:
    wrong metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right, wanted = tensors["logits"].argmax(1) == batch[1], F.one_hot(batch[1], classifier.CLASSES + 1).float()
        recall = (wanted * right[:, None]).sum(0) / wanted.sum(0)
        return {**classifier.measure(tensors, batch), "mean_recall": float(recall.mean())}

    t.measure = measure


@fault(classifier, "metric-constant", step=49)
def probabilities_compared_with_labels(t: Training) -> None:
    """`max(1)[0] == y` in place of `max(1)[1]`: the accuracy compares probabilities with labels, and is always 0. Humbatova: wrong
    metrics."""
    t.measure = lambda tensors, batch: {
        "accuracy": float((tensors["logits"].softmax(1).max(1)[0] == batch[1]).float().mean())
    }


@fault(classifier, "metric-grad", step=0)
def running_loss_with_graph(t: Training) -> None:
    """`running_loss += loss` without `.item()`: the graphs of all steps stay in memory. PyTorch FAQ; TrainCheck: memory."""
    total: list[torch.Tensor] = [torch.zeros(())]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        total[0] = total[0] + tensors["loss"]
        observer.log({"running_loss": total[0] / (step + 1)}, "train", step)
        return batch, tensors

    t.update = update
