"""What goes wrong in forecasters, once more: windows, losses, the optimizer's numbers, clamps, scalers, metrics."""

from __future__ import annotations

import torch
from torch import nn

from faults import forecaster
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, clipped_before_unscaling_update

# -- windows and losses ----------------------------------------------------------------------------------------------


@fault(forecaster, "stalled-optimisation", "loss-plateau", "output-constant", then=(*STUCK, *FLAT, "overfit", "overtraining"))  # fmt: skip
def forecaster_targets_of_another_meter(t: Training) -> None:
    """Pasts and what comes next are two tables, sorted by different columns: each window has the future of another meter. Humbatova: wrong
    labels; TheDeepChecker."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x, y.roll(5, 0)

    t.sample = sample


class Reversible(forecaster.Forecaster):
    """Each window is normalised by its own mean and deviation, and the forecast is brought back."""

    def forward(self, x):
        mean, deviation = x[..., 0].mean(1, keepdim=True), x[..., 0].std(1, keepdim=True)
        value = (x[..., 0] - mean) / deviation
        return super().forward(torch.cat([value[..., None], x[..., 1:]], -1)) * deviation + mean


@fault(forecaster, "nonfinite-activation", modules=("", "project"), step=60, then=(*NONFINITE, "metric-constant", *STUCK))  # fmt: skip
def forecaster_window_that_stands_still(t: Training) -> None:
    """Each window is divided by its own deviation, without an epsilon; from step 60 on there is a meter that stands still, 0 / 0. GRIST:
    division by zero."""
    plain = t.sample
    t.model = Reversible()

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        if phase == "train" and step >= 60:
            x[4, :, 0], y[4] = 0.5, 0.5
        return x, y

    t.sample = sample


class Uncertain(forecaster.Forecaster):
    """Tells a mean and a deviation of each hour."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 2 * forecaster.HORIZON)


@fault(forecaster, "nonfinite-loss", modules=("", "head"), then=("loss-diverged", "metric-nonfinite", "gradient-exploding", "gradient-clipping", "loss-spike"))  # fmt: skip
def forecaster_logarithm_of_a_raw_deviation(t: Training) -> None:
    """The likelihood of a normal distribution takes the logarithm of a deviation, which leaves the head without a softplus: half of them
    are negative. GRIST: logarithm of a negative number; Humbatova: missing activation."""
    t.model = Uncertain()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, deviations = model(batch[0]).chunk(2, 1)
        loss = (deviations.log() + 0.5 * ((batch[1] - outputs) / deviations).square()).mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward


@fault(forecaster, "input-duplicate", then=("overfit", "overtraining", "loss-plateau", "loss-spike", "stalled-optimisation"))  # fmt: skip
def forecaster_windows_shorter_than_the_step(t: Training) -> None:
    """Starts of windows are hours divided by a stride, with two strokes, before they are multiplied again: of a batch of 32 there are eight
    windows, four times each. TrainCheck: duplicated data; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return (x[:8].repeat_interleave(4, 0), y[:8].repeat_interleave(4, 0)) if phase == "train" else (x, y)

    t.sample = sample


# -- the optimizer ---------------------------------------------------------------------------------------------------


@fault(forecaster, "update-ratio-low", "parameter-unchanged", "stalled-optimisation", then=(*STUCK, "optimizer-owns-others"))  # fmt: skip
def forecaster_epsilon_without_its_minus(t: Training) -> None:
    """`Adam(eps=1e8)`: the minus of the exponent was lost, and each step is divided by it. Humbatova: wrong optimiser settings; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3, eps=1e8)


@fault(forecaster, "weight-norm-drift", "loss-diverged", step=30, then=(*DIVERGES, *STUCK, "overtraining", *FLAT, "activation-saturated", "dead-units", "gradient-clipping", "overfit", "gradient-vanishing", "gradient-zero"))  # fmt: skip
def forecaster_momentum_of_one(t: Training) -> None:
    """SGD with `momentum=1.0`, a slip of the slider: the velocity never decays. Humbatova: wrong optimiser settings; AutoTrainer:
    oscillating loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=1.0)


@fault(forecaster, "weight-norm-drift", "activation-vanishing", "norm-input-variance", "feature-constant", "output-constant", modules=("", "project", "lstm", "head", "norm"), step=1, then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "update-ratio-high", "gradient-imbalance", "units-symmetric", "dead-units", "poor-initialisation"))  # fmt: skip
def forecaster_clamped_like_a_critic(t: Training) -> None:
    """All weights are clamped to 0.01 behind each step, as those of a critic in a script for generators. TrainCheck: parameters that
    something else writes; Humbatova: training process."""

    def clamp(training: Training, step: int) -> None:
        with torch.no_grad():
            for parameter in training.model.parameters():
                parameter.clamp_(-0.01, 0.01)

    t.after_step.append(clamp)


@fault(forecaster, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "gradient-exploding", "optimizer-owns-others"))  # fmt: skip
def forecaster_clipped_before_it_is_unscaled(t: Training) -> None:
    """`unscale_` was lost in front of the clipping: gradients times 65536 are clipped to 1, and divided after that. TrainCheck: misuse of
    the scaler, wrong clip."""
    t.optimize, t.scaled = (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)), True
    t.update = clipped_before_unscaling_update


# -- metrics ---------------------------------------------------------------------------------------------------------


def measured(t: Training, more) -> None:
    """Validation tells `more(tensors, batch, known)` on top of what it tells."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = plain(tensors, batch)
        return {**known, **more(tensors, batch, known)}

    t.measure = measure


@fault(forecaster, "metric-range", step=49)
def forecaster_error_below_zero(t: Training) -> None:
    """`mae` is logged as the scorer of a library for searches gives it, with a minus in front, so that larger is better. Humbatova: wrong
    metrics."""
    measured(t, lambda tensors, batch, known: {"mae": -known["mae"]})


@fault(forecaster, "metric-constant", step=49)
def forecaster_forecasts_that_hit(t: Training) -> None:
    """`accuracy` compares forecasts and values for equality, as for classes: two broken numbers are never the same. Humbatova: wrong
    metrics."""
    hits = lambda tensors, batch: float((tensors["outputs"] == batch[1]).float().mean())  # noqa: E731
    measured(t, lambda tensors, batch, known: {"accuracy": hits(tensors, batch)})


@fault(forecaster, "metric-always-none", step=49)
def forecaster_scaled_error_is_none(t: Training) -> None:
    """The scaled error needs the season's length, which the configuration of this run does not have: the function returns None. Humbatova:
    wrong metrics; speech: optional metrics."""
    measured(t, lambda tensors, batch, known: {"mase": None})


@fault(forecaster, "metric-vanished", "metric-missing", step=149)
def forecaster_skill_until_the_cache_is_full(t: Training) -> None:
    """The skill is told while the cache of naive forecasts has room for two validations, and is left out of the dictionary after that.
    Speech: metrics that are missing in validation; Humbatova: wrong metrics."""
    cache: list[Batch] = []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = forecaster.measure(tensors, batch)
        if len(cache) >= 4:
            return {"mae": known["mae"]}
        cache.append(batch)
        return known

    t.measure = measure
