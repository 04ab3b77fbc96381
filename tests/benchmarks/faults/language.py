"""A small language model: two pre-norm transformer blocks, tied embeddings, a Markov source, AdamW with warm-up and cosine."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from faults._training import Batch, Tensors, Training, seeded

TOKENS, TIME, WIDTH, HEADS, BATCH = 20, 20, 32, 4, 16


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.softmax = nn.Softmax(-1)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -math.inf)
        return self.out((self.softmax(scores) @ v).transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, activation, norm, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(WIDTH), norm(WIDTH)
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), activation(), nn.Linear(2 * WIDTH, WIDTH))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Language(nn.Module):
    def __init__(self, activation=nn.GELU, norm=nn.LayerNorm, dropout: float = 0.0, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.position = nn.Embedding(TIME, WIDTH)
        self.blocks = nn.ModuleList(Block(activation, norm, dropout) for _ in range(2))
        self.norm = norm(WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position.weight
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(self.norm(x))


def sentences(n: int, generator: torch.Generator) -> torch.Tensor:
    """From a chain whose next token depends on the last one, and a little on the one before."""
    made = seeded(27)
    scores = 2.2 * torch.randn(1, TOKENS, TOKENS, generator=made) + torch.randn(TOKENS, 1, TOKENS, generator=made)
    chances = torch.softmax(scores, -1)
    tokens = [torch.randint(TOKENS, (n,), generator=generator) for _ in range(2)]
    for _ in range(TIME - 1):
        tokens.append(torch.multinomial(chances[tokens[-2], tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    tokens, targets = batch
    logits = model(tokens)
    return {"loss": F.cross_entropy(logits.flatten(0, 1), targets.flatten()), "logits": logits, "targets": targets}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    hit = (tensors["logits"].argmax(-1) == batch[1]).float().mean()
    return {"accuracy": float(hit), "perplexity": math.exp(min(20.0, float(tensors["loss"])))}


def warm_up_and_cosine(optimizer: torch.optim.Optimizer, steps: int = 300, warm_up: int = 30) -> LambdaLR:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))

    return LambdaLR(optimizer, factor)


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: sentences(n, seeded(seed, n)) for phase, n in (("train", 2000), ("val", 200))}

    def sample(step: int, phase: str) -> Batch:
        rows = data[phase][torch.randint(len(data[phase]), (BATCH,), generator=seeded(seed, step, len(phase)))]
        return rows[:, :-1], rows[:, 1:]

    optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=0.01)  # noqa: E731 - one line beside its program
    return Training(Language(**options), sample, forward, measure, optimize, warm_up_and_cosine, clip=1.0)
