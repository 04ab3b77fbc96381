"""What goes wrong in image classifiers: smoothing, weights, averages, scalers, groups, clipping, norms, pictures, metrics."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from faults import classifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_validation, seeded


def compared(t: Training, loss_of) -> None:
    """Use `loss_of(logits, classes)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": loss_of(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


# -- losses ----------------------------------------------------------------------------------------------------------


@fault(classifier, "loss-plateau", "stalled-optimisation", step=60, then=(*STUCK, *FLAT, "weight-norm-drift", "update-ratio-low"))  # fmt: skip
def smoothed_completely(t: Training) -> None:
    """`label_smoothing=1.0`, where the share that is kept was meant: all classes are the target of each picture. Humbatova: wrong loss;
    TheDeepChecker: wrong regularisation."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.03, momentum=0.9)
    compared(t, lambda logits, y: F.cross_entropy(logits, y, label_smoothing=1.0))


@fault(
    classifier,
    "nonfinite-loss",
    modules=("",),
    then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "metric-constant"),
)
def weight_of_a_sixth_class(t: Training) -> None:
    """Classes are weighed by one over their number, scaled to a sum of one; a sixth class has no picture: Inf / Inf. GRIST: division by
    zero."""
    weight = 1 / torch.tensor([800.0, 790.0, 812.0, 798.0, 800.0, 0.0])
    t.model.head = nn.Linear(t.model.head.in_features, classifier.CLASSES + 1)
    compared(t, lambda logits, y: F.cross_entropy(logits, y, weight / weight.sum()))


@fault(classifier, "nonfinite-loss", modules=("", "head"), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "activation-exploding"))  # fmt: skip
def hot_softmax_by_hand(t: Training) -> None:
    """`exp(logits * 100)` divided by its sum, without the maximum taken away: exp overflows at a logit of 0.9. GRIST: overflow of
    exp."""

    def by_hand(logits, y):
        scores = (logits * 100).exp()
        return -(scores / scores.sum(1, keepdim=True)).gather(1, y[:, None]).log().mean()

    compared(t, by_hand)


@fault(classifier, "gradient-zero", "update-ratio-low", step=80, then=(*STUCK, "parameter-unchanged", "gradient-vanishing", "overtraining"))  # fmt: skip
def weight_annealed_to_nothing(t: Training) -> None:
    """The weight of an auxiliary loss, which falls to zero in 80 steps, is given to the only loss that there is. Humbatova: wrong loss;
    SageMaker AllZero."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    now = [0]
    t.before.append(lambda training, step: now.__setitem__(0, step))
    compared(t, lambda logits, y: max(0.0, 1 - now[0] / 80) * F.cross_entropy(logits, y))


@fault(classifier, "loss-input-mismatch", "activation-saturated", modules=("head", ""), then=(*STUCK, "gradient-vanishing", "weight-norm-drift", "stalled-optimisation"))  # fmt: skip
def scores_through_a_tanh(t: Training) -> None:
    """The head ends in a tanh, as that of a critic did, and its values go to the cross entropy: none is beyond 1. Humbatova: wrong
    activation of the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Tanh())
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(classifier, "parameter-unchanged", "stalled-optimisation", then=(*STUCK, "update-ratio-low", "stalled-from-start"))  # fmt: skip
def best_weights_loaded_back(t: Training) -> None:
    """The block that loads the best weights back is indented too far, and runs after each step; the best are the first. TrainCheck:
    parameters that are overwritten; Humbatova: training process."""
    best = copy.deepcopy(t.model.state_dict())
    t.after_step.append(lambda training, step: training.model.load_state_dict(best))


@fault(classifier, "step-skipped", "parameter-unchanged", "nonfinite-gradient", then=(*NONFINITE, *STUCK, "update-ratio-low", "stalled-from-start", "dtype-headroom", "gradient-exploding", "gradient-clipping"))  # fmt: skip
def scale_that_never_backs_off(t: Training) -> None:
    """A scaler for float16 that starts at 2**40, and `backoff_factor` is so near to 1 that it stays there: gradients overflow, and all
    steps are skipped. TrainCheck: scaler misuse; GRIST: overflow."""
    t.precision, t.scaled, t.steps = torch.float16, True, 150

    def scaler(training: Training, step: int) -> None:
        if step == 0:
            training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=0.99)

    t.before.append(scaler)


@fault(classifier, "optimizer-frozen-parameters", "parameter-unchanged", modules=("head",), then=("update-ratio-low", "gradient-zero"))  # fmt: skip
def wrong_part_frozen(t: Training) -> None:
    """Fine-tuning freezes the new head and trains the body, the other way round than meant. TrainCheck: frozen parameters; SageMaker
    UnchangedTensor."""
    t.model.head.requires_grad_(False)
    t.optimizers = [t.optimize(t.model.parameters())]


@fault(classifier, "parameter-unchanged", "update-ratio-low", modules=("block1", "block2", "block3"), then=("stalled-optimisation", "loss-plateau"))  # fmt: skip
def body_at_rate_zero(t: Training) -> None:
    """The body's rate is 0.01 times a factor that is rounded to whole numbers by the configuration: 0. TrainCheck: parameters not
    updated; Humbatova: learning rate."""
    body = [p for name, p in t.model.named_parameters() if not name.startswith("head")]
    head = {"params": list(t.model.head.parameters())}
    t.optimize = lambda p: torch.optim.SGD([{"params": body, "lr": 0.01 * int(0.5)}, head], 0.01, momentum=0.9)


@fault(classifier, "gradient-clipping", "update-ratio-low", "gradient-vanishing", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "stalled-from-start"))  # fmt: skip
def values_clipped_to_a_millionth(t: Training) -> None:
    """`clip_grad_value_(parameters, 1e-6)`: the number was that of the norm's epsilon. TrainCheck: wrong clip; SageMaker
    WeightUpdateRatio."""
    t.after_backward.append(lambda training, step: nn.utils.clip_grad_value_(training.model.parameters(), 1e-6))


@fault(classifier, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "weight-norm-drift"))
def zeroed_before_validation_only(t: Training) -> None:
    """`zero_grad()` is called in front of each validation, every 50 steps, and nowhere else. TrainCheck: missing `zero_grad`."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.01)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 50 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(classifier, "weight-norm-drift", "weight-decay-on-norms", step=0, then=(*STUCK, *FLAT, "update-ratio-high", "update-ratio-low", "dead-units", "loss-diverged"))  # fmt: skip
def decay_of_the_penalty(t: Training) -> None:
    """`weight_decay=20` for AdamW, from a search over penalties that were divided by the number of pictures: weights and
    scales of norms shrink to nothing. TheDeepChecker: wrong regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=20.0)


# -- layers ----------------------------------------------------------------------------------------------------------


@fault(classifier, "dead-units", "feature-constant", "gradient-zero", "parameter-unchanged", "poor-initialisation", "output-constant", modules=("block1", "block2", "block3", ""), then=(*STUCK, *FLAT, "units-symmetric", "module-unused", "class-imbalance"))  # fmt: skip
def scales_of_zero_without_a_skip(t: Training) -> None:
    """The scale of each norm begins at zero, as in the last norm of a residual branch; here nothing goes around it. SageMaker AllZero;
    Humbatova: wrong weights initialisation."""
    for module in t.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.weight)


@fault(classifier, "dropout-high", modules=("dropout",), then=(*STUCK, "overtraining", "loss-spike"))
def picture_dropout_in_percent(t: Training) -> None:
    """`dropout=0.97`: of 3 percent the rest was taken. TheDeepChecker: dropout; Humbatova: layer properties."""
    t.model = classifier.Classifier(dropout=0.97)


@fault(classifier, "validation-in-train-mode", step=49, then=("overtraining",))
def only_gradients_switched_off(t: Training) -> None:
    """`torch.no_grad()` is taken for evaluation: the norms use, and learn, the batches of validation. TrainCheck: wrong mode; Humbatova:
    training process."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        evaluate, training.model.eval = training.model.eval, lambda: training.model
        plain_validation(training, step, observer)
        training.model.eval = evaluate

    t.validate = validate


# -- pictures and metrics --------------------------------------------------------------------------------------------


@fault(classifier, "input-range", "input-drift", then=("overfit", "overtraining", "loss-plateau"))
def bytes_that_wrap_around(t: Training) -> None:
    """Standardised pictures are cached with `astype(uint8)`: what is negative becomes 254 or 255. Validation is not cached. Humbatova:
    wrong type of data; UMLAUT: input not normalised."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x.int() % 256).float() if phase == "train" else x, y

    t.sample = sample


@fault(classifier, "input-dtype", then=("precision-loss",))
def pictures_of_doubles(t: Training) -> None:
    """NumPy's division makes float64 of pictures, and the first line of the model turns them back. TrainCheck: mistakes of dtype."""
    plain = t.sample
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x.double(), y

    t.sample = sample


@fault(classifier, "overfit", "overtraining", "input-duplicate", step=1, then=("input-drift", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def random_labels_by_heart(t: Training) -> None:
    """A file of 64 pictures whose labels belong to another file, in each epoch again: the training set is learnt by heart, and
    validation gets worse. SageMaker Overfit; Humbatova: wrong labels."""
    x, y = classifier.pictures(64, 61)
    wrong, plain, t.steps = y[torch.randperm(64, generator=seeded(61))], t.sample, 400
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)

    def sample(step: int, phase: str) -> Batch:
        rows = torch.randperm(64, generator=seeded(62, step))[: classifier.BATCH]
        return (x[rows], wrong[rows]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(classifier, "metric-range", step=49)
def accuracy_percent_twice(t: Training) -> None:
    """The accuracy is multiplied by 100 twice, by the metric and by who logs it. Humbatova: wrong metrics."""
    plain = t.measure
    t.measure = lambda tensors, batch: {"accuracy": 100 * 100 * plain(tensors, batch)["accuracy"]}
