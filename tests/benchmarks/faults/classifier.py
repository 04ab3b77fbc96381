"""An image classifier with BatchNorm: five classes of shifted patterns in noise, SGD with momentum."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

CLASSES, SIDE, ITEMS, BATCH = 5, 10, 4000, 32


class Classifier(nn.Module):
    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU, dropout: float = 0.0) -> None:
        super().__init__()
        self.block1 = block(1, 8, 1, norm, activation)
        self.block2 = block(8, 16, 2, norm, activation)
        self.block3 = block(16, 16, 2, norm, activation)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(16 * 9, CLASSES)

    def forward(self, x):
        return self.head(self.dropout(self.block3(self.block2(self.block1(x))).flatten(1)))


def block(inputs: int, outputs: int, stride: int, norm, activation) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
    return nn.Sequential(OrderedDict(conv=conv, norm=norm(outputs), activation=activation()))


def pictures(n: int, seed: int, classes: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Patterns, one a class, shifted at random and in noise of the same level."""
    made = seeded(7)
    patterns = F.avg_pool2d(torch.randn(CLASSES, 1, SIDE, SIDE, generator=made), 3, 1, 1) * 1.8
    made = seeded(8, seed)
    y = torch.randint(CLASSES, (n,), generator=made) if classes is None else classes
    shifts = torch.randint(-2, 3, (n, 2), generator=made).tolist()
    x = torch.stack([patterns[c].roll(shift, (1, 2)) for c, shift in zip(y.tolist(), shifts, strict=True)])
    return x + torch.randn(n, 1, SIDE, SIDE, generator=made), y


def forward(model: nn.Module, batch: Batch) -> Tensors:
    x, y = batch
    logits = model(x)
    return {"loss": F.cross_entropy(logits, y), "logits": logits, "targets": y}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {"accuracy": float((tensors["logits"].argmax(1) == batch[1]).float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": pictures(ITEMS, seed), "val": pictures(200, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randint(len(x), (BATCH,), generator=seeded(seed, step, len(phase)))
        return x[chosen], y[chosen]

    return Training(Classifier(**options), sample, forward, measure, lambda p: torch.optim.SGD(p, 0.01, momentum=0.9))
