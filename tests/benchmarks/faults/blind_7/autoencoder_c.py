"""What goes wrong in plain networks: warm-ups, gaps as NaN, penalties, norms of single units, noise in place, rounding of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import autoencoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, seeded

if TYPE_CHECKING:
    from torch.nn import Module

FITS = ("overfit", "overtraining")


def with_loss(t: Training, term) -> None:
    """The loss is `term(model, outputs, x)`."""

    def forward(model: Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": term(model, outputs, batch[0]), "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "parameter-unchanged", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "schedule-unfinished", "schedule-unreachable", "overtraining"))  # fmt: skip
def autoencoder_warm_up_in_whole_numbers(t: Training) -> None:
    """A warm-up of 1000 steps is `step // 1000`: the rate is zero as long as it lasts, and the run is shorter. Humbatova: learning rate;
    SageMaker UnchangedTensor."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1, step // 1000))


@fault(autoencoder, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "encoder", "encoder.0"), step=60, then=(*NONFINITE, *STUCK))  # fmt: skip
def gaps_times_a_mask(t: Training) -> None:
    """Gaps are NaN and are multiplied by a mask of zeros, which leaves NaN; from step 60 on comes a file that has some. GRIST: NaN as a
    number; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        if phase == "train" and step >= 60:
            there = torch.rand(x.shape, generator=seeded(721, step)) > 0.01
            x = x.where(there, float("nan")) * there
        return (x,)

    t.sample = sample


@fault(autoencoder, "nonfinite-loss", modules=("",), then=("loss-diverged", "metric-nonfinite"))
def sparseness_of_negative_units(t: Training) -> None:
    """The sparseness penalty is a divergence between rates of firing, for units of a sigmoid, and these are of a tanh: the logarithm of a
    negative mean. GRIST: logarithm of negative numbers."""

    def term(model, outputs, x):
        rate = model.encoder[:2](x).mean(0)
        divergence = 0.05 * (0.05 / rate).log() + 0.95 * (0.95 / (1 - rate)).log()
        return F.mse_loss(outputs, x) + 1e-3 * divergence.sum()

    with_loss(t, term)


@fault(autoencoder, "norm-input-variance", "feature-constant", "output-constant", "gradient-zero", "activation-vanishing", modules=("", "encoder.1", "encoder.4", "decoder.1", "decoder.4", "encoder", "decoder", "encoder.0"), then=(*STUCK, *FLAT, "parameter-unchanged", "update-ratio-low", "module-unused", "overtraining", "gradient-imbalance", "dead-units"))  # fmt: skip
def groups_of_one_unit(t: Training) -> None:
    """`GroupNorm(width, width)` in place of `GroupNorm(4, width)`: each unit is normalised by itself, which leaves zero of it. Humbatova:
    wrong layer argument; SageMaker AllZero."""
    t.model = autoencoder.Autoencoder(norm=lambda width: nn.GroupNorm(width, width))


@fault(autoencoder, "input-drift", "loss-diverged", step=10, then=(*DIVERGES, "input-range", "overtraining", "activation-saturated", "stalled-optimisation"))  # fmt: skip
def noise_added_in_place(t: Training) -> None:
    """`x += noise` for a denoising autoencoder writes into the table itself: each epoch adds more. TrainCheck: data that change;
    Humbatova: wrong preprocessing."""
    plain, table = t.sample, autoencoder.points(320, seeded(722))

    def sample(step: int, phase: str) -> Batch:
        if phase == "val":
            return plain(step, phase)
        rows = slice(step % 10 * autoencoder.BATCH, (step % 10 + 1) * autoencoder.BATCH)
        x = table[rows]
        x += torch.randn(x.shape, generator=seeded(723, step))
        return (x.clone(),)

    t.sample = sample


@fault(
    autoencoder,
    "nonfinite-loss",
    "nonfinite-gradient",
    modules=("", "decoder.4", "decoder"),
    then=(*NONFINITE, *STUCK, "feature-constant", "activation-vanishing", "poor-initialisation"),
)
def cosine_of_outputs_of_zero(t: Training) -> None:
    """The last layer begins at zero, as is usual, and the loss is a cosine by hand, without an epsilon: 0 / 0 in the first step. GRIST:
    division by zero; SageMaker AllZero."""
    nn.init.zeros_(t.model.decoder[4].weight)
    nn.init.zeros_(t.model.decoder[4].bias)
    with_loss(t, lambda model, outputs, x: 1 - ((outputs * x).sum(1) / (outputs.norm(dim=1) * x.norm(dim=1))).mean())


@fault(autoencoder, "gradient-zero", "parameter-unchanged", "stalled-optimisation", "update-ratio-low", then=(*STUCK, "module-unused", "overtraining", "step-skipped"))  # fmt: skip
def gradients_as_whole_numbers(t: Training) -> None:
    """Gradients are sent between machines in eight bits: they are rounded, and the factor of 127 in front of that is missing. TrainCheck:
    gradients that are lost; TheDeepChecker: gradients of zero."""

    def compress(training: Training, step: int) -> None:
        for parameter in training.model.parameters():
            parameter.grad = parameter.grad.round().clamp(-127, 127)

    t.after_backward.append(compress)


@fault(autoencoder, "input-dtype")
def autoencoder_columns_of_float64(t: Training) -> None:
    """Columns come from a table of NumPy as float64, and `forward` converts them: twice the memory in all queues. TrainCheck: wrong
    dtype."""
    plain = t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].double(),)
    t.model.register_forward_pre_hook(lambda model, args: (args[0].float(),))
    t.forward = lambda model, batch: autoencoder.forward(model, (batch[0].float(),))


@fault(autoencoder, "validation-in-train-mode", step=49, then=("batch-leak", "metric-aggregate"))
def autoencoder_without_eval(t: Training) -> None:
    """A network with BatchNorm is validated as the loop has left it, in train mode. TrainCheck: wrong mode."""
    t.model = autoencoder.Autoencoder(norm=nn.BatchNorm1d)
    t.model.eval = t.model.train


@fault(autoencoder, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "activation-saturated", "gradient-clipping", "overtraining"))  # fmt: skip
def autoencoder_zeroed_once_an_epoch(t: Training) -> None:
    """`zero_grad()` stands in the outer loop, of epochs of 100 batches: in each step are the gradients of all before. TrainCheck: misplaced
    `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 100 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update, t.optimize = update, lambda p: torch.optim.SGD(p, 0.1)


@fault(autoencoder, "metric-constant", step=49)
def explained_as_a_whole_number(t: Training) -> None:
    """The share of variance that is explained goes into a column of integers: it is zero for ever. Humbatova: wrong validation
    metric."""
    plain = t.measure
    t.measure = lambda tensors, batch: {"explained": float(torch.tensor(plain(tensors, batch)["explained"]).long())}


@fault(
    autoencoder,
    "update-ratio-low",
    "stalled-optimisation",
    then=("weight-decay-on-norms", *STUCK, "overtraining"),
)
def rate_and_decay_exchanged(t: Training) -> None:
    """The rate is given as the decay and the decay as the rate: 1e-7 for Adam. Humbatova: learning rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-7, weight_decay=2e-3)
