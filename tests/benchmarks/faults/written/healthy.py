"""Runs with nothing wrong: other optimizers, norms, activations, precisions and schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.optim import lr_scheduler as schedules

from faults import autoencoder, classifier, enhancement, language, recogniser, separation
from faults._fault import healthy
from faults.written import healthy_models

if TYPE_CHECKING:
    from faults._training import Batch, Observer, Tensors, Training

# -- programs as they are --------------------------------------------------------------------------------------------


@healthy
def plain_classifier() -> Training:
    """SGD with momentum, BatchNorm, ReLU."""
    return classifier.build(1)


@healthy
def plain_autoencoder() -> Training:
    """Adam, tanh, no normalisation."""
    return autoencoder.build(1)


@healthy
def plain_language() -> Training:
    """AdamW, warm-up and cosine, clipping, tied embeddings."""
    return language.build(1)


@healthy
def plain_separation() -> Training:
    """Adam, clipping, PIT; a loss that becomes negative."""
    return separation.build(1)


@healthy
def plain_recogniser() -> Training:
    """AdamW, CTC with its flat beginning, a GRU."""
    return recogniser.build(1)


@healthy
def plain_enhancement() -> Training:
    """Adam, causal convolutions, a sigmoid mask."""
    return enhancement.build(1)


# -- optimizers ------------------------------------------------------------------------------------------------------


@healthy
def sgd() -> Training:
    """Plain SGD, without momentum."""
    t = classifier.build(2)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05)
    return t


@healthy
def nesterov() -> Training:
    """SGD with Nesterov momentum and weight decay."""
    t = classifier.build(3)
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return t


@healthy
def adam_on_pictures() -> Training:
    """Adam with its default rate."""
    t = classifier.build(4)
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    return t


@healthy
def adafactor() -> Training:
    """Adafactor with its relative steps."""
    t = language.build(2)
    t.optimize, t.schedule = (lambda p: torch.optim.Adafactor(p, 0.05)), None
    return t


@healthy
def rmsprop() -> Training:
    """RMSprop, which starts with large steps."""
    t = enhancement.build(2)
    t.optimize = lambda p: torch.optim.RMSprop(p, 5e-4)
    return t


@healthy
def lion() -> Training:
    """Steps of one size in all weights."""
    t = language.build(3)
    t.optimize = lambda p: healthy_models.Lion(p, 6e-4)
    return t


@healthy
def adagrad() -> Training:
    """A rate that falls by itself."""
    t = autoencoder.build(2)
    t.optimize = lambda p: torch.optim.Adagrad(p, 0.005)
    return t


@healthy
def lbfgs() -> Training:
    """Several passes a step, on one large batch."""
    t = autoencoder.build(3)
    t.optimize, t.steps = (lambda p: torch.optim.LBFGS(p, 0.3, max_iter=4, history_size=6)), 150

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = (torch.cat([training.sample(i, "train")[0] for i in range(8)]),)
        seen: list[Tensors] = []

        def closure():
            training.optimizer.zero_grad()
            seen.append(training.forward(training.model, batch))
            seen[-1]["loss"].backward()
            return seen[-1]["loss"]

        training.optimizer.step(closure)
        observer.backward_done(training, step)
        return batch, seen[0]

    t.update = update
    return t


@healthy
def parameter_groups() -> Training:
    """Two groups: the new head learns ten times as fast as the rest, biases and norms do not decay."""
    t = classifier.build(5)

    def optimize(parameters):
        head = list(t.model.head.parameters())
        rest = [p for p in parameters if all(p is not h for h in head)]
        return torch.optim.AdamW([{"params": rest, "lr": 3e-4}, {"params": head, "lr": 3e-3}])

    t.optimize = optimize
    return t


# -- normalisation and activations -----------------------------------------------------------------------------------


@healthy
def group_norm() -> Training:
    """GroupNorm and SiLU."""
    return classifier.build(6, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)


@healthy
def instance_norm() -> Training:
    """InstanceNorm without parameters, GELU."""
    return classifier.build(7, norm=nn.InstanceNorm2d, activation=nn.GELU)


@healthy
def rms_norm() -> Training:
    """RMSNorm and SiLU in the transformer."""
    return language.build(4, norm=nn.RMSNorm, activation=nn.SiLU)


@healthy
def no_norm() -> Training:
    """A plain ReLU network with the initialisation for it."""
    t = classifier.build(8, norm=lambda channels: nn.Identity())
    for module in t.model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    return t


@healthy
def weight_normalised() -> Training:
    """Weight norm, whose parameters are a length and a direction."""
    t = enhancement.build(3, norm=lambda channels: nn.Identity(), activation=nn.ELU)
    for layer in (t.model.layer1, t.model.layer2, t.model.layer3):
        weight_norm(layer.conv)
    return t


@healthy
def batch_norm_autoencoder() -> Training:
    """BatchNorm1d and LeakyReLU."""
    return autoencoder.build(4, norm=nn.BatchNorm1d, activation=nn.LeakyReLU)


@healthy
def hard_activations() -> Training:
    """Hardtanh and its flat ends, in a recogniser."""
    return recogniser.build(2, activation=nn.Hardtanh)


@healthy
def softplus_and_relu6() -> Training:
    """ReLU6 in an enhancer."""
    return enhancement.build(4, activation=nn.ReLU6)


@healthy
def batch_norm_separator() -> Training:
    """BatchNorm and ReLU in place of gLN and PReLU."""
    return separation.build(2, norm=nn.BatchNorm1d, activation=nn.ReLU)


# -- precision -------------------------------------------------------------------------------------------------------


@healthy
def bfloat16_autocast() -> Training:
    """Mixed precision, bfloat16."""
    t = classifier.build(9)
    t.precision = torch.bfloat16
    return t


@healthy
def bfloat16_weights() -> Training:
    """Everything in bfloat16."""
    t = autoencoder.build(5)
    t.model, plain = t.model.bfloat16(), t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].bfloat16(),)
    return t


@healthy
def float64() -> Training:
    """Everything in float64."""
    t = autoencoder.build(6)
    t.model, plain = t.model.double(), t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].double(),)
    return t


@healthy
def float16_with_scaler() -> Training:
    """Mixed precision, float16, and a gradient scaler whose first steps are skipped."""
    t = language.build(5)
    t.precision, t.scaled, t.steps = torch.float16, True, 200
    t.schedule = lambda optimizer: language.warm_up_and_cosine(optimizer, 200)
    return t


# -- schedules -------------------------------------------------------------------------------------------------------


@healthy
def one_cycle() -> Training:
    """One cycle up and down to nearly zero."""
    t = classifier.build(10)
    t.schedule = lambda optimizer: schedules.OneCycleLR(optimizer, 0.1, total_steps=301)
    return t


@healthy
def warm_restarts() -> Training:
    """A cosine that is restarted every 75 steps."""
    t = enhancement.build(5)
    t.schedule = lambda optimizer: schedules.CosineAnnealingWarmRestarts(optimizer, 75)
    return t


@healthy
def long_warm_up() -> Training:
    """100 steps of warm-up from zero."""
    t = separation.build(3)
    t.schedule = lambda optimizer: schedules.LambdaLR(optimizer, lambda step: min(1.0, step / 100))
    return t


@healthy
def step_decay() -> Training:
    """A tenth of the rate for the last third."""
    t = classifier.build(11)
    t.schedule = lambda optimizer: schedules.StepLR(optimizer, 200, 0.1)
    return t
