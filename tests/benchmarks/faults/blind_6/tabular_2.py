"""What goes wrong with tables: prices in cents, logarithms of returns, weights of absent classes, floors, groups, statistics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import tabular
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded

FITS = ("overfit", "overtraining")


@fault(tabular, "input-range", "gradient-exploding", then=(*DIVERGES, *STUCK, "stalled-from-start"))  # fmt: skip
def prices_in_cents(t: Training) -> None:
    """Prices stay what they are in the table, about 25 million cents: the loss is 1e15, and no step of Adam gets there. Humbatova: targets
    that are not normalised; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        *given, price = plain(step, phase)
        return *given, 2.5e7 + 1e7 * price

    t.sample = sample


@fault(tabular, "input-nonfinite", "nonfinite-loss", "loss-diverged", modules=("",), step=90, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "nonfinite-input"))  # fmt: skip
def logarithm_of_a_return(t: Training) -> None:
    """The model learns logarithms of prices, and from step 90 on some rows are returns, with prices below zero. GRIST: logarithm of a
    negative number."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        *given, price = plain(step, phase)
        paid = (0.5 * price).exp()
        if phase == "train" and step >= 90:
            paid = torch.where(torch.rand(len(paid), generator=seeded(551, step)) < 0.03, -paid, paid)
        return *given, 2 * paid.log()

    t.sample = sample


@fault(tabular, "nonfinite-loss", "loss-diverged", modules=("",), then=(*NONFINITE, *STUCK, "nonfinite-buffer", "class-imbalance"))  # fmt: skip
def weights_of_a_class_that_never_comes(t: Training) -> None:
    """Classes are weighted by one over their counts, and one of them has none: Inf, and the sum of all weights as well, so that each is
    Inf / Inf or zero. GRIST: division by zero."""
    tabular.classified(t, -0.8, 0.8, 50.0)
    told = t.forward
    counts = torch.bincount(torch.cat([t.sample(step, "train")[2] for step in range(20)]), minlength=4)
    weights = (1 / counts) / (1 / counts).sum()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = told(model, batch)
        return {**tensors, "loss": F.cross_entropy(tensors["logits"], batch[2], weights)}

    t.forward = forward


@fault(tabular, "gradient-zero", "parameter-unchanged", modules=("", "head", "layer1", "layer2", "numbers", "tables", "norm1", "norm2"), then=(*STUCK, "stalled-from-start", "module-unused", "update-ratio-low"))  # fmt: skip
def answers_in_whole_steps(t: Training) -> None:
    """Answers are rounded to steps of a tenth in front of the loss, as they are shown to customers: the slope of rounding is zero.
    TrainCheck: a part without gradients; SageMaker VanishingGradient."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = (10 * model(*batch[:2])).round() / 10
        return {"loss": F.mse_loss(outputs, batch[2]), "outputs": outputs, "targets": batch[2]}

    t.forward = forward


@fault(tabular, "units-symmetric", "poor-initialisation", modules=("layer1", "layer2", "norm1", "activation1"), then=(*STUCK, "feature-constant", "gradient-imbalance", *FLAT, "dead-units"))  # fmt: skip
def weights_of_the_example(t: Training) -> None:
    """Weights of both layers are all 0.1, as in the worked example of a course, without BatchNorm. TheDeepChecker: symmetric units;
    Humbatova: wrong weights initialisation."""
    t.model = tabular.Table(norm=lambda width: nn.Identity(), dropout=0.0)
    for layer in (t.model.layer1, t.model.layer2):
        nn.init.constant_(layer.weight, 0.1)
        nn.init.zeros_(layer.bias)


@fault(tabular, "input-drift", "input-range", step=49, then=("loss-diverged", "activation-exploding"))  # fmt: skip
def scaler_not_applied_to_the_test(t: Training) -> None:
    """`scaler.fit_transform(train)` and nothing for the other half: validation columns are in their own units. Humbatova: wrong
    preprocessing; UMLAUT."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, *rest = plain(step, phase)
        return (40 + 15 * numbers if phase == "val" else numbers), *rest

    t.sample = sample


@fault(tabular, "metric-nonfinite", step=49, then=("metric-range",))  # fmt: skip
def explained_share_of_one_row(t: Training) -> None:
    """The share of the variance that is explained is computed for each row, whose variance is zero, and averaged. GRIST: division by zero;
    Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        rest = (tensors["outputs"] - batch[2])[:, None].square().mean(1)
        spread = batch[2][:, None].var(1, correction=0)
        return {"mae": tabular.measure(tensors, batch)["mae"], "r2": float((1 - rest / spread).mean())}

    t.measure = measure


@fault(tabular, "metric-phase-mismatch", step=49)
def training_loss_shown_as_validation(t: Training) -> None:
    """The dictionary of the validation takes its loss from `state["loss"]`, where the last step of the training has left it. Humbatova:
    wrong validation metric."""
    state: dict[str, float] = {}

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        state["loss"] = float(tensors["loss"].detach())
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            metrics = training.measure(training.forward(training.model, batch), batch)
        observer.log({"loss": state["loss"], **metrics}, "val", step)

    t.update, t.validate = update, validate


@fault(tabular, "model-in-eval", step=62)  # fmt: skip
def importance_computed_once(t: Training) -> None:
    """The importance of columns is computed in eval mode before the second epoch, at step 62, and the mode stays: BatchNorm no longer
    follows. TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 62)
        return plain_update(training, step, observer)

    t.update = update


@fault(tabular, "update-ratio-high", "loss-diverged", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-zero", "activation-exploding", "weight-norm-drift"))  # fmt: skip
def errors_summed_up(t: Training) -> None:
    """`reduction="sum"` with the rate of a mean, in SGD without BatchNorm: steps are sixty-four times too long. TheDeepChecker: wrong loss
    reduction; Humbatova."""
    t.model = tabular.Table(norm=lambda width: nn.Identity())
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, 0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2])
        return {"loss": F.mse_loss(outputs, batch[2], reduction="sum"), "outputs": outputs, "targets": batch[2]}

    t.forward = forward


@fault(tabular, "activation-saturated", "loss-input-mismatch", modules=("bounded", "head", ""), then=(*STUCK, *FLAT, "gradient-zero", "prediction-collapse", "input-range", "update-ratio-low"))  # fmt: skip
def prices_out_of_a_sigmoid(t: Training) -> None:
    """The head ends in a sigmoid, of a classifier of before, and prices are thousands: it goes to its upper end, and stays. UMLAUT and
    Humbatova: wrong activation of the last layer."""

    class Bounded(tabular.Table):
        def __init__(self) -> None:
            super().__init__()
            self.bounded = nn.Sigmoid()

        def forward(self, numbers, categories):
            return self.bounded(super().forward(numbers, categories))

    t.model, plain = Bounded(), t.sample

    def sample(step: int, phase: str) -> Batch:
        *given, price = plain(step, phase)
        return *given, 12.0 + 3.0 * price

    t.sample = sample


@fault(tabular, "overfit", "overtraining", "input-duplicate", step=1, then=("loss-plateau", "gradient-vanishing"))  # fmt: skip
def nrows_of_a_quick_look(t: Training) -> None:
    """`nrows=64` of a first look is still in `read_csv`, and dropout is off: the training has one batch. SageMaker Overfit; TrainCheck:
    duplicated data."""
    plain = t.sample
    t.model.dropout.p = 0.0
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)
