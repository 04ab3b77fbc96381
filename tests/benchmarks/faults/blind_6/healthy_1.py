"""Runs with nothing wrong, of what people train with transformers on patches, with detectors and with plain networks."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, MultiStepLR, OneCycleLR

from faults import autoencoder, classifier, detector, patches
from faults._fault import healthy
from faults._training import Batch, Observer, Tensors, Training, plain_validation, seeded

# -- patches ---------------------------------------------------------------------------------------------------------


@healthy
def plain_patches() -> Training:
    """A small vision transformer, AdamW, warm-up and cosine, gradients clipped to 1."""
    return patches.build(1)


class Pooled(patches.VisionTransformer):
    """The mean of all patches, without the class token's answer; branches begin small (LayerScale)."""

    def __init__(self) -> None:
        super().__init__(dropout=0.1)
        self.scales = nn.ParameterList(
            nn.Parameter(torch.full((patches.WIDTH,), 0.1)) for _ in range(2 * patches.DEPTH)
        )

    def forward(self, x):
        x = self.dropout(self.patches(x) + self.positions[:, 1:] + self.token)
        for i, block in enumerate(self.blocks):
            x = x + self.scales[2 * i] * block.attention(block.norm1(x))
            x = x + self.scales[2 * i + 1] * block.mlp(block.norm2(x))
        return self.head(self.norm(x).mean(1))


@healthy
def pooled_with_layer_scale() -> Training:
    """Mean pooling, LayerScale, smoothed labels, mixed pictures, groups with and without decay, bfloat16. Touvron et al. 2021,
    arXiv:2103.17239."""
    t = patches.build(2)
    t.model, t.precision, plain = Pooled(), torch.bfloat16, t.sample
    kept = [p for p in t.model.parameters() if p.ndim < 2]
    groups = [{"params": [p for p in t.model.parameters() if p.ndim > 1]}, {"params": kept, "weight_decay": 0.0}]
    t.optimize = lambda p: torch.optim.AdamW(groups, 4e-3, weight_decay=0.05)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        wanted = F.one_hot(y, patches.CLASSES).float()
        if phase == "train":
            share = 0.8 + 0.2 * float(torch.rand(1, generator=seeded(5, step)))
            x, wanted = share * x + (1 - share) * x.flip(0), share * wanted + (1 - share) * wanted.flip(0)
        return x, wanted

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0]).float()
        return {"loss": F.cross_entropy(logits, batch[1], label_smoothing=0.05), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: patches.measure(tensors, (batch[0], batch[1].argmax(1)))
    return t


@healthy
def taught_by_a_deeper_one() -> Training:
    """A single block, with RMSNorm and SiLU, learns from the soft answers of a trained transformer of three and from the labels. Hinton et
    al. 2015, arXiv:1503.02531."""
    teacher, t = patches.build(3), patches.build(3, norm=nn.RMSNorm, activation=nn.SiLU, depth=1)
    optimizer = torch.optim.AdamW(teacher.model.parameters(), 2e-3)
    for step in range(200):
        optimizer.zero_grad()
        teacher.forward(teacher.model, teacher.sample(step, "train"))["loss"].backward()
        optimizer.step()
    teacher.model.requires_grad_(requires_grad=False).eval()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, soft = model(batch[0]), (teacher.model(batch[0]) / 2).softmax(1)
        follow = F.kl_div((logits / 2).log_softmax(1), soft, reduction="batchmean")
        loss = 0.5 * F.cross_entropy(logits, batch[1]) + 2 * follow
        return {"loss": loss, "logits": logits, "targets": batch[1]}

    t.forward = forward
    return t


class LoRA(nn.Module):
    """A frozen layer and a product of two thin matrices, the second of which begins at zero."""

    def __init__(self, layer: nn.Linear, rank: int = 4) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(requires_grad=False)
        self.down = nn.Linear(layer.in_features, rank, bias=False)
        self.up = nn.Linear(rank, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + 2 * self.up(self.down(x))


@healthy
def adapted_to_other_classes() -> Training:
    """A trained transformer is frozen; thin matrices in its attention and a new head learn pairs of its classes in other colours."""
    t = patches.build(4)
    plain, optimizer = t.sample, torch.optim.AdamW(t.model.parameters(), 3e-3)
    for step in range(150):
        optimizer.zero_grad()
        t.forward(t.model, plain(90_000 + step, "train"))["loss"].backward()
        optimizer.step()
    t.model.zero_grad()
    t.model.requires_grad_(requires_grad=False)
    for block in t.model.blocks:
        block.attention.qkv, block.attention.project = LoRA(block.attention.qkv), LoRA(block.attention.project)
    t.model.head = nn.Linear(patches.WIDTH, 3)

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x.roll(1, 1), y % 3

    t.sample, t.steps = sample, 150
    t.optimize = lambda p: torch.optim.AdamW(p, 5e-3, weight_decay=0.0)
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 150)
    return t


# -- detectors -------------------------------------------------------------------------------------------------------


@healthy
def plain_detector() -> Training:
    """A grid of objectness, kinds and boxes, BatchNorm, SGD with momentum."""
    return detector.build(1)


@healthy
def focal_and_overlap() -> Training:
    """A focal loss for cells, one minus the overlap for boxes, GroupNorm, SiLU, AdamW, warm-up and cosine. Lin et al. 2017,
    arXiv:1708.02002; Rezatofighi et al. 2019, arXiv:1902.09630."""
    t = detector.build(2, norm=lambda channels: nn.GroupNorm(4, channels), activation=nn.SiLU)
    t.optimize = lambda p: torch.optim.AdamW(p, 4e-3, weight_decay=0.01)
    t.schedule = lambda optimizer: LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.51 + 0.49 * math.cos(math.pi * step / 200))
    )

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = detector.forward(model, batch)
        has, _, box = detector.assigned(batch[1])
        score, some = tensors["scores"], has > 0
        miss = torch.where(some, 1 - score.sigmoid(), score.sigmoid())
        each = F.binary_cross_entropy_with_logits(score, has, reduction="none")
        found = (torch.where(some, 0.25, 0.75) * miss.square() * each).sum() / has.sum()
        lies = detector.overlap(detector.corners(tensors["boxes"])[some], detector.corners(box)[some])
        placed = 1 - lies.mean()
        loss = 4 * found + tensors["class_loss"] + 2 * placed
        return {**tensors, "loss": loss, "objectness_loss": found, "box_loss": placed}

    t.forward = forward
    return t


@healthy
def averaged_and_mirrored() -> Training:
    """Pictures mirrored with their boxes, two batches to a step, milestones, and the validation of a running average of the weights, as
    YOLO trains."""
    t = detector.build(3, activation=nn.SiLU)
    t.accumulate, t.steps, plain = 2, 150, t.sample
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, momentum=0.9, nesterov=True, weight_decay=5e-4)
    t.schedule = lambda optimizer: MultiStepLR(optimizer, [100, 130], 0.2)
    average = copy.deepcopy(t.model)

    def sample(step: int, phase: str) -> Batch:
        x, things = plain(step, phase)
        if phase == "train" and step % 3 == 0:
            x = x.flip(3)
            things[..., 1] = detector.SIDE - things[..., 1]
        return x, things

    def follow(training: Training, step: int) -> None:
        with torch.no_grad():
            for mean, now in zip(average.state_dict().values(), training.model.state_dict().values(), strict=True):
                mean.lerp_(now, 0.1) if mean.is_floating_point() else mean.copy_(now)

    def validate(training: Training, step: int, observer: Observer) -> None:
        own = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(average.state_dict())
        plain_validation(training, step, observer)
        training.model.load_state_dict(own)

    t.sample, t.validate = sample, validate
    t.after_step.append(follow)
    return t


@healthy
def backbone_of_another_task() -> Training:
    """The backbone comes from a trained detector, has a tenth of the rate of the new heads, and its stem stays frozen."""
    t, first = detector.build(4), detector.build(5)
    optimizer = torch.optim.SGD(first.model.parameters(), 0.01, momentum=0.9)
    for step in range(80):
        optimizer.zero_grad()
        first.forward(first.model, first.sample(step, "train"))["loss"].backward()
        optimizer.step()
    t.model.backbone.load_state_dict(first.model.backbone.state_dict())
    t.model.backbone.stem.requires_grad_(requires_grad=False)

    def optimize(parameters):
        slow = {id(p) for p in t.model.backbone.parameters()}
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if id(p) in slow], "lr": 1e-3},
            {"params": [p for p in parameters if id(p) not in slow]},
        ]
        return torch.optim.SGD(groups, 0.01, momentum=0.9, weight_decay=1e-4)

    t.optimize, t.steps = optimize, 150
    return t


# -- plain networks --------------------------------------------------------------------------------------------------


@healthy
def one_cycle_with_weighted_classes() -> Training:
    """One cycle of rate and momentum, weights of classes in the loss, dropout; one class is a third as frequent as the others."""
    t = classifier.build(91, dropout=0.2)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0])

    def sample(step: int, phase: str) -> Batch:
        made = seeded(9, step, len(phase))
        y = torch.multinomial(torch.tensor([3.0, 3, 3, 3, 1]), 32, replacement=True, generator=made)
        return classifier.pictures(32, 7 * step + len(phase), y)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": F.cross_entropy(logits, batch[1], weights), "logits": logits, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=5e-4)
    t.schedule = lambda optimizer: OneCycleLR(optimizer, 0.05, total_steps=301)
    return t


@healthy
def noise_taken_from_rows() -> Training:
    """A denoising autoencoder with ELU and LayerNorm: noise and gaps in training, a robust error, RAdam, clean rows in validation."""
    t = autoencoder.build(92, activation=nn.ELU, norm=nn.LayerNorm)
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, made = plain(step, phase)[0], seeded(10, step)
        noisy = (x + 0.2 * torch.randn(x.shape, generator=made)) * (torch.rand(x.shape, generator=made) > 0.1)
        return (noisy if phase == "train" else x), x

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.smooth_l1_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: autoencoder.measure(tensors, (batch[1],))
    t.optimize = lambda p: torch.optim.RAdam(p, 4e-3)
    return t
