"""A translator: an encoder and a decoder of two transformer blocks each, teacher forcing, padding, AdamW with warm-up."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults._training import Batch, Tensors, Training, seeded

PAD, START, END, WORDS = 0, 1, 2, 24  # words are 3 to 23, in both languages
NOTHING = -100  # no target
LENGTH, WIDTH, HEADS, BATCH = 8, 32, 4, 32


class Attention(nn.Module):
    """From x to what `memory` holds; `hidden` is true where it may not look."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.softmax = nn.Softmax(-1)

    def forward(self, x, memory, hidden):
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query(x), self.key(memory), self.value(memory)))  # fmt: skip
        scores = (q @ k.mT / math.sqrt(WIDTH // HEADS)).masked_fill(hidden, -math.inf)
        return self.out((self.softmax(scores) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm; with attention to the encoder if it is the decoder's."""

    def __init__(self, activation, norm, dropout: float, crossed: bool) -> None:
        super().__init__()
        self.norm1, self.attention = norm(WIDTH), Attention()
        if crossed:
            self.norm2, self.cross = norm(WIDTH), Attention()
        self.norm3 = norm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), activation(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, hidden, memory=None, padding=None):
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, hidden))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm2(x), memory, padding))
        return x + self.dropout(self.mlp(self.norm3(x)))


class Words(nn.Module):
    """Embeddings with sines of the position."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH, padding_idx=PAD)
        nn.init.normal_(self.table.weight[PAD + 1 :], std=WIDTH**-0.5)
        self.dropout = nn.Dropout(dropout)
        angles = torch.arange(8 * LENGTH)[:, None] * torch.exp(-math.log(100.0) * torch.arange(0, WIDTH, 2) / WIDTH)
        self.register_buffer("position", torch.cat([angles.sin(), angles.cos()], 1))

    def forward(self, tokens):
        return self.dropout(self.table(tokens) * math.sqrt(WIDTH) + self.position[: tokens.shape[1]])


class Translator(nn.Module):
    def __init__(self, activation=nn.ReLU, norm=nn.LayerNorm, dropout: float = 0.05) -> None:
        super().__init__()
        self.source, self.target = Words(dropout), Words(dropout)
        self.encoder = nn.ModuleList(Block(activation, norm, dropout, False) for _ in range(2))
        self.decoder = nn.ModuleList(Block(activation, norm, dropout, True) for _ in range(2))
        self.encoder_norm, self.decoder_norm = norm(WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def encode(self, source):
        x, padding = self.source(source), (source == PAD)[:, None, None]
        for block in self.encoder:
            x = block(x, padding)
        return self.encoder_norm(x), padding

    def decode(self, previous, memory, padding):
        x, future = self.target(previous), torch.ones(2 * [previous.shape[1]], dtype=torch.bool).triu(1)
        for block in self.decoder:
            x = block(x, future, memory, padding)
        return self.head(self.decoder_norm(x))

    def forward(self, source, previous):
        return self.decode(previous, *self.encode(source))


def sentences(n: int, generator: torch.Generator) -> Batch:
    """Two to eight words; in the other language the two of each pair change places, and one word in four has another
    translation behind some words."""
    made = seeded(71)
    meaning, other = (torch.randperm(WORDS - 3, generator=made) + 3 for _ in range(2))
    words = torch.randint(3, WORDS, (n, LENGTH), generator=generator)
    lengths = torch.randint(2, LENGTH + 1, (n, 1), generator=generator)
    before = F.pad(words[:, :-1], (1, 0), value=3)
    translated = torch.where((words % 4 == 0) & (before % 2 == 0), other[words - 3], meaning[words - 3])
    place = torch.arange(LENGTH) ^ 1
    translated = translated.gather(1, torch.where(place < lengths, place, torch.arange(LENGTH)))
    kept = torch.arange(LENGTH) < lengths
    source, target = words.where(kept, PAD), translated.where(kept, PAD)
    previous = torch.cat([torch.full((n, 1), START), target], 1)
    following = F.pad(translated.where(kept, NOTHING), (0, 1), value=NOTHING).scatter(1, lengths, END)
    return source, previous, following


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(*batch[:2])
    loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten())
    return {"loss": loss, "logits": logits, "targets": batch[2]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    asked = batch[2] != NOTHING
    hit = tensors["logits"].argmax(-1) == batch[2]
    return {"accuracy": float(hit[asked].float().mean()), "exact": float((hit | ~asked).all(1).float().mean())}


def warm_up(optimizer: torch.optim.Optimizer, steps: int = 40) -> LambdaLR:
    """Up in a line, down with the root of the step."""
    return LambdaLR(optimizer, lambda step: min((step + 1) / steps, (steps / (step + 1)) ** 0.5))


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: sentences(n, seeded(seed, n)) for phase, n in (("train", 4000), ("val", 400))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase][0]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return tuple(part[chosen] for part in data[phase])

    optimize = lambda p: torch.optim.AdamW(p, 5e-3, betas=(0.9, 0.98), weight_decay=0.01)  # noqa: E731 - as in other programs
    return Training(Translator(**options), sample, forward, measure, optimize, warm_up, clip=1.0)
