"""A small U-Net that marks the pixels of rare, small spots on noisy scans: cross entropy and Dice, BatchNorm, Adam."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SIDE, ITEMS, BATCH = 24, 600, 8


class UNet(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU, width: int = 8) -> None:
        super().__init__()
        self.down1 = block(1, width, norm, activation)
        self.down2 = block(width, 2 * width, norm, activation)
        self.bottom = block(2 * width, 4 * width, norm, activation)
        self.lift2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = block(4 * width, 2 * width, norm, activation)
        self.lift1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1 = block(2 * width, width, norm, activation)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.bottom(F.max_pool2d(coarse, 2))
        x = self.up2(torch.cat([self.lift2(x), coarse], 1))
        x = self.up1(torch.cat([self.lift1(x), fine], 1))
        return self.head(x)


def block(inputs: int, outputs: int, norm, activation) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm(outputs), activation=activation()))


def scans(n: int, seed: int, spots: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Scans from about 0 to 1 with round spots, which are marked, and bright lines, which are not."""
    made = seeded(31, seed)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    cloud = F.avg_pool2d(torch.randn(n, 1, SIDE + 8, SIDE + 8, generator=made), 9, 1)
    x, y = 0.3 + 0.5 * cloud[:, 0], torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    place, radius = torch.rand(n, spots, 2, generator=made), 1.2 + 1.3 * torch.rand(n, spots, generator=made)
    for i in range(spots):
        centre = (3 + (SIDE - 6) * place[:, i, :, None, None]).unbind(1)
        y[(rows - centre[0]).square() + (columns - centre[1]).square() < radius[:, i, None, None].square()] = 1
    lines = torch.randint(SIDE, (n, 2), generator=made)
    line = (rows == lines[:, :1, None]) | (columns == lines[:, 1:, None])
    x = x + 0.35 * (y + line).clamp(max=1) + 0.12 * torch.randn(n, SIDE, SIDE, generator=made)
    return x[:, None], y


def standardised(x: torch.Tensor) -> torch.Tensor:
    """By the mean and the deviation of all scans."""
    return (x - 0.35) / 0.2


def dice(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Soft overlap with the marked pixels of each scan, from 0 to 1."""
    share = logits.softmax(1)[:, 1]
    both = (share * y).sum((1, 2))
    return (2 * both + 1) / (share.sum((1, 2)) + y.sum((1, 2)) + 1)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y) + 1 - dice(logits, y).mean(), "logits": logits, "targets": y}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    marked, y = tensors["logits"].argmax(1), batch[1]
    both = float((marked * y).sum())
    return {"dice": 2 * both / max(float(marked.sum() + y.sum()), 1.0), "recall": both / max(float(y.sum()), 1.0)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": scans(ITEMS, seed), "val": scans(100, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (BATCH,), generator=seeded(seed, step, len(phase)))
        return standardised(x[chosen]), y[chosen]

    return Training(UNet(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 3e-3), steps=250)
