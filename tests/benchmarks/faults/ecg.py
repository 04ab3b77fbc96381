"""A reader of electrocardiograms: made-up records of four leads, a residual network over time with gates, five findings at once, Adam."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

FINDINGS = ("tachycardia", "fibrillation", "wide_qrs", "st_elevation", "ectopic")
SHARES = (0.3, 0.3, 0.3, 0.3, 0.3)  # of records that have each finding
LEADS, SAMPLES, RATE, BEATS, BATCH = 4, 256, 64, 13, 24  # four seconds at 64 Hz
WAVES = ("p", "q", "r", "s", "t")


class Gate(nn.Module):
    """Squeeze and excitation: each channel is multiplied by a number that is told from the means of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // 4)
        self.activation = nn.ReLU()
        self.excite = nn.Linear(width // 4, width)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x):
        return x * self.sigmoid(self.excite(self.activation(self.squeeze(x.mean(2)))))[:, :, None]


class Block(nn.Module):
    """Two convolutions with norms, a gate, and a connection around them that is thinned out like them."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm, activation, dropout: float) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv1d(inputs, outputs, 7, stride, 3, bias=False), norm(outputs)
        self.activation1, self.dropout = activation(), nn.Dropout(dropout)
        self.conv2, self.norm2 = nn.Conv1d(outputs, outputs, 7, 1, 3, bias=False), norm(outputs)
        self.gate = Gate(outputs)
        self.shortcut = nn.Sequential(nn.AvgPool1d(stride), nn.Conv1d(inputs, outputs, 1, bias=False), norm(outputs))
        self.activation2 = activation()

    def forward(self, x):
        y = self.dropout(self.activation1(self.norm1(self.conv1(x))))
        return self.activation2(self.gate(self.norm2(self.conv2(y))) + self.shortcut(x))


class Reader(nn.Module):
    """A stem that halves time, three residual blocks, the mean and the maximum over time, a logit of each finding."""

    def __init__(self, norm=nn.BatchNorm1d, activation=nn.ReLU, dropout: float = 0.1, width: int = 16) -> None:
        super().__init__()
        conv = nn.Conv1d(LEADS, width, 9, 2, 4, bias=False)
        self.stem = nn.Sequential(OrderedDict(conv=conv, norm=norm(width), activation=activation()))
        widths = (width, width, 2 * width, 2 * width)
        pairs = pairwise(widths)
        self.blocks = nn.Sequential(*(Block(a, b, 2, norm, activation, dropout) for a, b in pairs))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4 * width, len(FINDINGS))

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.head(self.dropout(torch.cat([x.mean(2), x.amax(2)], 1)))


def records(
    n: int, generator: torch.Generator, shares: tuple[float, ...] = SHARES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Voltages in millivolts (n, leads, samples) and findings (n, 5): beats of five waves each, as every lead sees them."""
    told = torch.rand(n, len(FINDINGS), generator=generator) < torch.tensor(shares)
    fast, irregular, wide, raised, early = told[:, :, None].unbind(1)
    between = torch.where(fast, 0.5, 0.8) + 0.1 * (torch.rand(n, 1, generator=generator) - 0.5)
    jitter = torch.where(irregular, 0.25, 0.03) * (2 * torch.rand(n, BEATS, generator=generator) - 1)
    onsets = (between * (1 + jitter)).cumsum(1) - 0.8 * torch.rand(n, 1, generator=generator)
    odd = early & (torch.arange(BEATS) == torch.randint(2, 4, (n, 1), generator=generator))
    onsets = (onsets - 0.3 * between * odd)[:, :, None]  # an ectopic beat comes early, without a P wave, and is large
    seen = torch.tensor(
        [
            [0.15, -0.1, 1.0, -0.25, 0.3],
            [0.2, -0.05, 0.8, -0.1, 0.35],
            [0.05, -0.2, 0.6, -0.6, 0.2],
            [0.1, -0.1, 1.2, -0.3, 0.3],
        ]
    )
    heights = seen[None, :, None] * (1 + 0.25 * torch.randn(n, LEADS, 1, len(WAVES), generator=generator))
    heights = heights.expand(-1, -1, BEATS, -1).clone()
    heights[..., 0] *= (~(irregular | odd))[:, None].float()
    heights = heights * (1 + 0.9 * odd.float())[:, None, :, None]
    spread = torch.where(wide | odd, 2.4, 1.0)[:, None, :, None]
    time = torch.arange(SAMPLES) / RATE
    x = 0.15 * torch.randn(n, LEADS, SAMPLES, generator=generator)
    for i, (offset, breadth) in enumerate(((-0.16, 0.03), (-0.03, 0.014), (0.0, 0.014), (0.03, 0.014), (0.22, 0.05))):
        near, factor = (spread if 0 < i < 4 else torch.ones(())), breadth
        distance = time - onsets[:, None] - offset * (near if 0 < i < 4 else 1.0)
        x += (heights[..., i, None] * (-0.5 * (distance / (factor * near)).square()).exp()).sum(2)
    plateau = ((time - onsets - 0.05) * 60).sigmoid() * ((0.2 - time + onsets) * 60).sigmoid()
    x += 0.2 * (raised[:, None] * plateau.sum(1, keepdim=True))
    phase = 6.2832 * torch.rand(n, LEADS, 1, generator=generator)
    return x + 0.15 * (6.2832 * 0.3 * time + phase).sin(), told.float()  # the wander of breath


def standardised(x: torch.Tensor) -> torch.Tensor:
    """By the mean and the deviation of the voltages of all training records."""
    return (x - 0.12) / 0.3


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(batch[0])
    return {"loss": F.binary_cross_entropy_with_logits(logits, batch[1]), "logits": logits, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Means over findings: F1 at a probability of a half; how often a record with the finding has a higher score than one without."""
    told, true = tensors["logits"] > 0, batch[1] > 0
    hits = (told & true).sum(0)
    f1 = 2 * hits / (told.sum(0) + true.sum(0)).clamp(min=1)
    aurocs = []
    for score, has in zip(tensors["logits"].T, true.T, strict=True):
        if 0 < has.sum() < len(has):
            above = score[has][:, None] - score[~has]
            aurocs.append(float((above > 0).float().mean() + 0.5 * (above == 0).float().mean()))
    return {"f1": float(f1.mean()), "auroc": sum(aurocs) / max(len(aurocs), 1)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: records(n, seeded(seed, n)) for phase, n in (("train", 1800), ("val", 240))}

    def sample(step: int, phase: str) -> Batch:
        x, told = data[phase]
        chosen = torch.randperm(len(x), generator=seeded(seed, step, len(phase)))[:BATCH]
        return standardised(x[chosen]), told[chosen]

    return Training(
        Reader(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 2e-3), steps=180, val_every=30
    )
