"""What goes wrong in forecasters: rates, decay, frozen parts, quantiles, likelihoods, calendars, tickers, modes."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import forecaster
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, plain_validation


def compared(t: Training, loss_of) -> None:
    """Use `loss_of(outputs, targets)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": loss_of(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.forward = forward


def changed(t: Training, change) -> None:
    """Pass pasts and targets through `change(x, y, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step, phase)


# -- optimizer -------------------------------------------------------------------------------------------------------


@fault(forecaster, "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))
def rate_in_millionths(t: Training) -> None:
    """A rate of 5e-8: the configuration's unit is 1e-3, the search wrote it in 1e-6 and it is multiplied twice. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 5e-8)


@fault(forecaster, "weight-norm-drift", step=10, then=("activation-vanishing", *STUCK, *FLAT, "update-ratio-low", "update-ratio-high", "weight-decay-on-norms", "loss-diverged", "overtraining"))  # fmt: skip
def decay_for_sgd_in_adamw(t: Training) -> None:
    """`AdamW(weight_decay=10)`: the search ran over powers of ten of a decay that SGD multiplies by its momentum buffer, and its largest
    value is taken. TheDeepChecker: wrong regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=10.0)


@fault(forecaster, "optimizer-frozen-parameters", "parameter-unchanged", modules=("lstm",), then=("update-ratio-low", "gradient-zero", *STUCK))  # fmt: skip
def frozen_in_the_first_stage(t: Training) -> None:
    """The first stage, with a pretrained LSTM, was taken out of the script; the line that freezes it was not. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.model.lstm.requires_grad_(False)
    t.optimizers = [t.optimize(t.model.parameters())]


@fault(forecaster, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=("gradient-accumulation", "gradient-exploding", *STUCK, "update-ratio-low", "gradient-clipping"))  # fmt: skip
def best_model_restored_as_a_copy(t: Training) -> None:
    """At step 0 the best model of the last run is put in place as a deep copy; the optimizer keeps the model that it was built with.
    TrainCheck: optimizer with the parameters of another model."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = copy.deepcopy(t.model)


@fault(forecaster, "parameter-unchanged", "update-ratio-low", "stalled-optimisation", "schedule-unfinished", "schedule-unreachable", then=(*STUCK, "stalled-from-start"))  # fmt: skip
def warm_up_by_whole_division(t: Training) -> None:
    """`(step + 1) // warm_up` with two strokes: the factor of the rate is 0 until step 1000. Humbatova: learning rate; TrainCheck:
    parameters not updated."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) // 1000))


@fault(forecaster, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def clipped_by_a_thousandth(t: Training) -> None:
    """`clip_grad_norm_(..., 1e-4)`, with SGD; the bound was tuned for a loss that had been divided by the horizon and the batch.
    TrainCheck: wrong clip."""
    t.clip, t.optimize = 1e-4, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(forecaster, "scheduler-ends-early", step=75, then=("loss-spike", "overtraining", "schedule-unfinished"))
def cosine_without_overlap(t: Training) -> None:
    """`T_max` counts windows that do not overlap, of which there are a quarter: the rate is zero at step 75, then rises again.
    Humbatova: learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 75)


@fault(forecaster, "parameter-changed", modules=("project",), step=1)
def shrunk_though_frozen(t: Training) -> None:
    """The projection is frozen, but a decay by hand shrinks all weights after each step and does not ask. TrainCheck: frozen
    parameters that change."""
    t.model.project.requires_grad_(False)

    def regularise(training: Training, step: int) -> None:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.mul_(0.9995)

    t.after_step.append(regularise)


# -- losses ----------------------------------------------------------------------------------------------------------


@fault(forecaster, "loss-sign", "weight-norm-drift", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "overfit", "overtraining", "metric-range"))  # fmt: skip
def pinball_turned_over(t: Training) -> None:
    """The pinball loss with `minimum` where `maximum` belongs: the further off, the lower. TheDeepChecker: wrong sign of the loss;
    Humbatova: wrong loss."""
    compared(t, lambda outputs, targets: torch.minimum(0.5 * (targets - outputs), 0.5 * (outputs - targets)).mean())


@fault(forecaster, "nonfinite-loss", modules=("",), then=(*NONFINITE, "metric-constant"))
def scores_of_logarithms(t: Training) -> None:
    """The mean squared logarithmic error, `log1p`, of standardised values: below -1 it is NaN. GRIST: logarithm of a negative number;
    Humbatova: wrong loss."""
    compared(t, lambda outputs, targets: (outputs.log1p() - targets.log1p()).square().mean())


@fault(forecaster, "nonfinite-gradient", "nonfinite-parameter", modules=("head", ""), step=45, then=NONFINITE)
def deviation_of_a_flat_day(t: Training) -> None:
    """The loss compares deviations of forecast and target over the horizon, of outputs that closed days set to zero; from step 45 on
    there are closed days. GRIST: square root of zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        opened = torch.ones(len(y), 1)
        opened[:3] = 0.0 if phase == "train" and step >= 45 else 1.0
        return x, y * opened, opened

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0]) * batch[2]
        spread = (outputs - outputs.mean(1, keepdim=True)).square().mean(1).sqrt()
        spread = (spread - batch[1].std(1, correction=0)).abs().mean()
        return {"loss": F.mse_loss(outputs, batch[1]) + 0.1 * spread, "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward


@fault(forecaster, "gradient-vanishing", "update-ratio-low", "stalled-optimisation", then=(*STUCK, *FLAT, "parameter-unchanged", "gradient-zero", "dtype-headroom"))  # fmt: skip
def mean_over_everything_again(t: Training) -> None:
    """The mean error is divided by the number of values, by the number of series and by that of hours, with SGD: gradients are a
    millionth. TheDeepChecker: wrong reduction of the loss; SageMaker VanishingGradient."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    compared(t, lambda outputs, targets: F.mse_loss(outputs, targets) / (outputs.numel() * 200 * 120))


# -- data ------------------------------------------------------------------------------------------------------------


@fault(forecaster, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "project"), step=110, then=(*NONFINITE, "metric-constant"))  # fmt: skip
def calendar_joined_from_the_left(t: Training) -> None:
    """A left join with the calendar leaves NaN for dates that it does not have: the sine of the hour, from step 110 on. Humbatova: wrong
    preprocessing; TheDeepChecker: corrupt data."""

    def joined(x, y, step, phase):
        if phase == "train" and step >= 110:
            x = x.clone()
            x[::4, 30:, 1] = torch.nan
        return x, y

    changed(t, joined)


@fault(forecaster, "input-drift", step=49, then=("overfit", "overtraining", "input-range", "metric-range"))
def angles_in_degrees(t: Training) -> None:
    """The time of day is given in degrees, 0 to 360, by the loader of validation; in training it is a sine and a cosine. Humbatova:
    wrong preprocessing."""

    def degrees(x, y, step, phase):
        if phase == "val":
            angle = torch.atan2(x[..., 1], x[..., 2]).rad2deg() % 360
            x = torch.stack([x[..., 0], angle, angle], -1)
        return x, y

    changed(t, degrees)


@fault(forecaster, "input-duplicate", then=("overfit", "overtraining", "loss-spike", "input-drift", "feature-constant", "output-constant"))  # fmt: skip
def views_of_one_buffer(t: Training) -> None:
    """The collate function fills one buffer in a loop and appends it each time: all items of a batch are the last window. TrainCheck:
    duplicated data."""
    changed(
        t,
        lambda x, y, step, phase: (
            (x[-1:].repeat(len(x), 1, 1), y[-1:].repeat(len(y), 1)) if phase == "train" else (x, y)
        ),
    )


@fault(forecaster, "input-constant", "feature-constant", "output-constant", "input-duplicate", "prediction-collapse", then=(*STUCK, *FLAT, "gradient-zero", "norm-input-variance"))  # fmt: skip
def clipped_to_a_point(t: Training) -> None:
    """Outliers are clipped to quantiles 0.5 and 0.5, where 0.005 and 0.995 were meant, in all columns: each window holds nothing but
    medians. TheDeepChecker: constant inputs."""
    changed(t, lambda x, y, step, phase: (torch.full_like(x, 0.01), y))


# -- modes and layers ------------------------------------------------------------------------------------------------


@fault(forecaster, "validation-in-train-mode", step=49, then=("overtraining",))
def back_test_in_train_mode(t: Training) -> None:
    """The back test calls the model as training does; `eval()` is only in the script for production. A dropout of 0.3. TrainCheck: wrong
    mode."""
    t.model = forecaster.Forecaster(dropout=0.3)

    def validate(training: Training, step: int, observer: Observer) -> None:
        evaluate, training.model.eval = training.model.eval, lambda: training.model
        plain_validation(training, step, observer)
        training.model.eval = evaluate

    t.validate = validate


class WithHolidays(forecaster.Forecaster):
    def __init__(self) -> None:
        super().__init__()
        self.holidays = nn.Sequential(nn.Linear(2, 12), nn.ReLU(), nn.Linear(12, forecaster.HORIZON))

    def forward(self, x):
        forecast = super().forward(x)
        _correction = self.holidays(x[:, -1, 1:])
        return forecast


@fault(
    forecaster,
    "module-unused",
    "parameter-unchanged",
    "gradient-zero",
    modules=("holidays",),
    then=("update-ratio-low",),
)
def correction_not_added(t: Training) -> None:
    """A branch for the calendar is computed, and never added to the forecast. Humbatova: missing connection; SageMaker
    UnchangedTensor."""
    t.model = WithHolidays()


@fault(forecaster, "activation-saturated", "poor-initialisation", "activation-exploding", modules=("lstm", "project", "activation"), then=("gradient-vanishing", "gradient-imbalance", "gradient-exploding", "gradient-clipping", "gradient-zero", "update-ratio-low"))  # fmt: skip
def projection_of_deviation_forty(t: Training) -> None:
    """The projection's weights are drawn with a deviation of 40, the number of its units: the gates behind it are open or shut. SageMaker
    SaturatedActivation and PoorWeightInitialization."""
    nn.init.normal_(t.model.project.weight, std=40.0)


@fault(forecaster, "metric-phase-mismatch", "metric-missing", "metric-unexpected", step=49)
def skill_of_training_only(t: Training) -> None:
    """`skill` is computed in training only; validation, which the best model is chosen by, has none. speech: metrics that are missing in
    validation."""
    measured = t.measure

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        observer.log(
            {"loss": float(tensors["loss"].detach()), **measured({"outputs": tensors["outputs"].detach()}, batch)},
            "train",
            step,
        )
        return batch, tensors

    t.update, t.measure = update, lambda tensors, batch: {"mae": measured(tensors, batch)["mae"]}
