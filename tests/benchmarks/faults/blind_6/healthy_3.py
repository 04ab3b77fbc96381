"""Runs with nothing wrong: diffusion models, upscalers, separators and enhancers as people train them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR

from faults import diffuser, enhancement, separation, upscaler
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation
from faults.diffuser import Denoiser, kept
from faults.separation import pit, shown

# -- diffuser --------------------------------------------------------------------------------------------------------


@healthy
def diffusion_with_zero_branches() -> Training:
    """The second convolution of each block and the last one begin at zero; Adam, a cosine after a warm-up, gradients clipped."""
    t = diffuser.build(31)
    for module in t.model.modules():
        if isinstance(module, diffuser.Residual):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    nn.init.zeros_(t.model.out.weight)
    nn.init.zeros_(t.model.out.bias)
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3)
    t.schedule = lambda o: OneCycleLR(o, 3e-3, t.steps, pct_start=0.2)
    return t


@healthy
def diffusion_of_velocities() -> Training:
    """The model predicts the velocity, a mixture of noise and picture, errors weighted by the level; validated with a running average of
    the weights. Source: Salimans and Ho 2022."""
    t = diffuser.build(32)
    average = copy.deepcopy(t.model)

    def follow(training: Training, step: int) -> None:
        for mean, now in zip(average.parameters(), training.model.parameters(), strict=True):
            mean.data.lerp_(now.data, 0.1 if step > 20 else 1.0)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        noisy, times, noise = batch
        share = kept(times)
        clean = (noisy - (1 - share).sqrt() * noise) / share.sqrt()
        velocity = model(noisy, times)
        error = (velocity - share.sqrt() * noise + (1 - share).sqrt() * clean).square()
        outputs = share.sqrt() * velocity + (1 - share).sqrt() * noisy
        return diffuser.result(outputs, batch, (error * (0.5 + share)).mean())

    def validate(training: Training, step: int, observer: Observer) -> None:
        plain = training.model
        training.model = average
        plain_validation(training, step, observer)
        training.model = plain

    t.after_step.append(follow)
    t.forward, t.validate = forward, validate
    return t


class Conditional(Denoiser):
    """Knows of each picture how bright it is, in four classes, or nothing, class 4."""

    def __init__(self) -> None:
        super().__init__(activation=nn.GELU)
        self.table = nn.Embedding(5, diffuser.EMBEDDING)
        self.plain, self.embed = self.embed, nn.Identity()

    def forward(self, noisy, times, label):
        return super().forward(noisy, self.plain(times) + self.table(label))


@healthy
def diffusion_guided_without_classifier() -> Training:
    """Classes by the area of the shape, left out in one case of seven, as guidance without a classifier wants it; gradients of two
    batches."""
    t = diffuser.build(33)
    t.model, plain = Conditional(), t.sample
    t.accumulate, t.steps = 2, 110

    def sample(step: int, phase: str) -> Batch:
        noisy, times, noise = plain(step, phase)
        clean = (noisy - (1 - kept(times)).sqrt() * noise) / kept(times).sqrt()
        label = torch.bucketize(clean.mean((1, 2, 3)), torch.tensor([-0.85, -0.75, -0.6]))
        if phase == "train":
            label[step % 7 :: 7] = 4
        return noisy, times, noise, label

    t.sample = sample
    t.forward = lambda model, batch: diffuser.result(model(batch[0], batch[1], batch[3]), batch)
    return t


@healthy
def diffusion_fine_tuned_by_its_norms() -> Training:
    """A model that was trained for 120 steps is tuned for brighter pictures: gains, shifts and biases only, the rest is frozen; SGD with
    momentum."""
    t = diffuser.build(34)
    optimizer = torch.optim.Adam(t.model.parameters(), 3e-3)
    for step in range(120):
        optimizer.zero_grad()
        t.forward(t.model, t.sample(step + 5000, "train"))["loss"].backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for name, parameter in t.model.named_parameters():
        parameter.requires_grad_("norm" in name or name.endswith("bias"))
    plain, t.steps, t.val_every = t.sample, 120, 20

    def sample(step: int, phase: str) -> Batch:
        noisy, times, noise = plain(step if phase == "train" else step % 2, phase)
        return noisy + kept(times).sqrt(), times, noise

    t.sample = sample
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)
    return t


# -- upscaler --------------------------------------------------------------------------------------------------------


@healthy
def upscaler_with_a_skip() -> Training:
    """The network adds to an enlargement by the nearest pixel, its last layer begins small; GELU, the Charbonnier loss, AdamW, a
    cosine."""
    t = upscaler.build(31, activation=nn.GELU)
    t.model.tail.weight.data.mul_(0.1)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        rough = F.interpolate(batch[0], scale_factor=upscaler.SCALE)
        outputs = rough + model(batch[0]) - model.restore.shift
        return upscaler.result(outputs, batch, ((outputs - batch[1]).square() + 1e-6).sqrt().mean())

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        rough = F.interpolate(batch[0], scale_factor=upscaler.SCALE)
        score = upscaler.psnr(tensors["outputs"], batch[1])
        return {"psnr_db": score, "gain_over_nearest_db": score - upscaler.psnr(rough, batch[1])}

    t.forward, t.measure = forward, measure
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=1e-4, betas=(0.9, 0.99))
    t.schedule = lambda o: CosineAnnealingLR(o, t.steps)
    return t


@healthy
def small_upscaler_taught_by_a_large_one() -> Training:
    """A network of two blocks learns from the pictures and from one of six that was trained before; PReLU, in bfloat16."""
    t = upscaler.build(33, activation=nn.PReLU, blocks=2)
    teacher = upscaler.Upscaler(blocks=6)
    optimizer = torch.optim.Adam(teacher.parameters(), 2e-3)
    for step in range(150):
        batch = t.sample(step + 3000, "train")
        optimizer.zero_grad()
        F.l1_loss(teacher(batch[0]), batch[1]).backward()
        optimizer.step()
    teacher.requires_grad_(False)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0]).float()
        taught = F.l1_loss(outputs, teacher(batch[0]).float())
        return upscaler.result(outputs, batch, F.l1_loss(outputs, batch[1]) + 0.5 * taught)

    t.forward, t.precision = forward, torch.bfloat16
    return t


@healthy
def upscaler_with_weight_norm() -> Training:
    """Weight normalisation in the blocks, as in WDSR; RAdam."""
    t = upscaler.build(34)
    for block in t.model.body:
        for name in ("conv1", "conv2"):
            setattr(block, name, nn.utils.parametrizations.weight_norm(getattr(block, name)))
    t.optimize = lambda p: torch.optim.RAdam(p, 4e-3)
    return t


# -- separation and enhancement --------------------------------------------------------------------------------------


@healthy
def separator_with_levels() -> Training:
    """SI-SDR and a small term for the level of the estimates; AdamW, the rate halved at 150 and 225."""
    t = separation.build(35)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        mixture, references = batch
        estimates = model(mixture)
        level = (estimates.std(-1).log() - references.std(-1).mean(1, keepdim=True).log()).abs().mean()
        return shown(pit(estimates, references) + 0.5 * level, estimates, batch)

    t.forward = forward
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=1e-3)
    t.schedule = lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [150, 225], 0.5)
    return t


@healthy
def enhancer_with_a_gru() -> Training:
    """A GRU over past frames in place of the third layer, dropout of a tenth, gradients clipped to 1; NAdam."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(enhancement.WIDTH, enhancement.WIDTH, batch_first=True)
            self.dropout = nn.Dropout(0.1)

        def forward(self, x):
            return self.dropout(self.gru(x.transpose(1, 2))[0]).transpose(1, 2)

    t = enhancement.build(36, activation=nn.SiLU)
    t.model.layer3 = Recurrent()
    t.optimize = lambda p: torch.optim.NAdam(p, 2e-3)
    t.clip = 1.0
    return t
