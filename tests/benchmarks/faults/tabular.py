"""A table: standardised numbers and three categories, an embedding of each column, an MLP with BatchNorm, a price, Adam."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

NUMBERS, SIZES, WIDTH, BATCH, ROWS = 6, (12, 6, 4), 48, 64, 4000  # of each category: how many values it takes
EACH = 4  # width of a column's embedding


class Numbers(nn.Module):
    """Four lines for each numeric column, cut at zero: (batch, columns) to (batch, columns * EACH)."""

    def __init__(self, columns: int = NUMBERS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, EACH).sign())
        self.bias = nn.Parameter(torch.empty(columns, EACH).uniform_(-1, 1))
        self.activation = nn.ReLU()

    def forward(self, numbers):
        return self.activation(numbers[..., None] * self.weight + self.bias).flatten(1)


class Table(nn.Module):
    def __init__(self, outputs: int = 1, norm=nn.BatchNorm1d, activation=nn.ReLU, dropout: float = 0.1) -> None:
        super().__init__()
        self.numbers = Numbers()
        self.tables = nn.ModuleList(nn.Embedding(size, EACH) for size in SIZES)
        self.layer1 = nn.Linear((NUMBERS + len(SIZES)) * EACH, WIDTH)
        self.norm1, self.activation1 = norm(WIDTH), activation()
        self.layer2 = nn.Linear(WIDTH, WIDTH)
        self.norm2, self.activation2 = norm(WIDTH), activation()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, outputs)

    def forward(self, numbers, categories):
        columns = [self.numbers(numbers), *(table(categories[:, i]) for i, table in enumerate(self.tables))]
        x = self.activation1(self.norm1(self.layer1(torch.cat(columns, 1))))
        x = self.activation2(self.norm2(self.layer2(self.dropout(x))))
        return self.head(self.dropout(x)).squeeze(1)


def rows(n: int, generator: torch.Generator) -> Batch:
    """Numbers, categories, and a price of mean 0 and deviation 1: effects of columns, of pairs of them, and noise."""
    made = seeded(67)
    numbers = torch.randn(n, NUMBERS, generator=generator)
    categories = torch.stack([torch.randint(size, (n,), generator=generator) for size in SIZES], 1)
    effects = [torch.randn(size, 3, generator=made)[categories[:, i]] for i, size in enumerate(SIZES)]
    price = 0.7 * numbers[:, 0] + 0.6 * numbers[:, 1].abs() + 0.5 * effects[0][:, 0] + 0.4 * effects[1][:, 0]
    price = price + 0.5 * effects[0][:, 1] * numbers[:, 2] + 0.4 * effects[2][:, 1] * effects[1][:, 1]
    price = price + 0.4 * torch.sin(2 * numbers[:, 3]) + 0.2 * torch.randn(n, generator=generator)
    return numbers, categories, (price - 0.5) / 1.3


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(*batch[:2])
    return {"loss": F.mse_loss(outputs, batch[2]), "outputs": outputs, "targets": batch[2]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Mean absolute error, and the explained share of the variance."""
    rest = tensors["outputs"] - batch[2]
    return {"mae": float(rest.abs().mean()), "r2": float(1 - rest.square().mean() / batch[2].var(correction=0))}


def classified(t: Training, *bounds: float) -> None:
    """Make a classifier of it: which of the ranges between these bounds the price is in."""
    plain, edges = t.sample, torch.tensor(bounds)
    t.model = Table(len(bounds) + 1)

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        return numbers, categories, torch.bucketize(price, edges)

    def told(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        return {"loss": F.cross_entropy(logits, batch[2]), "logits": logits, "targets": batch[2]}

    t.sample, t.forward = sample, told
    t.measure = lambda tensors, batch: {"accuracy": float((tensors["logits"].argmax(1) == batch[2]).float().mean())}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: rows(n, seeded(seed, n)) for phase, n in (("train", ROWS), ("val", 400))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randperm(len(data[phase][0]), generator=seeded(seed, step, len(phase)))[:BATCH]
        return tuple(column[chosen] for column in data[phase])

    return Training(Table(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 5e-3))
