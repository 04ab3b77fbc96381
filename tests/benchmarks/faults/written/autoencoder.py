"""What goes wrong in plain networks: activations, scales, losses, the arithmetic of zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from faults import autoencoder
from faults._fault import DIVERGES, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


def scaled(module: nn.Module, factor: float) -> None:
    """Multiply all weights (not biases) inside."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(factor)


@fault(autoencoder, "activation-saturated", "poor-initialisation", modules=("encoder.0", "encoder.1"), then=(*STUCK, "gradient-vanishing", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def saturated_tanh(t: Training) -> None:
    """Weights of the first layer 50 times too large. SageMaker SaturatedActivation; TheDeepChecker."""
    scaled(t.model.encoder[0], 50.0)


@fault(autoencoder, "activation-exploding", "gradient-exploding", "poor-initialisation", then=(*DIVERGES, *STUCK, "gradient-imbalance"))  # fmt: skip
def exploding_layers(t: Training) -> None:
    """Activations forgotten and weights 12 times too large: each layer multiplies. SageMaker PoorWeightInitialization."""
    t.model = autoencoder.Autoencoder(nn.Identity)
    scaled(t.model, 12.0)


@fault(autoencoder, "loss-sign", "weight-norm-drift", "activation-exploding", "gradient-exploding", "activation-saturated", step=30, then=(*DIVERGES, "gradient-vanishing"))  # fmt: skip
def loss_of_wrong_sign(t: Training) -> None:
    """The error is maximised. TheDeepChecker: wrong sign of the loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = autoencoder.forward(model, batch)
        return {**tensors, "loss": -tensors["loss"]}

    t.forward = forward


@fault(autoencoder, "module-unused", "gradient-zero", "parameter-unchanged", modules=("refine",))
def layer_never_called(t: Training) -> None:
    """A layer is built, registered and given to the optimizer, but `forward` does not call it. TrainCheck."""
    t.model.refine = nn.Linear(autoencoder.WIDTH, autoencoder.WIDTH)


@fault(autoencoder, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=NONFINITE)
def log_of_zero(t: Training) -> None:
    """Binary cross entropy by hand, on a sigmoid that reaches 0 and 1 exactly. GRIST: log of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, y = model(batch[0]), (batch[0] > 0).float()
        p = torch.sigmoid(300 * outputs)
        loss = -(y * torch.log(p) + (1 - y) * torch.log(1 - p)).mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "feature-constant", "dead-units", modules=("encoder",))
def pruned_unit(t: Training) -> None:
    """A mask of zeros from a pruning experiment still lies on eight units of the first layer. SageMaker AllZero."""
    mask = torch.ones(32)
    mask[:8] = 0.0
    t.model.encoder[1].register_forward_hook(lambda module, args, output: output * mask)


@fault(autoencoder, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=80, then=NONFINITE)
def root_of_zero(t: Training) -> None:
    """The root of the squared error of items that are padding, masked to exactly zero: finite forward, NaN backward.
    GRIST: sqrt of zero."""
    t.forward = _rooted
    plain = t.sample

    def sample(step: int, phase: str):
        (x,) = plain(step, phase)
        mask = torch.ones(len(x))
        mask[: 4 if phase == "train" and step >= 80 else 0] = 0.0
        return x, mask

    t.sample = sample


def _rooted(model: nn.Module, batch: Batch) -> Tensors:
    x, mask = batch
    outputs = model(x)
    error = ((outputs - x) * mask[:, None]).square().sum(1).sqrt().sum() / mask.sum()
    return {"loss": error, "outputs": outputs, "targets": x}


class Standardise(nn.Module):
    def forward(self, x):
        return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


@fault(autoencoder, "nonfinite-activation", "nonfinite-loss", modules=("encoder.standardise",), step=100, then=NONFINITE)  # fmt: skip
def variance_of_zero(t: Training) -> None:
    """Each item is divided by its deviation, without an epsilon; from step 100 on one item is constant. GRIST: division
    by zero."""
    encoder = nn.Sequential()
    encoder.add_module("standardise", Standardise())
    for name, layer in t.model.encoder.named_children():
        encoder.add_module(name, layer)
    t.model.encoder = encoder
    plain = t.sample

    def sample(step: int, phase: str):
        (x,) = plain(step, phase)
        if phase == "train" and step >= 100:
            x[5] = 0.0
        return (x,)

    t.sample = sample


@fault(autoencoder, "gradient-vanishing", "gradient-imbalance", "activation-vanishing", "feature-constant", modules=("encoder",), then=(*STUCK, "update-ratio-low", "parameter-unchanged"))  # fmt: skip
def ten_sigmoids(t: Training) -> None:
    """An encoder of ten sigmoid layers, plain SGD. SageMaker VanishingGradient; TheDeepChecker."""
    t.model.encoder = autoencoder.mlp((autoencoder.WIDTH, *[24] * 9, autoencoder.LATENT), nn.Sigmoid)
    t.optimize = lambda p: torch.optim.SGD(p, 0.1)


@fault(autoencoder, "activation-saturated", "input-range", "poor-initialisation", modules=("encoder.0", "encoder.1", ""), then=(*STUCK, "gradient-vanishing", "gradient-exploding", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def inputs_not_scaled(t: Training) -> None:
    """Numbers of some thousands go in as they are. TheDeepChecker: unscaled data."""
    plain = t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0] * 3000,)


@fault(autoencoder, "weight-norm-drift", "activation-vanishing", "output-constant", "feature-constant", "loss-plateau", "stalled-optimisation", step=60, then=(*STUCK, "gradient-vanishing", "update-ratio-high", "output-collapse"))  # fmt: skip
def weight_decay_of_ten(t: Training) -> None:
    """`weight_decay=10` in place of `1e-5`: the weights go to zero. Humbatova: regularisation; SageMaker TensorVariance."""
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3, weight_decay=10.0)


@fault(autoencoder, "update-ratio-high", "gradient-exploding", "loss-diverged", "loss-spike", "activation-saturated", then=(*DIVERGES, *NONFINITE, *STUCK, "gradient-vanishing", "weight-norm-drift"))  # fmt: skip
def loss_not_averaged(t: Training) -> None:
    """A sum over batch and features where the learning rate was chosen for the mean. TheDeepChecker: missing reduction."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = autoencoder.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] * batch[0].numel()}

    t.forward = forward
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(autoencoder, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("encoder",))  # fmt: skip
def encoder_left_out(t: Training) -> None:
    """The optimizer is given the decoder's parameters only, though all require gradients. SageMaker UnchangedTensor."""
    t.optimize = lambda p: torch.optim.Adam(t.model.decoder.parameters(), 2e-3)
