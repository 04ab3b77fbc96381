"""What goes wrong in surrogates of fields: units, coordinates, numbers, outputs, likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import surrogate
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


def compared(t: Training, loss_of) -> None:
    """Use `loss_of(outputs, targets)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": loss_of(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.forward = forward


def changed(t: Training, change) -> None:
    """Pass inputs and targets through `change(x, y, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step, phase)


# -- units -----------------------------------------------------------------------------------------------------------


@fault(surrogate, "input-range", "gradient-exploding", "activation-exploding", "gradient-imbalance", modules=("head", ""), then=("feature-constant", *STUCK, *DIVERGES, "weight-norm-drift", "metric-range"))  # fmt: skip
def fields_in_their_units(t: Training) -> None:
    """Targets are left in K, Pa and m/s: the squared error is that of a pressure of 101,325, and 300 steps bring nothing. UMLAUT and
    Humbatova: data that are not normalised."""
    mean, size = surrogate.scales()
    changed(t, lambda x, y, step, phase: (x, y * size + mean))
    t.measure = lambda tensors, batch: surrogate.measure(
        {"outputs": (tensors["outputs"] - mean) / size}, (batch[0], (batch[1] - mean) / size)
    )


@fault(surrogate, "input-range", "gradient-exploding", "activation-exploding", "gradient-imbalance", modules=("head", ""), then=(*STUCK, *DIVERGES))  # fmt: skip
def pressure_in_pascal(t: Training) -> None:
    """The pressure is divided by its deviation in bar, but it is in Pa: one target of three has a size of 10,000, and is all that
    counts. Humbatova: wrong preprocessing; TheDeepChecker: unscaled targets."""
    factor = torch.tensor([1.0, 1e4, 1.0])
    changed(t, lambda x, y, step, phase: (x, y * factor))


@fault(surrogate, "input-range", "activation-exploding", "gradient-exploding", "gradient-imbalance", modules=("waves", "layers.0", "layers", ""), then=(*STUCK, *DIVERGES, "dead-units", "gradient-zero", "activation-saturated", "metric-range", "overfit", "overtraining"))  # fmt: skip
def coordinates_in_micrometres(t: Training) -> None:
    """Coordinates of a new mesh are in micrometres, 0 to 1,000,000, and not mapped to -1 to 1: sines of them are noise, and they are
    handed on beside the sines. Humbatova: wrong preprocessing; UMLAUT: input not normalised."""
    scale = torch.tensor([5e5, 5e5, 1.0, 1.0, 1.0])
    shift = torch.tensor([5e5, 5e5, 0.0, 0.0, 0.0])
    changed(t, lambda x, y, step, phase: (x * scale + shift, y))


@fault(surrogate, "input-range", "gradient-imbalance", "activation-exploding", "gradient-exploding", modules=("case", "layers", ""), then=(*NONFINITE, *STUCK, *DIVERGES, *FLAT, "dead-units", "activation-saturated", "update-ratio-low", "parameter-unchanged", "gradient-zero", "metric-range"))  # fmt: skip
def power_in_watts(t: Training) -> None:
    """The power of the heater is in watts, 400,000 to 1,600,000, beside numbers around 1. UMLAUT and Humbatova: features that are not
    normalised."""

    def watts(x, y, step, phase):
        x = x.clone()
        x[:, 3] = 1e6 + 3.5e5 * x[:, 3]
        return x, y

    changed(t, watts)


@fault(surrogate, "input-drift", step=49, then=("overfit", "overtraining", "metric-range", "input-range"))
def validation_in_metres(t: Training) -> None:
    """Coordinates of validation are in millimetres as they come, 0 to 1000; training maps them to -1 to 1. Humbatova: wrong
    preprocessing."""

    def raw(x, y, step, phase):
        return (torch.cat([500 * (x[:, :2] + 1), x[:, 2:]], 1) if phase == "val" else x), y

    changed(t, raw)


@fault(surrogate, "input-dtype", then=("precision-loss",))
def table_of_doubles(t: Training) -> None:
    """What `numpy.loadtxt` returns is float64 and is handed on as it is; the model converts it in each step. TrainCheck: mistakes of
    dtype."""
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    changed(t, lambda x, y, step, phase: (x.double(), y))


# -- numbers ---------------------------------------------------------------------------------------------------------


@fault(surrogate, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "case"), then=(*NONFINITE, "metric-constant"))  # fmt: skip
def constant_column_standardised(t: Training) -> None:
    """In a study at one conductivity its deviation is zero, and the standardisation divides by it. GRIST: division by zero."""

    def divided(x, y, step, phase):
        x = x.clone()
        column = torch.full_like(x[:, 4], 0.7)
        x[:, 4] = (column - column.mean()) / torch.zeros(())
        return x, y

    changed(t, divided)


class Arrhenius(nn.Module):
    """Parameters, the last of them as a rate `exp(-1 / temperature)`."""

    def forward(self, case):
        return torch.cat([case[:, :2], torch.exp(-1 / case[:, 2:])], 1)


@fault(surrogate, "activation-exploding", "nonfinite-loss", "nonfinite-activation", "gradient-exploding", modules=("case", "case.rate", ""), then=(*NONFINITE, *DIVERGES, "gradient-imbalance", "metric-constant"))  # fmt: skip
def rate_of_a_standardised_number(t: Training) -> None:
    """`exp(-1 / T)` of a temperature that has been standardised, and thus is negative or near zero: it overflows. GRIST: overflow of
    exp, division by nearly zero."""
    first = t.model.case
    t.model.case = nn.Sequential()
    t.model.case.add_module("rate", Arrhenius())
    t.model.case.add_module("layers", first)


@fault(surrogate, "nonfinite-loss", modules=("",), then=(*NONFINITE, *DIVERGES, "update-ratio-low", *STUCK))
def logarithm_of_a_deviation(t: Training) -> None:
    """Mean and deviation of each field; the deviation is a plain linear output, without softplus, and its logarithm is NaN. GRIST:
    logarithm of a negative number."""
    t.model = surrogate.Surrogate(fields=6)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mean, deviation = model(batch[0]).chunk(2, -1)
        loss = (deviation.log() + (batch[1] - mean).square() / (2 * deviation.square())).mean()
        return {"loss": loss, "outputs": mean, "targets": batch[1]}

    t.forward = forward


@fault(
    surrogate,
    "nonfinite-gradient",
    "nonfinite-parameter",
    modules=("head", ""),
    step=30,
    then=(*NONFINITE, "metric-constant"),
)
def magnitude_at_the_wall(t: Training) -> None:
    """A penalty on the magnitude of pressure and speed, `(a² + b²).sqrt()`; outputs are set to zero on the wall, and from step 30 on
    points on the wall are drawn: the root's slope is infinite. GRIST: square root of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        inside = (batch[0][:, 1:2] > -1).float()
        magnitude = (outputs[:, 1:] * inside).square().sum(1).sqrt()
        loss = F.mse_loss(outputs, batch[1]) + 1e-3 * magnitude.mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    def walls(x, y, step, phase):
        x = x.clone()
        if phase == "train" and step >= 30:
            x[:4, 1] = -1.0
        return x, y

    t.forward = forward
    changed(t, walls)


@fault(surrogate, "loss-spike", "gradient-exploding", "output-constant", then=(*DIVERGES, *STUCK, "gradient-imbalance", "stalled-optimisation", "metric-range"))  # fmt: skip
def squared_relative_error(t: Training) -> None:
    """`((output - target) / target) ** 2` of standardised targets, which pass zero: a few points have all the weight. GRIST: division
    by nearly zero; Humbatova: wrong loss."""
    compared(t, lambda outputs, targets: ((outputs - targets) / targets).square().mean())


@fault(surrogate, "nonfinite-loss", modules=("",), then=(*NONFINITE, "loss-plateau", "stalled-optimisation"))
def weights_of_empty_cells(t: Training) -> None:
    """Points are weighed by one over the number of points in their cell of the mesh; the histogram is that of validation, some cells
    are empty, and the weight is infinite. GRIST: division by zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        cell = ((batch[0][:, 0] + 1) * 8).long()
        weight = 1 / torch.bincount(cell, minlength=16).where(torch.arange(16) != 5, 0)[cell].float()
        loss = (weight / weight.sum() * F.mse_loss(outputs, batch[1], reduction="none").mean(1)).sum()
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward


# -- outputs and losses ----------------------------------------------------------------------------------------------


@fault(surrogate, "feature-constant", "output-constant", "prediction-collapse", step=30, then=(*STUCK, *FLAT))
def points_against_all_points(t: Training) -> None:
    """The temperature alone: outputs are (batch, 1), targets (batch,), and the error is one of all pairs: the mean is the best answer.
    Humbatova: wrong shape of the target."""
    t.model = surrogate.Surrogate(fields=1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": (outputs - batch[1][:, 0]).square().mean(), "outputs": outputs, "targets": batch[1][:, 0]}

    t.forward = forward
    t.measure = lambda tensors, batch: {"mae": float((tensors["outputs"][:, 0] - batch[1][:, 0]).abs().mean())}


@fault(surrogate, "loss-input-mismatch", modules=("head",), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "parameter-unchanged"))  # fmt: skip
def fields_are_positive(t: Training) -> None:
    """A ReLU behind the head, since temperature and pressure are positive; the targets are standardised, and half of them are below
    zero. Humbatova: wrong activation of the last layer."""
    t.model.head = nn.Sequential(t.model.head, nn.ReLU())


@fault(surrogate, "loss-sign", "weight-norm-drift", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, "overfit", "overtraining", "metric-range", "gradient-imbalance"))  # fmt: skip
def explained_share_minimised(t: Training) -> None:
    """The loss is the explained share itself, not one minus it: the worse the outputs, the lower. TheDeepChecker: wrong sign of the
    loss."""
    compared(t, lambda outputs, targets: 1 - (outputs - targets).square().mean() / targets.var())


@fault(
    surrogate, "gradient-zero", "parameter-unchanged", "module-unused", modules=("speed",), then=("update-ratio-low",)
)
def field_not_in_the_loss(t: Training) -> None:
    """A head of its own for the speed, which was added later: the sum of the losses has only the two of old. Humbatova: wrong loss;
    TrainCheck: a part without gradients."""
    t.model = surrogate.Surrogate(fields=2)
    t.model.speed = nn.Linear(surrogate.WIDTH, 1)
    kept: list[torch.Tensor] = []
    t.model.dropout.register_forward_hook(lambda module, args, output: kept.append(output))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = torch.cat([model(batch[0]), model.speed(kept.pop())], 1)
        return {"loss": F.mse_loss(outputs[:, :2], batch[1][:, :2]), "outputs": outputs, "targets": batch[1]}

    t.forward = forward


# -- points ----------------------------------------------------------------------------------------------------------


@fault(surrogate, "input-duplicate", then=("overfit", "overtraining", "input-drift", "loss-spike", *STUCK, "norm-input-variance", "feature-constant"))  # fmt: skip
def one_point_for_a_batch(t: Training) -> None:
    """`mesh[i]` where `mesh[i : i + n]` is meant, and torch broadcasts: all rows of a batch are one point. TheDeepChecker: duplicated
    inputs; TrainCheck: duplicated data."""
    changed(
        t, lambda x, y, step, phase: (x[:1].repeat(len(x), 1), y[:1].repeat(len(y), 1)) if phase == "train" else (x, y)
    )


@fault(surrogate, "overfit", "input-duplicate", "overtraining", step=1, then=("input-drift", "loss-plateau", "stalled-optimisation", "feature-constant"))  # fmt: skip
def one_simulation(t: Training) -> None:
    """`cases[:1]` from debugging: 30 points of one simulation, learnt by heart. SageMaker Overfit."""
    inputs, fields = t.sample(0, "train")
    few, plain = (inputs[:1].repeat(30, 1), fields[:30]), t.sample
    few[0][:, :2] = inputs[:30, :2]
    t.sample = lambda step, phase: few if phase == "train" else plain(step, phase)


@fault(surrogate, "loss-plateau", "stalled-optimisation", "prediction-collapse", "output-constant", step=60, then=(*STUCK, "feature-constant"))  # fmt: skip
def fields_of_other_points(t: Training) -> None:
    """Points are shuffled, fields are not: each point has the fields of another one. Humbatova: wrong labels."""
    changed(t, lambda x, y, step, phase: (x, y.roll(1 + step % 100, 0) if phase == "train" else y))
