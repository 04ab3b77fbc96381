"""Molecules: message passing over batches of small graphs, a gated sum over the atoms of each, a property, Adam with steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from faults._training import Batch, Tensors, Training, seeded

KINDS, BONDS, NUMBERS, LARGEST, WIDTH, BATCH = (
    6,
    3,
    2,
    14,
    32,
    32,
)  # of atoms: kinds, numbers of each, most of them in a molecule
MEAN, DEVIATION = 3.4, 4.0  # of the property in its own unit


def summed(x, graph, graphs: int):
    """(atoms, width) to (graphs, width)."""
    return torch.zeros(graphs, x.shape[1], dtype=x.dtype).index_add(0, graph, x)


class Passing(nn.Module):
    """Each atom hears the sum of its neighbours' messages, and changes by what it makes of it."""

    def __init__(self, activation, norm) -> None:
        super().__init__()
        self.bond = nn.Embedding(BONDS, WIDTH)
        self.message, self.activation = nn.Linear(WIDTH, WIDTH), activation()
        self.update = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), norm(WIDTH), activation(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x, edges, bonds):
        sent = self.activation(self.message(x)[edges[0]] + self.bond(bonds))
        return x + self.update(torch.cat([x, summed(sent, edges[1], len(x))], 1))


class Readout(nn.Module):
    """A sum over atoms, each weighted by its gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.sigmoid, self.value = nn.Linear(WIDTH, WIDTH), nn.Sigmoid(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, graph, graphs: int):
        return summed(self.sigmoid(self.gate(x)) * self.value(x), graph, graphs) / LARGEST**0.5


class Molecules(nn.Module):
    def __init__(
        self, activation=nn.ReLU, norm=nn.BatchNorm1d, dropout: float = 0.0, layers: int = 3, outputs: int = 1
    ) -> None:
        super().__init__()
        self.kinds, self.numbers = nn.Embedding(KINDS, WIDTH), nn.Linear(NUMBERS, WIDTH)
        self.layers = nn.ModuleList(Passing(activation, norm) for _ in range(layers))
        self.readout, self.dropout = Readout(), nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(WIDTH, WIDTH), activation(), nn.Linear(WIDTH, outputs))

    def forward(self, numbers, kinds, edges, bonds, graph, graphs: int):
        x = self.kinds(kinds) + self.numbers(numbers)
        for layer in self.layers:
            x = layer(x, edges, bonds)
        return self.head(self.dropout(self.readout(x, graph, graphs))).squeeze(1)


def molecules(n: int, generator: torch.Generator) -> list[Batch]:
    """Trees with some rings: numbers, kinds, edges in both directions, bonds, and a property of mean 0 and deviation 1, a sum over
    atoms, over bonds by their kinds and charges, and over atoms with two neighbours of one group."""
    made = seeded(131)
    atom, pair, strength = (
        torch.randn(KINDS, generator=made),
        torch.randn(KINDS, KINDS, generator=made),
        torch.tensor([0.5, 1.0, 1.5]),
    )
    found = []
    for _ in range(n):
        size = int(torch.randint(5, LARGEST + 1, (), generator=generator))
        kinds, numbers = (
            torch.randint(KINDS, (size,), generator=generator),
            torch.randn(size, NUMBERS, generator=generator),
        )
        child = torch.arange(1, size)
        parent = child - 1 - (torch.rand(size - 1, generator=generator) * child.clamp(max=3)).long()
        ring = torch.arange(4, size)[torch.rand(size - 4, generator=generator) < 0.2]
        edges = torch.cat([torch.stack([child, parent]), torch.stack([ring, ring - 4])], 1)
        bonds = torch.randint(BONDS, (edges.shape[1],), generator=generator)
        a, b = kinds[edges[0]], kinds[edges[1]]
        charges = numbers[edges[0], 0] * numbers[edges[1], 0]
        edges, bonds = torch.cat([edges, edges.flip(0)], 1), bonds.repeat(2)
        near = torch.zeros(size).index_add(0, edges[1], (kinds[edges[0]] < 2).float())
        value = 0.6 * atom[kinds].sum() + 0.4 * ((pair[a, b] + pair[b, a]) * strength[bonds[: len(a)]]).sum()
        value = value + 0.5 * charges.sum() + 0.7 * (near >= 2).sum() + 0.3 * numbers[:, 1].abs().sum()
        found.append((numbers, kinds, edges, bonds, value))
    values = torch.stack([value for *_, value in found])
    return [(*parts, value) for (*parts, _), value in zip(found, (values - MEAN) / DEVIATION, strict=True)]


def collate(chosen: list[Batch]) -> Batch:
    """One graph of many: atoms one after another, edges counted on, and the number of the molecule for each atom."""
    sizes = torch.tensor([len(numbers) for numbers, *_ in chosen])
    starts = sizes.cumsum(0) - sizes
    numbers, kinds, edges, bonds, values = zip(*chosen, strict=True)
    edges = torch.cat([edge + start for edge, start in zip(edges, starts, strict=True)], 1)
    graph = torch.arange(len(chosen)).repeat_interleave(sizes)
    return torch.cat(numbers), torch.cat(kinds), edges, torch.cat(bonds), graph, torch.stack(values)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(*batch[:5], len(batch[5]))
    return {"loss": F.mse_loss(outputs, batch[5]), "outputs": outputs, "targets": batch[5]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Mean absolute error, and the explained share of the variance."""
    rest = tensors["outputs"] - batch[5]
    return {"mae": float(rest.abs().mean()), "r2": float(1 - rest.square().mean() / batch[5].var(correction=0))}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: molecules(n, seeded(seed, n)) for phase, n in (("train", 1500), ("val", 200))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return collate([data[phase][i] for i in chosen])

    optimize = lambda p: torch.optim.Adam(p, 3e-3)  # noqa: E731 - one line beside its program
    return Training(Molecules(**options), sample, forward, measure, optimize, lambda o: StepLR(o, 100, 0.4), steps=250)
