"""Runs with nothing wrong, of electrocardiograms, detectors and forecasters, each seen to get better by a metric of its own."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

from faults import detector, ecg, forecaster
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

if TYPE_CHECKING:
    from torch.nn import Module

# -- electrocardiograms ----------------------------------------------------------------------------------------------


@healthy
def ecg_plain() -> Training:
    """A residual network with gates, BatchNorm, Adam."""
    return ecg.build(1)


@healthy
def ecg_one_cycle_with_smoothed_findings() -> Training:
    """GroupNorm, SiLU, one cycle of AdamW without decay of norms and biases, and findings smoothed by a twentieth, as on PTB-XL. Strodthoff
    et al. 2020, arXiv:2004.13701."""
    t = ecg.build(2, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)

    def optimize(parameters):
        parameters = list(parameters)
        groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.01}]
        groups.append({"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0})
        return torch.optim.AdamW(groups, 3e-3)

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits, 0.95 * batch[1] + 0.025)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.optimize, t.forward = optimize, forward
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 6e-3, total_steps=180)
    return t


@healthy
def ecg_mixed_records_with_nesterov() -> Training:
    """Records and findings mixed in pairs, leads left out at random, weights of positives, SGD with Nesterov's momentum, warm-up and
    cosine. Zhang et al. 2018, arXiv:1710.09412."""
    t = ecg.build(3, dropout=0.0)
    plain, weight = t.sample, torch.full((len(ecg.FINDINGS),), 1.5)

    def sample(step: int, phase: str) -> Batch:
        x, told = plain(step, phase)
        if phase == "val":
            return x, told
        made = seeded(71, step)
        share = torch.rand(len(x), 1, generator=made) ** 6
        other = torch.randperm(len(x), generator=made)
        kept = (torch.rand(len(x), ecg.LEADS, 1, generator=made) > 0.05).float()
        mixed = (1 - share[..., None]) * x + share[..., None] * x[other]
        return mixed * kept, (1 - share) * told + share * told[other]

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        loss = F.binary_cross_entropy_with_logits(logits, batch[1], pos_weight=weight)
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
    t.schedule = lambda optimizer: LambdaLR(
        optimizer, lambda step: min((step + 1) / 15, 0.505 + 0.495 * math.cos(math.pi * step / 180))
    )
    return t


@healthy
def ecg_tuned_for_another_hospital() -> Training:
    """The blocks come from a network that was trained elsewhere and have a fifth of the rate of the new head; the stem stays frozen and in
    eval mode, in no optimizer."""
    t, first = ecg.build(4), ecg.build(5)
    optimizer = torch.optim.Adam(first.model.parameters(), 2e-3)
    for step in range(80):
        optimizer.zero_grad()
        first.forward(first.model, first.sample(step, "train"))["loss"].backward()
        optimizer.step()
    t.model.stem.load_state_dict(first.model.stem.state_dict())
    t.model.blocks.load_state_dict(first.model.blocks.state_dict())
    t.model.stem.requires_grad_(requires_grad=False)
    t.model.stem.train = lambda mode=True: t.model.stem
    t.model.stem.norm.eval()
    groups = [{"params": t.model.blocks.parameters(), "lr": 5e-4}, {"params": t.model.head.parameters()}]
    t.optimizers, t.steps = [torch.optim.AdamW(groups, 2.5e-3, weight_decay=1e-4)], 150
    return t


@healthy
def ecg_averaged_in_half_precision() -> Training:
    """bfloat16 by autocast, two batches to a step, a focal loss, and the validation of a running average of the weights. Lin et al. 2017,
    arXiv:1708.02002."""
    t = ecg.build(6, dropout=0.0)
    t.precision, t.accumulate, t.steps = torch.bfloat16, 2, 90
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3)
    average = copy.deepcopy(t.model)

    def forward(model: Module, batch: Batch) -> Tensors:
        logits = model(batch[0]).float()
        miss = (batch[1] - logits.sigmoid()).abs()
        each = F.binary_cross_entropy_with_logits(logits, batch[1], reduction="none")
        return {"loss": (2 * miss.square() * each).mean(), "logits": logits, "targets": batch[1]}

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
                mean.lerp_(now, 0.15) if mean.is_floating_point() else mean.copy_(now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        own = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(average.state_dict())
        plain_validation(training, step, observer)
        training.model.load_state_dict(own)

    t.forward, t.validate, t.val_every = forward, validate, 15
    t.after_step.append(follow)
    return t


# -- detectors and forecasters ---------------------------------------------------------------------------------------


@healthy
def detector_of_expected_overlap() -> Training:
    """Mish, InstanceNorm with weights, RMSprop with momentum and a cosine, objectness weighed by the overlap that a box reaches."""
    t = detector.build(7, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True), activation=nn.Mish)
    t.optimize = lambda p: torch.optim.RMSprop(p, 1e-3, alpha=0.95, momentum=0.5)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 200)

    def forward(model: Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        reached = detector.overlap(detector.corners(tensors["boxes"].detach()), detector.corners(box))
        wanted = has * (0.5 + 0.5 * reached)
        found = F.binary_cross_entropy_with_logits(tensors["scores"], wanted, reduction="sum") / has.sum()
        return {
            **tensors,
            "loss": found + tensors["class_loss"] + 2 * tensors["box_loss"],
            "objectness_loss": found,
        }

    t.forward = forward
    return t


class Quantiles(nn.Module):
    """A GRU whose last state is normalised; three quantiles of each hour."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.project = nn.Linear(forecaster.FEATURES, width)
        self.activation = nn.GELU()
        self.gru = nn.GRU(width, width, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(0.05)
        self.head = nn.Linear(width, 3 * forecaster.HORIZON)

    def forward(self, x):
        states, _ = self.gru(self.activation(self.project(x)))
        return self.head(self.dropout(self.norm(states[:, -1]))).unflatten(1, (3, forecaster.HORIZON))


@healthy
def forecaster_of_quantiles() -> Training:
    """A GRU, dropout, the pinball loss of three quantiles, NAdam with a cosine. Koenker and Bassett
    1978."""
    t = forecaster.build(8)
    t.model, quantiles = Quantiles(), torch.tensor([0.1, 0.5, 0.9])[:, None]
    t.optimize = lambda p: torch.optim.NAdam(p, 1e-2)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 300)

    def forward(model: Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        error = batch[1][:, None] - outputs
        loss = torch.maximum(quantiles * error, (quantiles - 1) * error).mean()
        return {"loss": loss, "outputs": outputs[:, 1], "targets": batch[1]}

    t.forward = forward
    return t
