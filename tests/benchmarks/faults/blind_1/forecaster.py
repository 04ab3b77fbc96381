"""What goes wrong in forecasters: shapes of targets, units of features, dead sensors, recurrent weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau

from faults import forecaster
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, seeded


@fault(forecaster, "output-constant", "feature-constant", "prediction-collapse", "loss-plateau", "stalled-optimisation", step=30, then=(*STUCK, *FLAT, "output-collapse"))  # fmt: skip
def broadcast_targets(t: Training) -> None:
    """Targets have an axis too many, (batch, 1, horizon): the mean squared error compares all pairs of items, and the
    forecast is the mean of everything. Humbatova: wrong shape of the target; a warning of torch's, easily lost."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[1][:, None]), "outputs": outputs, "targets": batch[1][:, None]}

    t.forward = forward
    t.measure = lambda tensors, batch: forecaster.measure({**tensors, "targets": batch[1]}, batch)


@fault(forecaster, "gradient-imbalance", "activation-saturated", "activation-exploding", "input-range", "gradient-exploding", modules=("project", "activation", "lstm", ""), then=(*STUCK, *FLAT, "dead-units", "gradient-zero", "gradient-clipping", "parameter-unchanged", "update-ratio-low", "units-symmetric", "dtype-headroom", "weight-norm-drift"))  # fmt: skip
def seconds_since_1970(t: Training) -> None:
    """The time of day is given as a timestamp in seconds, beside standardised values. UMLAUT and Humbatova: features that
    are not normalised."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        start = 1.7e9 + 3600 * torch.randint(5000, (len(x), 1), generator=seeded(3, step))
        return torch.stack([x[..., 0], start + 3600 * torch.arange(x.shape[1]), x[..., 2]], -1), y

    t.sample = sample


@fault(forecaster, "activation-exploding", "gradient-exploding", "poor-initialisation", "loss-diverged", "loss-spike", modules=("lstm",), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-imbalance", "update-ratio-low", "dead-units", "dtype-headroom"))  # fmt: skip
def recurrence_of_relus(t: Training) -> None:
    """The LSTM becomes a plain RNN with ReLU and recurrent weights drawn with a deviation of 0.5, whose radius is above two:
    states double at every step. AutoTrainer: exploding gradient."""
    width = t.model.project.out_features
    t.model.lstm = nn.RNN(width, width, nonlinearity="relu", batch_first=True)
    nn.init.normal_(t.model.lstm.weight_hh_l0, std=0.5)
    t.clip = None


@fault(forecaster, "units-symmetric", "poor-initialisation", "feature-constant", "norm-input-variance", "output-constant", modules=("project", "activation", "lstm", "norm", "head", ""), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "dead-units"))  # fmt: skip
def all_weights_alike(t: Training) -> None:
    """`constant_(p, 0.05)` over all parameters that are no norm's, for the sake of reproducible runs: each layer has one unit,
    many times. TheDeepChecker: symmetric units; SageMaker PoorWeightInitialization."""
    for layer in (t.model.project, t.model.lstm, t.model.head):
        for parameter in layer.parameters():
            nn.init.constant_(parameter, 0.05)


@fault(forecaster, "loss-plateau", "output-constant", "stalled-optimisation", "gradient-clipping", "update-ratio-low", "input-range", then=(*STUCK, "gradient-exploding", "gradient-imbalance", "weight-norm-drift", "activation-saturated", "feature-constant", "gradient-vanishing"))  # fmt: skip
def targets_in_their_own_unit(t: Training) -> None:
    """Inputs are standardised, targets are left in their unit, some thousands: 300 steps bring nothing. UMLAUT and
    Humbatova: data that are not normalised."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, 4200 + 600 * y

    t.sample = sample


@fault(forecaster, "input-drift", step=49, then=("overfit", "overtraining"))
def validation_scaled_by_its_range(t: Training) -> None:
    """Standardised for training; in validation each window is mapped to 0 to 1, by another function of the same name.
    Humbatova: preprocessing; unlike scalers of two splits."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "val":
            low, high = x[..., :1].amin(1, keepdim=True), x[..., :1].amax(1, keepdim=True)
            x = torch.cat([(x[..., :1] - low) / (high - low), x[..., 1:]], -1)
        return x, y

    t.sample = sample


@fault(forecaster, "parameter-unchanged", "optimizer-misses-parameters", modules=("project", "lstm"), then=("loss-plateau", "stalled-optimisation", "update-ratio-low"))  # fmt: skip
def only_the_head_is_stepped(t: Training) -> None:
    """`Adam(model.head.parameters())`, from the example of a fine-tuning, for a model that starts from random weights.
    TrainCheck: optimizer with a part of the parameters; zjunlp/HVPNeT#5."""
    t.optimizers = [torch.optim.Adam([*t.model.norm.parameters(), *t.model.head.parameters()], 5e-3)]


@fault(forecaster, "overfit", "overtraining", "input-duplicate", then=("input-drift", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def one_short_series(t: Training) -> None:
    """One series of 44 hours in place of 200 series: three windows, learnt by heart, with a wide model. SageMaker
    Overfit."""
    few, plain = forecaster.series(1, seeded(44), 44), t.sample
    t.model = forecaster.Forecaster(width=64)
    t.sample = lambda step, phase: (
        forecaster.windows(few, forecaster.BATCH, seeded(9, step)) if phase == "train" else plain(step, phase)
    )
    t.steps = 400


@fault(forecaster, "activation-saturated", "gradient-vanishing", "loss-plateau", "stalled-optimisation", modules=("head",), step=20, then=(*STUCK, "gradient-zero", "weight-norm-drift"))  # fmt: skip
def sigmoid_at_the_end(t: Training) -> None:
    """The head ends in a sigmoid, as in the example with values of 0 to 1, and targets are standardised: two thirds of them
    are out of reach. Humbatova: wrong activation of the last layer."""
    t.model.head = nn.Sequential(t.model.head, nn.Sigmoid())


@fault(forecaster, "gradient-zero", "parameter-unchanged", "module-unused", modules=("project",), then=("gradient-vanishing", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def rounded_on_the_way(t: Training) -> None:
    """The projection is rounded to a grid, without a straight-through estimator: its gradient is zero everywhere.
    TrainCheck: a part without gradients; Humbatova: wrong gradient."""
    t.model.project.register_forward_hook(lambda module, args, output: (output * 4).round() / 4)


@fault(forecaster, "loss-spike", "gradient-exploding", "activation-exploding", "input-range", step=30, then=(*DIVERGES, "input-drift", "gradient-clipping", "gradient-imbalance", "activation-saturated"))  # fmt: skip
def unit_of_one_file(t: Training) -> None:
    """One file in thirty is in watts where the others are in kilowatts: every 30th batch holds eight windows that are a
    thousand times too large. Humbatova: wrong data; TheDeepChecker: outliers in the data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step and step % 30 == 0:
            x, y = x.clone(), y.clone()
            x[:8, :, 0] *= 1000
            y[:8] *= 1000
        return x, y

    t.sample = sample


@fault(forecaster, "update-ratio-low", "loss-plateau", "stalled-optimisation", "parameter-unchanged", "schedule-unfinished", "scheduler-ends-early", step=10, then=STUCK)  # fmt: skip
def plateau_of_the_wrong_kind(t: Training) -> None:
    """`ReduceLROnPlateau(mode="max")`, from a script that watched an accuracy, is given the loss: whenever it falls, the rate
    is cut to a tenth. Humbatova: learning rate."""
    made: list[ReduceLROnPlateau] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if not made:
            made.append(ReduceLROnPlateau(training.optimizer, mode="max", patience=5))
        training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        made[0].step(tensors["loss"].detach())
        return batch, tensors

    t.update = update
