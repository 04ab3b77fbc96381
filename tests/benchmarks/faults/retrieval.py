"""Retrieval of audio by captions: two towers, a contrastive loss with a learned temperature, recall, AdamW with clipping."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

WORDS, FEATURES, FRAMES, LENGTH, WIDTH, BATCH = 20, 12, 24, 5, 32, 32  # word 0 is padding


class AudioTower(nn.Module):
    """Convolutions with BatchNorm over frames, attention over time: (batch, frames, features) to (batch, width)."""

    def __init__(self, norm, activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(FEATURES, WIDTH, 3, padding=1)
        self.norm1, self.activation1 = norm(WIDTH), activation()
        self.conv2 = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm2, self.activation2 = norm(WIDTH), activation()
        self.score = nn.Linear(WIDTH, 1)
        self.softmax = nn.Softmax(1)
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, frames):
        x = self.activation1(self.norm1(self.conv1(frames.transpose(1, 2))))
        x = self.activation2(self.norm2(self.conv2(x))).transpose(1, 2)
        return self.project((self.softmax(self.score(x)) * x).sum(1))


class TextTower(nn.Module):
    """One transformer layer and a mean over words that are not padding: (batch, words) to (batch, width)."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH, padding_idx=0)
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout, "gelu", batch_first=True, norm_first=True)  # fmt: skip
        self.project = nn.Linear(WIDTH, WIDTH)

    def forward(self, words):
        padding = words == 0
        x = self.encoder(self.embedding(words), src_key_padding_mask=padding)
        x = x.masked_fill(padding[..., None], 0.0).sum(1) / (~padding).sum(1, keepdim=True)
        return self.project(x)


class TwoTowers(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        self.audio = AudioTower(norm, activation)
        self.text = TextTower(dropout)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))

    def forward(self, frames, words):
        """Scaled cosine of each clip, in rows, with each caption of the batch, in columns."""
        audio, text = F.normalize(self.audio(frames), dim=-1), F.normalize(self.text(words), dim=-1)
        return self.scale.clamp(max=math.log(100.0)).exp() * audio @ text.T


def pairs(n: int, generator: torch.Generator) -> Batch:
    """Clips of two to five events in noise, and captions that name them in the order of time."""
    shapes = 1.1 * torch.randn(WORDS, FEATURES, generator=seeded(47))
    words = torch.rand(n, WORDS - 1, generator=generator).argsort(1)[:, :LENGTH] + 1
    lengths = torch.randint(2, LENGTH + 1, (n, 1), generator=generator)
    words = words.masked_fill(torch.arange(LENGTH) >= lengths, 0)
    onsets = torch.arange(LENGTH) * 4 + torch.randint(0, 4, (n, 1), generator=generator)
    frames = torch.randn(n, FRAMES, FEATURES, generator=generator)
    rows = torch.arange(n)[:, None]
    for later in range(3):
        frames[rows, onsets + later] += shapes[words] * (words > 0)[..., None]
    return frames, words


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(*batch)
    targets = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    return {"loss": loss, "logits": logits, "targets": targets}


def ranks(tensors: Tensors) -> torch.Tensor:
    """How many other captions are at least as near to each clip as its own; with NaN, all."""
    logits = tensors["logits"]
    return (~(logits < logits.diagonal()[:, None])).sum(1) - 1


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    rank = ranks(tensors)
    return {"recall@1": float((rank < 1).float().mean()), "recall@5": float((rank < 5).float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: pairs(n, seeded(seed, n)) for phase, n in (("train", 4000), ("val", 400))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randperm(len(data[phase][0]), generator=seeded(seed, step, len(phase)))[:BATCH]
        return tuple(part[chosen] for part in data[phase])

    optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=0.01)  # noqa: E731 - one line beside its program
    return Training(TwoTowers(**options), sample, forward, measure, optimize, clip=1.0)
