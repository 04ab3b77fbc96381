"""A recommender of films: embeddings of users and items beside their features, a product and an MLP, sampled negatives, Adam."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

USERS, ITEMS, GENRES, REGIONS, WIDTH, BATCH, NEGATIVES = 200, 120, 6, 5, 16, 64, 7
CONTEXT, TRAITS = (
    4,
    3,
)  # numbers beside each visit (age, activity, hour as sine and cosine) and of each film (price, year, length)


class Tower(nn.Module):
    """An embedding by number, one by category, and numbers: (...,), (...,), (..., numbers) to (..., WIDTH)."""

    def __init__(self, rows: int, categories: int, numbers: int, norm, activation, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, WIDTH)
        self.category = nn.Embedding(categories, 4)
        self.hidden = nn.Linear(WIDTH + 4 + numbers, 2 * WIDTH)
        self.norm, self.activation, self.dropout = norm(2 * WIDTH), activation(), nn.Dropout(dropout)
        self.project = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, ids, categories, numbers):
        x = torch.cat([self.embedding(ids), self.category(categories), numbers], -1)
        return self.project(self.dropout(self.activation(self.norm(self.hidden(x)))))


class Recommender(nn.Module):
    """How likely each user, in rows, is to watch each of some films, in columns: logits."""

    def __init__(self, norm=nn.LayerNorm, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        self.user = Tower(USERS, REGIONS, CONTEXT, norm, activation, dropout)
        self.item = Tower(ITEMS, GENRES, TRAITS, norm, activation, dropout)
        self.popularity = nn.Embedding(ITEMS, 1)
        self.mix1, self.activation1 = nn.Linear(2 * WIDTH, WIDTH), activation()
        self.mix2, self.activation2 = nn.Linear(WIDTH, WIDTH), activation()
        self.head = nn.Linear(2 * WIDTH, 1)
        for table in (self.user.embedding, self.item.embedding, self.popularity):
            nn.init.normal_(table.weight, std=0.3)

    def forward(self, context, users, regions, traits, items, genres):
        user, item = self.user(users, regions, context)[:, None], self.item(items, genres, traits)
        deep = torch.cat([user.expand_as(item), item], -1)
        deep = self.activation2(self.mix2(self.activation1(self.mix1(deep))))
        return (self.head(torch.cat([user * item, deep], -1)) + self.popularity(items)).squeeze(-1)


def visits(n: int, generator: torch.Generator) -> Batch:
    """Visits: context, user, region of the user, traits of all films of a list, the films, their genres. The first of each list was
    watched; it is drawn by taste, genre at that hour, price against activity, and popularity; the others are drawn at random."""
    made = seeded(131)
    tastes, films = torch.randn(USERS, 4, generator=made), torch.randn(ITEMS, 4, generator=made)
    ages, activity = torch.randn(2, USERS, generator=made)
    regions, genres = torch.randint(REGIONS, (USERS,), generator=made), torch.randint(GENRES, (ITEMS,), generator=made)
    traits, popularity = torch.randn(ITEMS, TRAITS, generator=made), 0.7 * torch.randn(ITEMS, generator=made)
    by_hour, by_region = torch.randn(GENRES, 2, generator=made), torch.randn(REGIONS, GENRES, generator=made)
    users = torch.randint(USERS, (n,), generator=generator)
    hours = 2 * math.pi * torch.rand(n, generator=generator)
    context = torch.stack([ages[users], activity[users], hours.sin(), hours.cos()], 1)
    scores = 0.7 * tastes[users] @ films.T + (context[:, 2:] @ by_hour.T + 0.7 * by_region[regions[users]])[:, genres]
    scores = scores + popularity + 0.6 * context[:, 1:2] * traits[:, 0] + 0.6 * context[:, :1] * traits[:, 1]
    items = torch.randint(ITEMS, (n, 1 + NEGATIVES), generator=generator)
    items[:, :1] = torch.multinomial((1.5 * scores).softmax(1), 1, generator=generator)
    return context, users, regions[users], traits[items], items, genres[items]


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits = model(*batch)
    targets = torch.zeros_like(logits)
    targets[:, 0] = 1.0
    return {"loss": F.binary_cross_entropy_with_logits(logits, targets), "logits": logits, "targets": targets}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """How often the film that was watched is first of its list, and the share of others below it; with NaN, none."""
    logits = tensors["logits"]
    below = logits[:, 1:] < logits[:, :1]
    return {"hit@1": float(below.all(1).float().mean()), "auc": float(below.float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: visits(n, seeded(seed, n)) for phase, n in (("train", 16000), ("val", 600))}

    def sample(step: int, phase: str) -> Batch:
        size = BATCH if phase == "train" else 4 * BATCH
        chosen = torch.randperm(len(data[phase][0]), generator=seeded(seed, step, len(phase)))[:size]
        return tuple(part[chosen] for part in data[phase])

    return Training(Recommender(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 5e-3))
