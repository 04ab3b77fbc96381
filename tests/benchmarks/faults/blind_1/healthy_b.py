"""More runs with nothing wrong: other kinds of losses, rates that go round, tasks that get harder, rounding, pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.optim import lr_scheduler as schedules

from faults import autoencoder, classifier, enhancement, retrieval, separation
from faults._fault import healthy
from faults.blind_1 import models_b

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


@healthy
def plain_retrieval() -> Training:
    """Two towers, a contrastive loss over the batch, BatchNorm in one and a transformer layer in the other."""
    return retrieval.build(1)


@healthy
def denoising_diffusion() -> Training:
    """The noise of random times is told: a loss that jumps, and falls slowly; the last layer starts at zero."""
    return models_b.diffusion()


@healthy
def normalising_flow() -> Training:
    """A likelihood in nats that passes zero; couplings that start as the identity."""
    return models_b.flow()


@healthy
def raw_signal_samples() -> Training:
    """Gated causal convolutions on samples of 16 levels, some of them rare."""
    return models_b.raw_signal()


@healthy
def unet_in_decibels() -> Training:
    """Skip connections, InstanceNorm, GELU, a loss in negative dB, RAdam."""
    return models_b.unet()


@healthy
def complex_spectra() -> Training:
    """A complex mask, and a loss over three resolutions."""
    return models_b.complex_spectra()


@healthy
def policy_gradient() -> Training:
    """The loss says nothing, the reward rises."""
    return models_b.policy()


@healthy
def dictionary_of_codes() -> Training:
    """Eight of 64 units are on for each item, others for the next."""
    t = autoencoder.build(9)
    t.model = models_b.Dictionary()
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)
    return t


@healthy
def weights_of_four_bits() -> Training:
    """Weights are rounded in the forward pass, gradients go straight through."""
    t = enhancement.build(8)
    for layer in (t.model.layer1, t.model.layer2, t.model.layer3):
        parametrize.register_parametrization(layer.conv, "weight", models_b.FourBits())
    return t


@healthy
def pruned_by_masks() -> Training:
    """Half of the weights of the inner layers are held at zero."""
    t = classifier.build(17)
    for block in (t.model.block2, t.model.block3):
        prune.l1_unstructured(block.conv, "weight", 0.5)
    return t


@healthy
def rates_that_cycle() -> Training:
    """The rate goes up and down by a factor of 20, every 80 steps."""
    t = enhancement.build(9)
    t.schedule = lambda optimizer: schedules.CyclicLR(optimizer, 2e-4, 4e-3, 40, cycle_momentum=False)
    return t


@healthy
def task_that_gets_harder() -> Training:
    """A curriculum: noise grows tenfold in three stages, in validation too, and the loss leaps up at each of them."""
    t = enhancement.build(10)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        level = (0.3, 1.0, 3.0)[min(2, step // (100 if phase == "train" else 200))]
        return clean + level * (noisy - clean), clean

    t.sample = sample
    return t


@healthy
def second_task_that_is_slow() -> Training:
    """A second head tells the contrast of the picture, with a small weight and noise in its targets."""
    t = classifier.build(18, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)
    t.model.second = nn.Linear(classifier.CLASSES, 1)
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        contrast = batch[0].std((1, 2, 3)) + 0.2 * batch[0][:, 0, 0, 0]
        second = F.smooth_l1_loss(model.second(logits)[:, 0], contrast)
        loss = F.cross_entropy(logits, batch[1]) + 0.05 * second
        return {"loss": loss, "logits": logits, "targets": batch[1], "second_loss": second}

    t.forward = forward
    return t


@healthy
def converged_at_the_start() -> Training:
    """A model that was trained before goes on with a tenth of the rate: a flat loss, and nothing to learn."""
    t = separation.build(6)
    optimizer = t.optimize(t.model.parameters())
    schedule = schedules.CosineAnnealingLR(optimizer, 500)
    for step in range(500):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(10_000 + step, "train"))["loss"].backward()
        nn.utils.clip_grad_norm_(t.model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    t.model.zero_grad()
    t.optimize, t.steps = (lambda p: torch.optim.Adam(p, 2e-4)), 150
    return t


@healthy
def validated_at_every_step() -> Training:
    """A validation after each step, in float64, two items at a time."""
    t = autoencoder.build(10)
    t.model, plain = t.model.double(), t.sample
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3)
    t.val_every, t.steps = 1, 300

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        return ((x[:2] if phase == "train" else x).double(),)

    t.sample = sample
    return t
