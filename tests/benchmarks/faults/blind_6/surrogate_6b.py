"""What goes wrong in surrogates of fields: rates, decay, layers and their first weights, modes, optimizers, metrics."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from faults import surrogate
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, plain_validation

# -- rates and decay -------------------------------------------------------------------------------------------------


@fault(surrogate, "update-ratio-low", "stalled-optimisation", "parameter-unchanged", "scheduler-ends-early", step=40, then=STUCK)  # fmt: skip
def decay_of_a_thousand_epochs(t: Training) -> None:
    """`ExponentialLR(0.75)`, for a paper's thousand epochs, is stepped with each batch: after 80 of them nothing moves. Humbatova:
    learning rate; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.75)


@fault(surrogate, "update-ratio-high", "loss-diverged", "gradient-exploding", "weight-norm-drift", step=60, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-zero"))  # fmt: skip
def decay_upside_down(t: Training) -> None:
    """`gamma = 1 / 0.97` where 0.97 is meant: the rate grows with each step. Humbatova: learning rate; AutoTrainer: oscillating
    loss."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 1 / 0.97)


@fault(surrogate, "scheduler-ends-early", step=100, then=("loss-spike", "overtraining", "schedule-unfinished"))
def cosine_of_the_first_mesh(t: Training) -> None:
    """`T_max` is the number of batches of the first of three meshes: at step 100 the rate is zero, then it rises again. Humbatova:
    learning rate; TrainCheck: schedules."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 100)


@fault(surrogate, "weight-norm-drift", step=5, then=("activation-vanishing", *STUCK, *FLAT, "update-ratio-low", "update-ratio-high", "loss-diverged", "weight-decay-on-norms", "overtraining"))  # fmt: skip
def decay_with_the_rate(t: Training) -> None:
    """`weight_decay=20` for AdamW, a value that belongs to a penalty divided by the number of points: weights shrink in each step.
    TheDeepChecker: wrong regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=20.0)
    t.schedule = None


@fault(surrogate, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))
def clipped_to_the_tolerance(t: Training) -> None:
    """`clip=1e-5` is the solver's tolerance, one line below in the configuration, with SGD. TrainCheck: wrong clip; Humbatova:
    parameters of the optimiser."""
    t.clip, t.optimize = 1e-5, lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(surrogate, "gradient-accumulation", step=1, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated"))  # fmt: skip
def zeroed_in_the_old_loop(t: Training) -> None:
    """The loop was moved to a function, and `zero_grad()` stayed behind; SGD. TrainCheck: missing `zero_grad`."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.05)

    def keep(training: Training, step: int) -> None:
        training.optimizer.zero_grad = lambda set_to_none=True: None

    t.before.append(keep)


@fault(surrogate, "parameter-unchanged", "update-ratio-low", modules=("case",), then=("stalled-optimisation",))
def rate_of_zero_for_a_part(t: Training) -> None:
    """A group for what the parameters go through has `lr: 0`, as in the stage that fits the coordinates alone. TrainCheck: parameters
    not updated; SageMaker UnchangedTensor."""
    rest = [p for name, p in t.model.named_parameters() if not name.startswith("case")]
    t.optimize = lambda p: torch.optim.Adam([{"params": rest}, {"params": t.model.case.parameters(), "lr": 0.0}], 5e-3)


@fault(surrogate, "optimizer-misses-parameters", "parameter-unchanged", modules=("case", "head"), then=("gradient-accumulation", "gradient-exploding", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def layers_only(t: Training) -> None:
    """`Adam(model.layers.parameters())` is left of the time when the model had no more than layers. TrainCheck: optimizer with a part
    of the parameters."""
    t.optimize = lambda p: torch.optim.Adam(t.model.layers.parameters(), 5e-3)


@fault(
    surrogate, "parameter-changed", modules=("case",), step=100, then=("gradient-zero", "optimizer-frozen-parameters")
)
def frozen_but_with_moments(t: Training) -> None:
    """At step 100 what the parameters go through is frozen, while gradients are zeroed and not dropped: Adam's moments move it on.
    TrainCheck: frozen parameters that change."""

    def freeze(training: Training, step: int) -> None:
        if step == 0:
            training.optimizer.zero_grad = partial(training.optimizer.zero_grad, set_to_none=False)
        if step == 100:
            training.model.case.requires_grad_(False)

    t.before.append(freeze)


# -- layers and their first weights ----------------------------------------------------------------------------------


@fault(surrogate, "activation-saturated", "poor-initialisation", modules=("layers", "layers.0", "layers.1", "layers.2"), then=("gradient-vanishing", "gradient-exploding", "activation-exploding", "gradient-imbalance", "update-ratio-low", *STUCK))  # fmt: skip
def tanh_with_wide_weights(t: Training) -> None:
    """Tanh, and weights drawn with a deviation of 3 in place of 3 / 48: nearly all units are at their ends. SageMaker
    SaturatedActivation and PoorWeightInitialization."""
    t.model = surrogate.Surrogate(activation=nn.Tanh)
    for layer in t.model.layers:
        nn.init.normal_(layer.linear.weight, std=3.0)


@fault(surrogate, "gradient-vanishing", "gradient-imbalance", modules=("layers", "case", "layers.0", ""), then=(*STUCK, *FLAT, "update-ratio-low", "activation-saturated", "parameter-unchanged", "gradient-zero"))  # fmt: skip
def twelve_layers_of_sigmoids(t: Training) -> None:
    """Twelve layers with sigmoids and nothing around them, SGD: hardly any gradient comes to the first. AutoTrainer: vanishing gradient;
    SageMaker VanishingGradient."""
    t.model = surrogate.Surrogate(activation=nn.Sigmoid, layers=12)
    t.optimize, t.schedule = (lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)), None


class Sine(nn.Module):
    def forward(self, x):
        return torch.sin(30 * x)


@fault(surrogate, "gradient-exploding", "gradient-imbalance", "poor-initialisation", modules=("layers", "case", "layers.0", ""), then=(*STUCK, *DIVERGES, "overfit", "overtraining"))  # fmt: skip
def sines_with_usual_weights(t: Training) -> None:
    """`sin(30 x)`, as in SIREN, in five layers, without SIREN's weights, which are 30 times smaller: gradients grow tenfold with each
    layer. AutoTrainer: exploding gradient; SageMaker PoorWeightInitialization."""
    t.model = surrogate.Surrogate(activation=Sine, layers=5)


@fault(surrogate, "units-symmetric", "poor-initialisation", modules=("layers", "case", "layers.0", "layers.1", "layers.2", ""), then=(*DIVERGES, *STUCK, *FLAT, "metric-range", "gradient-imbalance"))  # fmt: skip
def all_begin_at_a_tenth(t: Training) -> None:
    """`nn.init.constant_(p, 0.1)` for each parameter: a layer has one unit, 48 times. TheDeepChecker: symmetric units; SageMaker
    PoorWeightInitialization."""
    for parameter in t.model.parameters():
        nn.init.constant_(parameter, 0.1)


@fault(surrogate, "update-ratio-high", "loss-diverged", "activation-exploding", "gradient-exploding", "weight-norm-drift", modules=("layers", "layers.0", "layers.1", "layers.2", "case", "head", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-zero", "parameter-unchanged", "update-ratio-low", "metric-range"))  # fmt: skip
def rate_of_one(t: Training) -> None:
    """ReLUs, and Adam at a rate of 1.0, the default of another optimizer: the second loss is 1e20. TheDeepChecker: unstable updates;
    Humbatova: learning rate."""
    t.model = surrogate.Surrogate(activation=nn.ReLU)
    t.optimize = lambda p: torch.optim.Adam(p, 1.0)


class Averaging(surrogate.Surrogate):
    def forward(self, inputs):
        case, x = self.case(inputs[:, surrogate.COORDINATES :]), self.waves(inputs[:, : surrogate.COORDINATES])
        for layer in self.layers:
            x = layer(x, case)
        return self.head(x.mean(0, keepdim=True).expand_as(x))


@fault(
    surrogate,
    "feature-constant",
    "output-constant",
    "prediction-collapse",
    "batch-leak",
    modules=("head", ""),
    then=(*STUCK, *FLAT),
)
def mean_over_points(t: Training) -> None:
    """A pooling over axis 0, which had been that of the mesh in a model of whole meshes: all points get the same fields. Humbatova:
    wrong axis."""
    t.model = Averaging()


@fault(
    surrogate, "gradient-zero", "parameter-unchanged", "module-unused", modules=("case",), then=("update-ratio-low",)
)
def case_as_numbers(t: Training) -> None:
    """`.data`, to silence a warning, of what the parameters have gone through: no gradient comes to it. TrainCheck: a part without
    gradients; SageMaker UnchangedTensor."""
    t.model.case.register_forward_hook(lambda module, args, output: output.data)


@fault(surrogate, "norm-input-variance", "feature-constant", "output-constant", modules=("head",), then=(*STUCK, *FLAT))
def norm_behind_the_head(t: Training) -> None:
    """Each field has a head of its own, all with the recipe of a hidden layer: a linear layer, then a LayerNorm, here of one number.
    What comes out is the norm's bias. Humbatova: layer properties; SageMaker TensorVariance."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fields = nn.ModuleList(nn.Sequential(nn.Linear(surrogate.WIDTH, 1), nn.LayerNorm(1)) for _ in range(3))

        def forward(self, x):
            return torch.cat([field(x) for field in self.fields], -1)

    t.model.head = Heads()


# -- modes and metrics -----------------------------------------------------------------------------------------------


@fault(surrogate, "dropout-high", modules=("dropout",), then=(*STUCK, "loss-spike", "overtraining"))
def dropout_of_nine_tenths(t: Training) -> None:
    """`dropout=0.9` in front of the head, the share to keep. TheDeepChecker: dropout; Humbatova: layer properties."""
    t.model = surrogate.Surrogate(dropout=0.9)


@fault(surrogate, "validation-in-train-mode", step=49, then=("overtraining",))
def fields_without_eval(t: Training) -> None:
    """Validation was written for a model without dropout, and has no `model.eval()`; now there is a dropout of 0.2. TrainCheck: wrong
    mode."""
    t.model = surrogate.Surrogate(dropout=0.2)

    def validate(training: Training, step: int, observer: Observer) -> None:
        evaluate, training.model.eval = training.model.eval, lambda: training.model
        plain_validation(training, step, observer)
        training.model.eval = evaluate

    t.validate = validate


@fault(surrogate, "metric-nonfinite", step=49)
def percentage_of_nothing(t: Training) -> None:
    """The mean absolute percentage error of the speed, which is exactly zero at the wall: Inf. GRIST: division by zero; Humbatova: wrong
    metrics."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        mean, size = surrogate.scales()
        wanted, told = (batch[1] * size + mean)[:, 2], (tensors["outputs"] * size + mean)[:, 2]
        wanted = wanted.where(batch[0][:, 1] > -0.97, 0.0)
        return {**surrogate.measure(tensors, batch), "speed_mape": float(((told - wanted) / wanted).abs().mean())}

    t.measure = measure


@fault(surrogate, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))
def error_of_the_first_hours(t: Training) -> None:
    """The score is reported as `r2` only until the rate has fallen below a bound, a condition meant for the printed line. speech:
    metrics that are missing in validation."""
    plain, calls = t.measure, []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = plain(tensors, batch)
        calls.append(1)
        return metrics if len(calls) <= 4 else {name: value for name, value in metrics.items() if name != "r2"}

    t.measure = measure


@fault(surrogate, "metric-type", step=49)
def errors_as_one_tensor(t: Training) -> None:
    """The errors of the three fields are logged as one tensor of three numbers. Humbatova: wrong type of data."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {**plain(tensors, batch), "mae": (tensors["outputs"] - batch[1]).abs().mean(0)}

    t.measure = measure


@fault(surrogate, "metric-grad", step=0, then=("metric-phase-mismatch",))
def temperature_with_its_graph(t: Training) -> None:
    """The part of the loss that is the temperature's is logged as a tensor with its graph, in each step. PyTorch FAQ; TrainCheck:
    memory."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        observer.log({"temperature_loss": F.mse_loss(tensors["outputs"][:, 0], batch[1][:, 0])}, "train", step)
        return batch, tensors

    t.update = update


@fault(surrogate, "metric-range", step=49)
def share_above_one(t: Training) -> None:
    """The accuracy, the share of points within 5 K, is counted over batches and divided by the number of batches, not of points.
    Humbatova: wrong metrics."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        near = (tensors["outputs"] - batch[1])[:, 0].abs() * surrogate.scales()[1][0] < 5
        return {**plain(tensors, batch), "accuracy": float(near.sum())}

    t.measure = measure
