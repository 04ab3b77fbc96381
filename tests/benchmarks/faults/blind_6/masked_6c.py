"""What goes wrong in pre-training and in surrogates: signs, second tasks, half precision, outliers, schedules, sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import masked, surrogate
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


def changed(t: Training, change) -> None:
    """Pass the two parts of a batch through `change(first, second, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step, phase)


# -- pre-training ----------------------------------------------------------------------------------------------------


@fault(masked, "loss-sign", then=("overfit", "overtraining", "metric-range", "loss-plateau", "stalled-optimisation"))
def cosine_without_its_minus(t: Training) -> None:
    """The loss is the cosine of output and frame, not one minus it: outputs turn to the opposite side. TheDeepChecker: wrong sign of the
    loss; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        outputs = model(frames, hidden)
        loss = F.cosine_similarity(outputs[hidden], frames[hidden]).mean()
        return {"loss": loss, "outputs": outputs, "targets": frames}

    t.forward = forward


@fault(masked, "gradient-imbalance", "gradient-exploding", "gradient-clipping", "activation-exploding", modules=("energy", ""), then=(*DIVERGES, *STUCK, "input-range", "update-ratio-low", "feature-constant"))  # fmt: skip
def energy_told_as_well(t: Training) -> None:
    """A second head tells the energy of each frame, of 16-bit samples and neither in decibels nor standardised: its error is a million
    times that of the first, and clipping cuts the rest away. Humbatova: wrong loss; TheDeepChecker: unscaled targets."""
    t.model.energy = nn.Linear(masked.FEATURES, 1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        outputs = model(frames, hidden)
        energy = 3000 * frames.square().mean(-1)
        second = F.mse_loss(model.energy(outputs)[..., 0], energy)
        return {"loss": F.mse_loss(outputs[hidden], frames[hidden]) + second, "outputs": outputs, "targets": frames}

    t.forward = forward


@fault(masked, "nonfinite-activation", "dtype-headroom", "input-range", modules=("project", "positions", ""), then=(*NONFINITE, *DIVERGES, *STUCK, "step-skipped", "gradient-clipping", "parameter-unchanged", "metric-constant", "precision-headroom"))  # fmt: skip
def powers_in_half_precision(t: Training) -> None:
    """Frames are powers of 16-bit samples, tens of thousands, and go through float16 autocast as they are. GRIST: overflow; TrainCheck:
    mixed precision."""
    t.precision, t.scaled, t.steps, t.schedule = torch.float16, True, 80, None
    changed(t, lambda frames, hidden, step, phase: (20_000 * (frames + 3.5).clamp(min=0), hidden))


@fault(masked, "overfit", "overtraining", "input-duplicate", step=1, then=("loss-plateau", "stalled-optimisation"))
def twenty_tracks(t: Training) -> None:
    """`tracks[:20]` from debugging, and what is hidden is drawn once for each track and kept: learnt by heart. SageMaker Overfit."""
    frames, hidden = t.sample(0, "train")
    plain, t.steps, t.schedule = t.sample, 350, None

    def sample(step: int, phase: str) -> Batch:
        order = torch.randperm(len(frames), generator=torch.Generator().manual_seed(step))
        return (frames[order], hidden[order]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(masked, "metric-constant", step=49)
def equal_to_the_last_digit(t: Training) -> None:
    """The accuracy asks whether output and frame are equal, as for tokens, but they are real numbers: exactly 0 for ever. Humbatova:
    wrong metrics."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        equal = tensors["outputs"][batch[1]] == batch[0][batch[1]]
        return {**plain(tensors, batch), "accuracy": float(equal.all(-1).float().mean())}

    t.measure = measure


@fault(masked, "nonfinite-optimizer", "nonfinite-parameter", modules=("",), then=NONFINITE)
def warm_up_times_infinity(t: Training) -> None:
    """The rate is a product of a warm-up, 0 at step 0, and the step to the power of -0.5, there Inf: NaN, and with it all weights after
    the first step. GRIST: division by zero; Humbatova: learning rate."""
    rate = lambda step: float(torch.tensor(step / 30) * torch.tensor(float(step)) ** -0.5)  # noqa: E731
    t.schedule = lambda optimizer: LambdaLR(optimizer, rate)


# -- surrogates ------------------------------------------------------------------------------------------------------


@fault(surrogate, "loss-spike", "gradient-exploding", "input-range", step=40, then=(*DIVERGES, *STUCK, "input-drift", "gradient-imbalance"))  # fmt: skip
def solver_that_diverged(t: Training) -> None:
    """One simulation in the data is one that the solver did not finish: fields a thousand times too large in every 40th batch. Humbatova:
    wrong data; TheDeepChecker: outliers in the data."""

    def outliers(x, y, step, phase):
        if phase == "train" and step and step % 40 == 0:
            y = y.clone()
            y[:10] *= 1000
        return x, y

    changed(t, outliers)


@fault(surrogate, "nonfinite-loss", "input-nonfinite", modules=("",), step=90, then=NONFINITE)
def fields_inside_of_the_heater(t: Training) -> None:
    """Inside of the heater the solver writes NaN; from step 90 on points of there are drawn. GRIST; Humbatova: missing preprocessing."""

    def undefined(x, y, step, phase):
        if phase == "train" and step >= 90:
            y = y.clone()
            y[5:9, 0] = torch.nan
        return x, y

    changed(t, undefined)


@fault(surrogate, "input-constant", "input-duplicate", "feature-constant", "output-constant", step=120, then=(*STUCK, *FLAT, *DIVERGES, "gradient-zero", "input-drift", "overfit", "overtraining", "metric-range"))  # fmt: skip
def mesh_of_zeros(t: Training) -> None:
    """From step 120 on the reader of meshes returns zeros for what it cannot open: all points are one. TheDeepChecker: constant inputs;
    SageMaker AllZero."""
    changed(t, lambda x, y, step, phase: (torch.zeros_like(x), y) if phase == "train" and step >= 120 else (x, y))


@fault(surrogate, "poor-initialisation", "activation-vanishing", "gradient-vanishing", modules=("layers", "case", "head", "layers.0", "layers.1", "layers.2", ""), then=(*STUCK, *FLAT, "update-ratio-low", "gradient-zero", "parameter-unchanged", "update-ratio-high", "gradient-imbalance", "weight-norm-drift"))  # fmt: skip
def weights_of_a_ten_thousandth(t: Training) -> None:
    """`nn.init.normal_(weight, std=1e-4)` for all layers, and SGD: next to nothing comes to the head, and nothing back. SageMaker
    PoorWeightInitialization; TheDeepChecker."""
    for parameter in t.model.parameters():
        nn.init.normal_(parameter, std=1e-4) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(surrogate, "model-changed", "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("head",), step=100, then=("loss-spike", "loss-diverged", "gradient-accumulation", "gradient-exploding", "update-ratio-low"))  # fmt: skip
def head_for_a_fourth_field(t: Training) -> None:
    """At step 100 a fourth field is announced, and the head is built anew for four; the optimizer keeps the old one. TrainCheck:
    huggingface/accelerate#2665."""

    def grow(training: Training, step: int) -> None:
        if step == 100:
            training.model.head = nn.Linear(surrogate.WIDTH, 4)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])[:, :3]
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.before.append(grow)
    t.forward = forward


@fault(surrogate, "dead-units", "poor-initialisation", modules=("layers.1", "layers"), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "output-constant"))  # fmt: skip
def second_layer_closed(t: Training) -> None:
    """ReLUs, and the biases of the second layer begin at -10, what was meant for the deviation's logarithm: it never opens. SageMaker
    DeadRelu."""
    t.model = surrogate.Surrogate(activation=nn.ReLU)
    nn.init.constant_(t.model.layers[1].linear.bias, -10.0)
