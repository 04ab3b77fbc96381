"""A one-stage detector of discs, squares and crosses: a grid of objectness, classes and boxes, BatchNorm, SGD with momentum."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

KINDS, SIDE, STRIDE, ITEMS, BATCH = 3, 32, 4, 800, 16
GRID, ANCHOR = SIDE // STRIDE, 8.0  # cells along a side; the side of the box that a head of zeros tells


class Backbone(nn.Module):
    """Three convolutions with norms, the pictures' size divided by four, and a residual block."""

    def __init__(self, width: int, norm, activation) -> None:
        super().__init__()
        self.stem = block(3, width, 2, norm, activation)
        self.stage1 = block(width, 2 * width, 2, norm, activation)
        self.stage2 = block(2 * width, 2 * width, 1, norm, activation)

    def forward(self, x):
        x = self.stage1(self.stem(x))
        return x + self.stage2(x)


class Detector(nn.Module):
    """Three maps: one logit of an object in a cell, logits of its kind, and its box as offset in the cell and logarithm of sides."""

    def __init__(self, norm=nn.BatchNorm2d, activation=nn.LeakyReLU, width: int = 12) -> None:
        super().__init__()
        self.backbone = Backbone(width, norm, activation)
        self.neck = block(2 * width, 2 * width, 1, norm, activation)
        self.objectness = nn.Conv2d(2 * width, 1, 1)
        self.classes = nn.Conv2d(2 * width, KINDS, 1)
        self.boxes = nn.Conv2d(2 * width, 4, 1)
        nn.init.constant_(self.objectness.bias, -3.0)  # about one cell in thirty holds an object

    def forward(self, x):
        features = self.neck(self.backbone(x))
        return self.objectness(features)[:, 0], self.classes(features), self.boxes(features)


def block(inputs: int, outputs: int, stride: int, norm, activation) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm(outputs), activation=activation()))


def scenes(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures of one to three things, and (n, 3, 5): kind (-1: none), centre and sides of each, in pixels."""
    made = seeded(97, seed)
    rows, columns = torch.arange(SIDE)[:, None] + 0.5, torch.arange(SIDE) + 0.5
    x, things = 0.6 * torch.randn(n, 3, SIDE, SIDE, generator=made), torch.zeros(n, 3, 5)
    quarters = torch.rand(n, 4, generator=made).argsort(1)[:, :3]  # things do not touch: each has a quarter of its own
    kinds = torch.randint(KINDS, (n, 3), generator=made)
    kinds[torch.arange(3) >= torch.randint(1, 4, (n, 1), generator=made)] = -1
    sides = 5 + 6 * torch.rand(n, 3, generator=made)
    half = SIDE / 2
    offsets = sides[..., None] / 2 + (half - sides[..., None]) * torch.rand(n, 3, 2, generator=made)
    centres = offsets + half * torch.stack([quarters % 2, quarters // 2], -1)
    colours = 1.2 + 0.6 * torch.rand(n, 3, 3, generator=made)
    for i in range(3):
        across, down = (columns - centres[:, i, :1, None]).abs(), (rows - centres[:, i, 1:, None]).abs()
        reach = sides[:, i, None, None] / 2
        disc, square = across.square() + down.square() < reach.square(), torch.maximum(across, down) < reach
        cross = square & (torch.minimum(across, down) < reach / 3)
        shape = torch.stack([disc, square, cross], 1)[torch.arange(n), kinds[:, i]] & (kinds[:, i] >= 0)[:, None, None]
        x += shape[:, None] * colours[:, i, :, None, None]
    things[..., 0], things[..., 1:3], things[..., 3:] = kinds, centres, sides[..., None]
    return (x - 0.25) / 0.8, things


def assigned(things: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each cell: whether the centre of a thing is in it, which kind, and the four numbers of the box."""
    n = len(things)
    has, kind, box = (
        torch.zeros(n, GRID, GRID),
        torch.zeros(n, GRID, GRID, dtype=torch.long),
        torch.zeros(n, 4, GRID, GRID),
    )
    item, i = (things[..., 0] >= 0).nonzero().unbind(1)
    thing = things[item, i]
    column, row = (thing[:, 1:3] / STRIDE).long().clamp(0, GRID - 1).unbind(1)
    has[item, row, column], kind[item, row, column] = 1.0, thing[:, 0].long()
    offset = thing[:, 1:3] / STRIDE - torch.stack([column, row], 1) - 0.5
    box[item, :, row, column] = torch.cat([offset, (thing[:, 3:] / ANCHOR).log()], 1)
    return has, kind, box


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """The four numbers of each cell as left, top, right and bottom in pixels: (n, 4, grid, grid) to (n, grid, grid, 4)."""
    cells = torch.arange(GRID) + 0.5
    x, y = STRIDE * (boxes[:, 0] + cells), STRIDE * (boxes[:, 1] + cells[:, None])
    wide, high = (ANCHOR / 2 * boxes[:, 2:].clamp(max=3).exp()).unbind(1)
    return torch.stack([x - wide, y - high, x + wide, y + high], -1)


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over union of pairs of boxes."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    both, areas = sides.prod(-1), [(x[..., 2:] - x[..., :2]).clamp(min=0).prod(-1) for x in (a, b)]
    return both / (areas[0] + areas[1] - both).clamp(min=1e-6)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    score, logits, boxes = model(batch[0])
    has, kind, box = assigned(batch[1])
    some = has > 0
    count = has.sum().clamp(min=1)
    found = F.binary_cross_entropy_with_logits(score, has, reduction="sum") / count
    named = F.cross_entropy(logits.movedim(1, -1)[some], kind[some], reduction="sum") / count
    placed = F.smooth_l1_loss(boxes.movedim(1, -1)[some], box.movedim(1, -1)[some], reduction="sum") / count
    tensors = {"objectness_loss": found, "class_loss": named, "box_loss": placed, "scores": score, "boxes": boxes}
    return {"loss": found + named + 2 * placed, "logits": logits.movedim(1, -1)[some], "targets": kind[some], **tensors}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Of cells with a score above a half: how many are right, how many things they find; and how well boxes lie."""
    has, _, box = assigned(batch[1])
    told, some = tensors["scores"] > 0, has > 0
    lies = overlap(corners(tensors["boxes"]), corners(box))
    hit = float((told & some & (lies > 0.5)).sum())
    named = float((tensors["logits"].argmax(-1) == tensors["targets"]).float().mean())
    precision, recall = hit / max(float(told.sum()), 1.0), hit / float(some.sum())
    return {"precision": precision, "recall": recall, "iou": float(lies[some].mean()), "accuracy": named}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": scenes(ITEMS, seed), "val": scenes(160, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        x, things = data[phase]
        chosen = torch.randperm(len(x), generator=seeded(seed, step, len(phase)))[:BATCH]
        return x[chosen], things[chosen]

    optimize = lambda p: torch.optim.SGD(p, 0.01, momentum=0.9, weight_decay=1e-4)  # noqa: E731 - one line beside its program
    return Training(Detector(**options), sample, forward, measure, optimize, steps=200, clip=10.0)
