"""A small vision transformer: six textures at random places of noisy pictures, patches, a class token, AdamW with warm-up."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults._training import Batch, Tensors, Training, seeded

CLASSES, SIDE, PATCH, WIDTH, HEADS, DEPTH, ITEMS, BATCH, STEPS, WARM_UP = 6, 16, 4, 32, 4, 3, 3000, 32, 250, 30


class Patches(nn.Module):
    """Pictures to a row of vectors, one a patch: (batch, 3, side, side) to (batch, patches, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(3, width, PATCH, PATCH)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(self.project(x).flatten(2).transpose(1, 2))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.softmax = nn.Softmax(-1)
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.dropout(self.softmax(q @ k.transpose(-2, -1) * self.scale))
        return self.project((weights @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, width: int, activation, dropout: float) -> None:
        super().__init__()
        self.wide, self.activation = nn.Linear(width, 4 * width), activation()
        self.narrow, self.dropout = nn.Linear(4 * width, width), nn.Dropout(dropout)

    def forward(self, x):
        return self.dropout(self.narrow(self.activation(self.wide(x))))


class Block(nn.Module):
    """Attention and an MLP, each normalised in front and added to what it was given."""

    def __init__(self, width: int, heads: int, norm, activation, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = norm(width), Attention(width, heads, dropout)
        self.norm2, self.mlp = norm(width), MLP(width, activation, dropout)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, norm=nn.LayerNorm, activation=nn.GELU, dropout: float = 0.0, depth: int = DEPTH) -> None:
        super().__init__()
        self.patches = Patches(WIDTH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, (SIDE // PATCH) ** 2 + 1, WIDTH))
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(WIDTH, HEADS, norm, activation, dropout) for _ in range(depth))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def tokens(self, x):
        """The class token and the patches, behind all blocks."""
        x = self.patches(x)
        x = self.dropout(torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        return self.head(self.tokens(x)[:, 0])


def pictures(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of deviation 1, and a coloured square of stripes somewhere in it; a class is a direction of stripes and a colour."""
    made = seeded(91, seed)
    y = torch.randint(CLASSES, (n,), generator=made)
    angle, colour = math.pi / 3 * (y % 3) + 0.2 * torch.randn(n, generator=made), torch.eye(3)[y // 3]
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    along = rows * angle.cos()[:, None, None] + columns * angle.sin()[:, None, None]
    stripes = torch.sin(1.6 * along + 6.28 * torch.rand(n, 1, 1, generator=made))
    top, left = torch.randint(0, SIDE - 8, (2, n, 1, 1), generator=made)
    inside = (rows >= top) & (rows < top + 9) & (columns >= left) & (columns < left + 9)
    return 2 * (stripes * inside)[:, None] * colour[..., None, None] + torch.randn(n, 3, SIDE, SIDE, generator=made), y


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(batch[0])
    return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {"accuracy": float((tensors["logits"].argmax(1) == batch[1]).float().mean())}


def warmed(optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Up in a line, then down on a cosine."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 0.51 + 0.49 * math.cos(math.pi * step / STEPS)))


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": pictures(ITEMS, seed), "val": pictures(300, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        x, y = data[phase]
        chosen = torch.randperm(len(x), generator=seeded(seed, step, len(phase)))[:BATCH]
        return x[chosen], y[chosen]

    model = VisionTransformer(**options)
    optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.05)  # noqa: E731 - one line beside its program
    return Training(model, sample, forward, measure, optimize, warmed, steps=STEPS, clip=1.0)
