"""Pre-training: tracks of frames, spans of which are hidden; a convolution for positions, a transformer, AdamW, clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults._training import Batch, Tensors, Training, seeded

FEATURES, FRAMES, HIDDEN, WIDTH, HEADS, BATCH, TRACKS = 16, 32, 4, 32, 4, 20, 1500
SPAN, SPANS = 4, 3  # frames that are hidden together, and how often in a track


class Attention(nn.Module):
    """From all frames to all."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def forward(self, x):
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        weights = self.softmax(q @ k.mT / math.sqrt(WIDTH // HEADS))
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, then an MLP."""

    def __init__(self, activation, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), activation(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Positions(nn.Module):
    """What is around a frame, from a grouped convolution: adds where it is, as in wav2vec 2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 9, padding=4, groups=4)
        self.norm = nn.GroupNorm(4, WIDTH)
        self.activation = nn.GELU()

    def forward(self, x):
        return x + self.activation(self.norm(self.conv(x.transpose(1, 2)))).transpose(1, 2)


class Pretrained(nn.Module):
    def __init__(self, activation=nn.GELU, dropout: float = 0.0, blocks: int = 2) -> None:
        super().__init__()
        self.project = nn.Linear(FEATURES, WIDTH)
        self.mask_token = nn.Parameter(0.1 * torch.randn(WIDTH))
        self.positions = Positions()
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(activation, dropout) for _ in range(blocks))
        self.final = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, FEATURES)

    def encode(self, frames, hidden):
        x = torch.where(hidden[..., None], self.mask_token, self.project(frames))
        x = self.norm(self.positions(x))
        for block in self.blocks:
            x = block(x)
        return self.final(x)

    def forward(self, frames, hidden):
        return self.head(self.encode(frames, hidden))


def tracks(n: int, generator: torch.Generator) -> torch.Tensor:
    """(n, FRAMES, FEATURES): a few slow swings of random speed, mixed to features that are bent and noisy; standardised."""
    made = seeded(83)
    mixing, bend = F.normalize(torch.randn(2, HIDDEN, FEATURES, generator=made), dim=1)
    speed = 0.12 + 0.3 * torch.rand(n, 1, HIDDEN, generator=generator)
    phase, size = (
        6.2832 * torch.rand(n, 1, HIDDEN, generator=generator),
        0.5 + torch.rand(n, 1, HIDDEN, generator=generator),
    )
    swings = size * torch.sin(speed * torch.arange(FRAMES)[:, None] + phase)
    frames = swings @ mixing + 0.7 * torch.tanh(3 * swings @ bend)
    return (frames + 0.12 * torch.randn(frames.shape, generator=generator)) / 1.05


def spans(n: int, generator: torch.Generator, length: int = SPAN, times: int = SPANS) -> torch.Tensor:
    """(n, FRAMES): true where a frame is hidden."""
    starts = torch.randint(FRAMES - length + 1, (n, times, 1), generator=generator)
    place = torch.arange(FRAMES)
    return ((place >= starts) & (place < starts + length)).any(1)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    """Only hidden frames count."""
    frames, hidden = batch
    outputs = model(frames, hidden)
    return {"loss": F.mse_loss(outputs[hidden], frames[hidden]), "outputs": outputs, "targets": frames}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Mean absolute error of hidden frames, and the explained share of their variance."""
    frames, hidden = batch
    wanted = frames[hidden]
    rest = tensors["outputs"][hidden] - wanted
    return {"mae": float(rest.abs().mean()), "r2": float(1 - rest.square().mean() / wanted.var(correction=0))}


def warm_up(optimizer: torch.optim.Optimizer, steps: int = 30) -> LambdaLR:
    """Up in a line, then down in a line."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / steps, max(0.05, (260 - step) / (260 - steps))))


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: tracks(n, seeded(seed, n)) for phase, n in (("train", TRACKS), ("val", 200))}

    def sample(step: int, phase: str) -> Batch:
        generator = seeded(seed, step, len(phase))
        chosen = torch.randperm(len(data[phase]), generator=generator)[:BATCH]
        return data[phase][chosen], spans(BATCH, generator)

    optimize = lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.9, 0.98), weight_decay=0.01)  # noqa: E731 - as in other programs
    return Training(Pretrained(**options), sample, forward, measure, optimize, warm_up, steps=250, clip=1.0)
