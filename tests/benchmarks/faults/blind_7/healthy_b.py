"""Runs with nothing wrong: networks of point clouds as people train them, an image classifier and a speech enhancer."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import classifier, enhancement, points
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded


@healthy
def plain_points() -> Training:
    """PointNet with its transform of the input, BatchNorm, a decay in steps. Qi et al. 2017, arXiv:1612.00593."""
    return points.build(1)


@healthy
def points_of_one_cycle() -> Training:
    """GroupNorm and GELU, AdamW with one cycle, labels smoothed by 0.1, parts weighed by the root of their rarity, bfloat16, gradients
    clipped to 5."""
    t = points.build(2, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.GELU)
    t.precision, t.clip = torch.bfloat16, 5.0
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 4e-3, total_steps=points.STEPS + 1)
    weight = torch.tensor([0.8, 0.8, 1.1, 1.5])

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, found, matrix = model(batch[0])
        shape_loss = F.cross_entropy(logits, batch[1], label_smoothing=0.1)
        loss = shape_loss + F.cross_entropy(found, batch[2], weight) + 0.01 * points.orthogonality(matrix.float())
        return {"loss": loss, "logits": logits, "targets": batch[1], "points": found}

    t.forward = forward
    return t


@healthy
def points_averaged_over_steps() -> Training:
    """SGD with Nesterov's momentum and a cosine, two batches a step, points left out at random in training, and a moving average of the
    weights that is validated."""
    t = points.build(3, activation=nn.SiLU)
    t.accumulate, plain = 2, t.sample
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, points.STEPS)
    average = copy.deepcopy(t.model)

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = plain(step, phase)
        if phase == "train":
            chosen = torch.randperm(points.POINTS, generator=seeded(31, step))[: points.POINTS - 8]
            x, parts = x[:, :, chosen], parts[:, chosen]
        return x, y, parts

    def after(training: Training, step: int) -> None:
        decay = min(0.95, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
                if mean.is_floating_point():
                    mean.lerp_(now, 1 - decay)

    def validate(training: Training, step: int, observer: Observer) -> None:
        trained, training.model = training.model, average
        plain_validation(training, step, observer)
        training.model = trained

    t.sample, t.validate = sample, validate
    t.after_step.append(after)
    return t


class Residual(nn.Module):
    """Two convolutions around a shortcut, the last norm's gain at a small value at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.norm2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        nn.init.constant_(self.norm2.weight, 0.2)

    def forward(self, x):
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


@healthy
def pictures_with_shortcuts() -> Training:
    """Residual blocks with small gains at first, global pooling, mixed pairs of pictures, RMSprop with warm-up and a cosine, groups
    with and without decay."""
    t = classifier.build(4)
    t.model.block2.add_module("residual", Residual(16))
    t.model.block3.add_module("residual", Residual(16))
    kept = [p for p in t.model.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in t.model.parameters() if p.ndim > 1], "weight_decay": 1e-3}, {"params": kept}]
    t.optimize = lambda p: torch.optim.RMSprop(groups, 2e-3, alpha=0.95)
    t.schedule = lambda optimizer: LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.51 + 0.49 * math.cos(math.pi * step / 300))
    )

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        x, y = batch
        share = 0.8 if model.training else 1.0
        logits = model(share * x + (1 - share) * x.flip(0))
        loss = share * F.cross_entropy(logits, y) + (1 - share) * F.cross_entropy(logits, y.flip(0))
        return {"loss": loss, "logits": logits, "targets": y}

    t.forward = forward
    return t


class Recurrent(nn.Module):
    """A recurrent enhancer: a linear layer, a GRU over frames, masks."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(enhancement.BINS, 40), nn.LayerNorm(40), nn.PReLU())
        self.recurrent = nn.GRU(40, 40, batch_first=True)
        self.mask = nn.Linear(80, enhancement.BINS)

    def forward(self, noisy):
        x = self.enter(torch.log1p(noisy).transpose(1, 2))
        x = torch.cat([x, self.recurrent(x)[0]], 2)
        return self.mask(x).sigmoid().transpose(1, 2) * noisy


@healthy
def recurrent_enhancer_with_gains() -> Training:
    """A GRU, levels varied by 6 dB up and down in training, RAdam, a mean of two losses, gradients clipped to 1."""
    t = enhancement.build(5)
    t.model, t.clip, plain = Recurrent(), 1.0, t.sample
    t.optimize = lambda p: torch.optim.RAdam(p, 4e-3)

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        gain = (
            10 ** ((12 * torch.rand(len(noisy), 1, 1, generator=seeded(32, step)) - 6) / 20)
            if phase == "train"
            else 1.0
        )
        return noisy * gain, clean * gain

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = 0.5 * enhancement.compressed(outputs, batch[1]) + 0.05 * F.l1_loss(outputs, batch[1])
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    return t
