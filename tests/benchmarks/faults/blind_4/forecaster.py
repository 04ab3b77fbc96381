"""What goes wrong in forecasters: gates, masks, missing hours, likelihoods, states, optimizers, augmentation."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

from faults import forecaster
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, update_of_two


def compared(t: Training, loss_of) -> None:
    """Use `loss_of(outputs, targets, model)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": loss_of(outputs, batch[1], model), "outputs": outputs, "targets": batch[1]}

    t.forward = forward


def changed(t: Training, change) -> None:
    """Pass pasts and targets through `change(x, y, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step, phase)


# -- layers ----------------------------------------------------------------------------------------------------------


@fault(forecaster, "activation-vanishing", "norm-input-variance", "feature-constant", "poor-initialisation", "gradient-vanishing", modules=("lstm", "norm"), then=("gradient-zero", "parameter-unchanged", *STUCK, *FLAT, "gradient-imbalance", "update-ratio-low", "gradient-exploding"))  # fmt: skip
def output_gate_shut(t: Training) -> None:
    """The bias of the output gate starts at -20, since the order of the gates is that of another library: the state that leaves the
    LSTM is nearly zero. SageMaker PoorWeightInitialization."""
    with torch.no_grad():
        t.model.lstm.bias_ih_l0[72:] = -20.0


@fault(forecaster, "gradient-exploding", "poor-initialisation", "gradient-imbalance", modules=("lstm", "project", ""), then=("activation-saturated", "parameter-unchanged", *DIVERGES, *STUCK, "gradient-clipping", "gradient-vanishing", "update-ratio-low", "gradient-zero"))  # fmt: skip
def recurrent_gain_of_eighty(t: Training) -> None:
    """Recurrent weights are drawn as an orthogonal matrix with a gain of 80, where the scale of something else was meant: gates are
    open or shut, and gradients grow with each hour. AutoTrainer: exploding gradient; SageMaker PoorWeightInitialization."""
    nn.init.orthogonal_(t.model.lstm.weight_hh_l0, gain=80.0)


class Standardised(nn.Module):
    """A normalisation of each number by itself, in front of the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(1)

    def forward(self, x):
        return self.norm(x[..., None])[..., 0]


@fault(forecaster, "feature-constant", "output-constant", "norm-input-variance", modules=("project", "project.0", "project.0.norm", ""), then=(*STUCK, *FLAT, "gradient-zero", "dead-units", "poor-initialisation", "gradient-imbalance", "activation-vanishing"))  # fmt: skip
def norm_of_single_numbers(t: Training) -> None:
    """`LayerNorm(1)` over an axis of one number: whatever goes in, its bias comes out. Humbatova: wrong axis; SageMaker
    TensorVariance."""
    t.model.project = nn.Sequential(Standardised(), t.model.project)


class MeanOfAll(forecaster.Forecaster):
    def forward(self, x):
        states, _ = self.lstm(self.activation(self.project(x)))
        return self.head(self.norm(states.mean((0, 1)))).expand(len(x), -1)


@fault(forecaster, "feature-constant", "output-constant", "batch-leak", "prediction-collapse", modules=("norm", "head", ""), then=(*STUCK, *FLAT))  # fmt: skip
def mean_over_items_as_well(t: Training) -> None:
    """The mean over time is one over items, too: all get the same forecast. Humbatova: wrong axis."""
    t.model = MeanOfAll()


class FirstState(forecaster.Forecaster):
    def forward(self, x):
        states, _ = self.lstm(self.activation(self.project(x)))
        return self.head(self.dropout(self.norm(states[:, 0])))


@fault(forecaster, "gradient-zero", "parameter-unchanged", modules=("lstm",), then=(*STUCK, "module-unused", "gradient-vanishing", "update-ratio-low", "overfit"))  # fmt: skip
def first_state_taken(t: Training) -> None:
    """`states[:, 0]` in place of `states[:, -1]`: recurrent weights never see a gradient, and the forecast sees one hour.
    Humbatova: wrong index."""
    t.model = FirstState()


class Bypassed(forecaster.Forecaster):
    def forward(self, x):
        inputs = self.activation(self.project(x))
        _states = self.lstm(inputs)[0]
        return self.head(self.dropout(self.norm(inputs[:, -1])))


@fault(
    forecaster,
    "module-unused",
    "parameter-unchanged",
    "gradient-zero",
    modules=("lstm",),
    then=(*STUCK, "update-ratio-low"),
)
def states_thrown_away(t: Training) -> None:
    """The LSTM runs, and the head is given what went into it. TrainCheck; Humbatova: missing
    connection."""
    t.model = Bypassed()


@fault(forecaster, "dropout-high", "gradient-zero", "feature-constant", "output-constant", "dead-units", "parameter-unchanged", modules=("dropout", "head", ""), then=(*STUCK, *FLAT, "module-unused", "update-ratio-low", "activation-vanishing"))  # fmt: skip
def dropout_of_one(t: Training) -> None:
    """`dropout=1`, one percent to its author, zeroes everything in training. TheDeepChecker: dropout; Humbatova: regularisation."""
    t.model = forecaster.Forecaster(dropout=1.0)


@fault(forecaster, "dead-units", "poor-initialisation", modules=("activation", "project"), then=("gradient-clipping", *STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "module-unused", "update-ratio-low", "activation-saturated", "loss-spike"))  # fmt: skip
def prior_of_rare_objects(t: Training) -> None:
    """A detector's recipe, a bias of -log(99) for rare objects, is applied to all linear layers: the ReLU never opens. SageMaker
    DeadRelu and PoorWeightInitialization."""
    t.model.apply(lambda module: nn.init.constant_(module.bias, -4.6) if isinstance(module, nn.Linear) else None)


# -- numbers ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One score for each state, padding excluded."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, 1)

    def forward(self, states, missing):
        return (self.score(states)[..., 0].masked_fill(missing, -torch.inf).softmax(1)[..., None] * states).sum(1)


class Attending(forecaster.Forecaster):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(24)

    def forward(self, x):
        states, _ = self.lstm(self.activation(self.project(x)))
        return self.head(self.norm(states[:, -1] + self.attention(states, x[..., 0] == 0)))


@fault(
    forecaster,
    "nonfinite-activation",
    modules=("attention", "attention.score"),
    step=95,
    then=(*NONFINITE, "metric-constant"),
)
def nothing_to_attend_to(t: Training) -> None:
    """Missing hours are zero and masked with -inf; from step 95 on one meter has no hour at all, and the softmax of its row is
    0 / 0. GRIST: division by zero."""
    t.model = Attending()

    def outage(x, y, step, phase):
        x = x.clone()
        x[:, :4, 0] = 0.0
        if phase == "train" and step >= 95:
            x[3, :, 0] = 0.0
        return x, y

    changed(t, outage)


class Whitened(nn.Module):
    """Each window by its mean and deviation, from sums."""

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        return (x - mean) / (x.square().mean(1, keepdim=True) - mean.square()).sqrt()


class Whitening(forecaster.Forecaster):
    def __init__(self) -> None:
        super().__init__()
        self.whitened = Whitened()

    def forward(self, x):
        return super().forward(torch.cat([self.whitened(x[..., :1]), x[..., 1:]], -1))


@fault(forecaster, "nonfinite-activation", modules=("whitened",), then=(*NONFINITE, "metric-constant", "input-range", "precision-loss"))  # fmt: skip
def variance_by_difference(t: Training) -> None:
    """The mean of squares less the square of the mean, of meter readings around 8000: in float32 it falls below zero, and the
    root is NaN. GRIST: square root of a negative number."""
    t.model = Whitening()
    changed(t, lambda x, y, step, phase: (torch.cat([x[..., :1] + 8000, x[..., 1:]], -1), y))


@fault(
    forecaster,
    "nonfinite-loss",
    "loss-diverged",
    "poor-initialisation",
    modules=("", "head"),
    then=(*NONFINITE, *DIVERGES, *STUCK),
)
def counts_exponentiated(t: Training) -> None:
    """Counts of some hundreds, a bias that starts at their mean, and `poisson_nll_loss`, which takes logarithms: exp(200) is Inf.
    GRIST: overflow of exp."""
    nn.init.constant_(t.model.head.bias, 200.0)
    changed(t, lambda x, y, step, phase: (x, (200 + 40 * y).round()))
    compared(t, lambda outputs, targets, model: F.poisson_nll_loss(outputs, targets))


@fault(forecaster, "nonfinite-loss", modules=("",), step=70, then=NONFINITE)
def targets_not_imputed(t: Training) -> None:
    """Missing hours are NaN in the file; they are filled in pasts, but not in targets, and at step 70 the first is met. GRIST;
    Humbatova: missing preprocessing."""

    def missing(x, y, step, phase):
        if phase == "train" and step >= 70:
            y = y.clone()
            y[11, 4] = torch.nan
        return x, y

    changed(t, missing)


@fault(forecaster, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "project"), then=(*NONFINITE, "input-drift"))  # fmt: skip
def logarithm_of_standardised(t: Training) -> None:
    """`log1p` of values, as counts are treated, behind the standardisation: below -1 it is NaN. GRIST: log of a negative number;
    Humbatova: wrong order of preprocessing."""
    changed(t, lambda x, y, step, phase: (torch.cat([x[..., :1].log1p(), x[..., 1:]], -1), y))


@fault(forecaster, "nonfinite-gradient", "nonfinite-parameter", modules=("norm", ""), then=NONFINITE)
def lasso_by_hand(t: Training) -> None:
    """A group lasso as `p.square().sum().sqrt()`: the normalisation's bias starts at zero, where the root's slope is infinite.
    GRIST: square root of zero."""
    lasso = lambda model: sum(p.square().sum().sqrt() for p in model.parameters())  # noqa: E731
    compared(t, lambda outputs, targets, model: F.mse_loss(outputs, targets) + 1e-4 * lasso(model))


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(forecaster, "update-ratio-high", "activation-saturated", modules=("lstm", "activation", "project", ""), then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "gradient-vanishing", "gradient-clipping", "parameter-unchanged", "dead-units"))  # fmt: skip
def rate_meant_for_sgd(t: Training) -> None:
    """SGD's rate of 0.5 is kept when Adam takes its place. Humbatova: learning rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 0.5)


@fault(forecaster, "update-ratio-low", "loss-plateau", "stalled-optimisation", "scheduler-ends-early", "parameter-unchanged", step=40, then=STUCK)  # fmt: skip
def decay_meant_for_epochs(t: Training) -> None:
    """`ExponentialLR(gamma=0.8)` for epochs is stepped with each batch: after 60 steps the rate is below 1e-8. Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.8)


@fault(forecaster, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "gradient-clipping"))
def half_an_accumulation(t: Training) -> None:
    """Gradients are zeroed at every eighth batch, as with accumulation, but each batch makes a step. TrainCheck: `zero_grad`
    misplaced."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.1)), None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        if step % 8 == 0:
            training.optimizer.zero_grad()
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(forecaster, "optimizer-duplicate-parameters", modules=("head", ""), then=(*DIVERGES, "loss-plateau"))
def head_in_two_optimizers(t: Training) -> None:
    """An optimizer for the head, and one for `model.parameters()`, in which the head is as well. TrainCheck: optimizer and its
    parameters."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.Adam(t.model.head.parameters(), 5e-3)]
    t.update = update_of_two


@fault(forecaster, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("lstm", "norm", "head"), then=("update-ratio-low", "gradient-clipping", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def lstm_exchanged_too_late(t: Training) -> None:
    """The optimizer exists when the LSTM is exchanged for one of a new size. TrainCheck: huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.lstm, t.model.norm = nn.LSTM(24, 40, batch_first=True), nn.LayerNorm(40)
    t.model.head = nn.Linear(40, forecaster.HORIZON)


@fault(forecaster, "loss-sign", then=(*DIVERGES, *STUCK, "overfit", "overtraining"))
def correlation_minimised(t: Training) -> None:
    """The loss is the correlation of forecast and target, not one minus it. TheDeepChecker: wrong sign of the loss."""
    compared(t, lambda outputs, targets, model: F.cosine_similarity(outputs, targets).mean())


# -- data ------------------------------------------------------------------------------------------------------------


@fault(
    forecaster,
    "overfit",
    "overtraining",
    "input-duplicate",
    then=("input-drift", "loss-plateau", "stalled-optimisation"),
)
def seeded_in_the_loader(t: Training) -> None:
    """The loader calls `manual_seed(42)` for each batch: its random windows are always the same 32. TrainCheck: duplicated
    data; SageMaker Overfit."""
    plain, t.steps = t.sample, 400
    t.sample = lambda step, phase: plain(0 if phase == "train" else step, phase)


@fault(forecaster, "input-range", "activation-exploding", modules=("project", "activation", "lstm", ""), then=(*DIVERGES, *STUCK, "gradient-imbalance", "input-drift", "activation-saturated", "gradient-clipping", "feature-constant", "dead-units"))  # fmt: skip
def changes_in_percent(t: Training) -> None:
    """`pct_change` of values around zero: most are some hundreds, some are millions. Humbatova: wrong preprocessing; GRIST:
    division by nearly zero."""

    def percent(x, y, step, phase):
        value = x[..., :1]
        before = value.roll(1, 1)
        return torch.cat([100 * (value - before) / before, x[..., 1:]], -1), y

    changed(t, percent)


@fault(forecaster, "metric-type", step=49)
def error_as_text(t: Training) -> None:
    """The error is formatted for the console before it is logged: a string. Humbatova: wrong type; speech: many loggers."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = measured(tensors, batch)
        return {**metrics, "mae": f"{metrics['mae']:.3f}"}

    t.measure = measure


@fault(forecaster, "input-constant", "input-duplicate", "feature-constant", step=90, then=("gradient-zero", "parameter-unchanged", *DIVERGES, *STUCK, "input-drift", "output-constant"))  # fmt: skip
def feed_went_down(t: Training) -> None:
    """From step 90 on the feed of the meters returns zeros, times of day as well. TheDeepChecker: constant inputs; SageMaker
    AllZero."""
    changed(t, lambda x, y, step, phase: (torch.zeros_like(x), y) if phase == "train" and step >= 90 else (x, y))
