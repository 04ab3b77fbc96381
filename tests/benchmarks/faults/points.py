"""A PointNet: seven kinds of solids as noisy clouds of points, their class and the part that each point lies on; Adam, steps of decay."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from faults._training import Batch, Tensors, Training, seeded

SHAPES = ("sphere", "cube", "cylinder", "cone", "torus", "mug", "table")
PARTS = ("round", "flat", "ring", "edge")
POINTS, STORED, ITEMS, BATCH, STEPS = 56, 160, 1400, 24, 180


def shared(inputs: int, outputs: int, norm, activation) -> nn.Sequential:
    """The same layer for each point."""
    return nn.Sequential(nn.Conv1d(inputs, outputs, 1), norm(outputs), activation())


def dense(inputs: int, outputs: int, norm, activation) -> nn.Sequential:
    """A layer for what is known of the whole cloud."""
    return nn.Sequential(nn.Linear(inputs, outputs), norm(outputs), activation())


class TNet(nn.Module):
    """A matrix out of a cloud that turns it into a pose of the network's choice."""

    def __init__(self, size: int, norm, activation) -> None:
        super().__init__()
        self.size = size
        self.points = nn.Sequential(shared(size, 24, norm, activation), shared(24, 48, norm, activation))
        self.cloud = dense(48, 24, norm, activation)
        self.matrix = nn.Linear(24, size * size)

    def forward(self, x):
        x = self.cloud(self.points(x).amax(2))
        return self.matrix(x).view(-1, self.size, self.size) + torch.eye(self.size)


class PointNet(nn.Module):
    """(batch, 3, points) to the classes of clouds, the parts of points, and the matrix of the first transform."""

    def __init__(self, norm=nn.BatchNorm1d, activation=nn.ReLU, dropout: float = 0.2) -> None:
        super().__init__()
        self.transform = TNet(3, norm, activation)
        self.local1 = shared(3, 32, norm, activation)
        self.local2 = shared(32, 32, norm, activation)
        self.deep1 = shared(32, 64, norm, activation)
        self.deep2 = shared(64, 96, norm, activation)
        self.classify = dense(96, 48, norm, activation)
        self.dropout = nn.Dropout(dropout)
        self.shape = nn.Linear(48, len(SHAPES))
        self.segment1 = shared(32 + 96, 64, norm, activation)
        self.segment2 = shared(64, 32, norm, activation)
        self.part = nn.Conv1d(32, len(PARTS), 1)

    def pooled(self, local):
        """What is most, over all points, in each channel."""
        return self.deep2(self.deep1(local)).amax(2)

    def forward(self, cloud):
        matrix = self.transform(cloud)
        local = self.local2(self.local1(matrix @ cloud))
        whole = self.pooled(local)
        shape = self.shape(self.dropout(self.classify(whole)))
        spread = whole[:, :, None].expand(-1, -1, cloud.shape[2])
        return shape, self.part(self.segment2(self.segment1(torch.cat([local, spread], 1)))), matrix


def solids(shape: torch.Tensor, made: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on the surface of each, (items, 3, stored), and their parts, (items, stored)."""
    u, v, w = torch.rand(3, len(shape), STORED, generator=made)
    angle, tube = 2 * math.pi * u, 2 * math.pi * v
    high = 2 * v - 1
    low = torch.sqrt(1 - high**2)
    ring = 0.7 + 0.25 * torch.cos(tube)
    cap, radius = w < 0.35, torch.sqrt(v)
    up, wide, legs = torch.where(w < 0.17, 1.0, -1.0), torch.where(cap, radius, 1.0), w < 0.4
    handle, arc = w > 0.75, math.pi * (u - 0.5)
    face, side = (6 * w).long() % 3, torch.where(w < 0.5, 1.0, -1.0)
    square = torch.stack([2 * u - 1, 2 * v - 1, side], 1)
    corner = torch.stack([torch.where(u < 0.5, 0.8, -0.8), torch.where(v < 0.5, 0.8, -0.8), 5 * w - 1.5], 1)
    x = torch.stack([
        torch.stack([low * angle.cos(), low * angle.sin(), high], 1),
        square.gather(1, torch.stack([(face + i) % 3 for i in range(3)], 1)) * 0.8,
        torch.stack([0.6 * wide * angle.cos(), 0.6 * wide * angle.sin(), torch.where(cap, up, high)], 1),
        torch.stack([radius * angle.cos(), radius * angle.sin(), torch.where(cap, -1.0, 1 - 2 * radius)], 1) * 0.8,
        torch.stack([ring * angle.cos(), ring * angle.sin(), 0.25 * torch.sin(tube)], 1),
        torch.stack([
            torch.where(handle, 0.5 + 0.5 * arc.cos(), 0.5 * angle.cos()),
            torch.where(handle, 0.1 * high, 0.5 * angle.sin()), torch.where(handle, 0.5 * arc.sin(), high),
        ], 1),
        torch.where(legs[:, None], corner, torch.stack([2 * u - 1, 2 * v - 1, torch.full_like(w, 0.6)], 1)),
    ])  # fmt: skip
    none = torch.zeros_like(face)
    parts = torch.stack([none, none + 1, cap.long(), cap.long(), none + 2, 2 * handle.long(), torch.where(legs, 3, 1)])
    return x[shape, torch.arange(len(shape))], parts[shape, torch.arange(len(shape))]


def rotations(n: int, made: torch.Generator) -> torch.Tensor:
    """Turned about the vertical axis."""
    angle = 2 * math.pi * torch.rand(n, generator=made)
    zero, one = torch.zeros(n), torch.ones(n)
    rows = [angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero, zero, zero, one]
    return torch.stack(rows, 1).view(n, 3, 3)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Into the unit sphere."""
    x = x - x.mean(2, keepdim=True)
    return x / x.norm(dim=1).amax(1)[:, None, None]


def clouds(n: int, seed: int) -> Batch:
    """A noisy scan of each solid, stretched and turned, the class, and the parts of its points."""
    made = seeded(171, seed)
    y = torch.randint(len(SHAPES), (n,), generator=made)
    x, parts = solids(y, made)
    x = rotations(n, made) @ (x * (0.7 + 0.6 * torch.rand(n, 3, 1, generator=made)))
    return normalised(x + 0.04 * torch.randn(x.shape, generator=made)), y, parts


def augmented(x: torch.Tensor, made: torch.Generator) -> torch.Tensor:
    """Turned and jittered."""
    return rotations(len(x), made) @ x + (0.02 * torch.randn(x.shape, generator=made)).clamp(-0.05, 0.05)


def orthogonality(matrix: torch.Tensor) -> torch.Tensor:
    return (matrix @ matrix.transpose(1, 2) - torch.eye(matrix.shape[1])).square().sum((1, 2)).mean()


def forward(model: nn.Module, batch: Batch) -> Tensors:
    x, y, parts = batch
    logits, points, matrix = model(x)
    shape_loss, part_loss = F.cross_entropy(logits, y), F.cross_entropy(points, parts)
    loss = shape_loss + part_loss + 0.01 * orthogonality(matrix)
    return {"loss": loss, "logits": logits, "targets": y, "points": points}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    found = tensors["points"].argmax(1)
    both = [((found == c) & (batch[2] == c), (found == c) | (batch[2] == c)) for c in range(len(PARTS))]
    iou = [float(a.sum() / b.sum()) for a, b in both if b.any()]
    accuracy = float((tensors["logits"].argmax(1) == batch[1]).float().mean())
    return {"shape_accuracy": accuracy, "part_iou": sum(iou) / len(iou)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": clouds(ITEMS, seed), "val": clouds(200, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        x, y, parts = data[phase]
        made = seeded(seed, step, len(phase))
        items = torch.randperm(len(x), generator=made)[:BATCH]
        points = torch.randperm(STORED, generator=made)[:POINTS]
        x, y, parts = x[items][:, :, points], y[items], parts[items][:, points]
        return (augmented(x, made) if phase == "train" else x), y, parts

    return Training(
        PointNet(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 2e-3),
        lambda optimizer: StepLR(optimizer, 45, 0.7), steps=STEPS, val_every=30,
    )  # fmt: skip
