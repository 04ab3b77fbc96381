"""More of what goes wrong in plain networks: raw columns, rates, penalties, frozen layers, rounding."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update

if TYPE_CHECKING:
    from collections.abc import Iterable

FLAT = ("feature-constant", "gradient-vanishing", "gradient-zero", "gradient-imbalance", "dead-units")


@fault(autoencoder, "input-range", "activation-saturated", "gradient-imbalance", "gradient-exploding", modules=("encoder.0", "encoder.1", "decoder.4", ""), then=(*STUCK, *FLAT, "poor-initialisation", "activation-exploding", "update-ratio-low"))  # fmt: skip
def raw_column(t: Training) -> None:
    """One of 24 columns is a time in milliseconds, the others are standardised. TheDeepChecker: unscaled data; Humbatova:
    missing preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        x[:, 7] = 3e4 + 1e4 * x[:, 7]
        return (x,)

    t.sample = sample


@fault(autoencoder, "dead-units", "update-ratio-high", then=(*DIVERGES, *STUCK, *FLAT, "activation-vanishing"))  # fmt: skip
def rate_kills_units(t: Training) -> None:
    """ReLU and a learning rate of 0.1 for Adam: the first steps push units below zero for good. AutoTrainer: dying ReLU;
    SageMaker DeadRelu."""
    t.model = autoencoder.Autoencoder(nn.ReLU)
    t.optimize = lambda p: torch.optim.Adam(p, 0.1)


class Variational(autoencoder.Autoencoder):
    """Noise on the code; the deviation is the exponential of whatever the encoder says."""

    def __init__(self, activation) -> None:
        super().__init__(activation)
        self.encoder = autoencoder.mlp((autoencoder.WIDTH, 32, 16, 2 * autoencoder.LATENT), activation)

    def forward(self, x):
        mean, log_variance = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        return self.decoder(code), 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


def variational_forward(weight: float):
    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, divergence = model(batch[0])
        loss = F.mse_loss(outputs, batch[0]) + weight * divergence.sum(1).mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    return forward


@fault(autoencoder, "output-constant", "feature-constant", "loss-plateau", "stalled-optimisation", step=20, then=(*STUCK, *FLAT, "activation-vanishing"))  # fmt: skip
def divergence_not_averaged(t: Training) -> None:
    """The divergence is a sum over the batch, the error a mean over everything: the code carries nothing. Humbatova: wrong
    loss; the posterior collapse of Bowman et al. 2016, arXiv:1511.06349."""
    t.model, t.forward = Variational(nn.Tanh), variational_forward(float(autoencoder.BATCH))


@fault(autoencoder, "parameter-unchanged", "update-ratio-low", "loss-plateau", "stalled-optimisation", then=STUCK)  # fmt: skip
def steps_below_bfloat16(t: Training) -> None:
    """Weights in bfloat16 and the learning rate of a fine-tuning, 1e-5: each step is rounded away. SageMaker
    UnchangedTensor and WeightUpdateRatio."""
    t.model, plain = t.model.bfloat16(), t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].bfloat16(),)
    t.optimize = lambda p: torch.optim.Adam(p, 1e-5)


@fault(autoencoder, "parameter-changed", modules=("encoder",), step=100, then=("gradient-zero", "gradient-vanishing", "module-unused", "optimizer-frozen-parameters"))  # fmt: skip
def frozen_encoder_drifts(t: Training) -> None:
    """The encoder is frozen at step 100, but its gradients are zeros and not None: momentum and weight decay go on.
    Humbatova: training process; SageMaker UnchangedTensor, the other way round."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.05)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad(set_to_none=False)
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    def freeze(training: Training, step: int) -> None:
        if step == 100:
            training.model.encoder.requires_grad_(False)

    t.update = update
    t.before.append(freeze)


@fault(autoencoder, "activation-saturated", "loss-plateau", "stalled-optimisation", "dead-units", modules=("decoder.4", "decoder.5", ""), step=30, then=(*STUCK, "feature-constant", "gradient-vanishing", "weight-norm-drift"))  # fmt: skip
def sigmoid_for_signed_targets(t: Training) -> None:
    """A sigmoid at the end, from an autoencoder of pictures, where half of the targets are negative. Humbatova: wrong
    activation function."""
    t.model.decoder.append(nn.Sigmoid())
    t.optimize = lambda p: torch.optim.Adam(p, 1e-2)


@fault(autoencoder, "gradient-zero", "parameter-unchanged", "module-unused", modules=("encoder",), then=(*STUCK, *FLAT, "update-ratio-low"))  # fmt: skip
def rounded_code(t: Training) -> None:
    """The code is rounded to steps of a quarter, without a straight-through gradient. TheDeepChecker: gradients of zero."""
    t.model.encoder.register_forward_hook(lambda module, args, output: torch.round(output * 4) / 4)


@fault(autoencoder, "update-ratio-high", "loss-diverged", "loss-spike", "activation-saturated", "gradient-exploding", step=60, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT))  # fmt: skip
def rate_finder_left_on(t: Training) -> None:
    """The search for a learning rate was never switched off: 4 % more at each step. Humbatova: learning rate; AutoTrainer:
    oscillating loss."""
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 1.04)


@fault(autoencoder, "weight-norm-drift", "activation-saturated", "loss-diverged", "activation-exploding", step=30, then=(*DIVERGES, *STUCK, *FLAT, "loss-sign", "overfit"))  # fmt: skip
def penalty_of_wrong_sign(t: Training) -> None:
    """The penalty on the squared weights is subtracted: they grow, and the loss falls all the better. TheDeepChecker and
    Humbatova: wrong regularisation."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = autoencoder.forward(model, batch)
        penalty = sum(p.square().sum() for p in model.parameters())
        return {**tensors, "loss": tensors["loss"] - 0.02 * penalty}

    t.forward = forward


@fault(autoencoder, "poor-initialisation", "activation-saturated", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "update-ratio-low"))  # fmt: skip
def standard_normal_weights(t: Training) -> None:
    """`torch.randn` for all weights, whatever their fan-in. SageMaker PoorWeightInitialization; Humbatova: wrong weights
    initialisation."""
    for parameter in matrices(t.model):
        nn.init.normal_(parameter)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


def matrices(model: nn.Module) -> Iterable[nn.Parameter]:
    return (parameter for parameter in model.parameters() if parameter.ndim > 1)
