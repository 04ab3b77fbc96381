"""A surrogate of a flow: Fourier features of coordinates, layers that parameters scale and shift, three fields, Adam, decay."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

from faults._training import Batch, Tensors, Training, seeded

COORDINATES, PARAMETERS, WIDTH, WAVES, BATCH, CASES, POINTS = 2, 3, 48, 16, 128, 60, 100
FIELDS = {"temperature": (314.0, 20.0), "pressure": (101_340.0, 216.0), "speed": (0.0099, 0.0064)}
"""K, Pa and m/s: what is subtracted and divided by, so that the targets have mean 0 and deviation 1."""


class Waves(nn.Module):
    """Sines and cosines of fixed random directions. Tancik et al. 2020, arXiv:2006.10739."""

    def __init__(self, scale: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("directions", scale * torch.randn(COORDINATES, WAVES))

    def forward(self, place):
        angles = 2 * math.pi * place @ self.directions
        return torch.cat([angles.sin(), angles.cos(), place], -1)


class Layer(nn.Module):
    """A linear layer, scaled and shifted by what the parameters of the case say."""

    def __init__(self, inputs: int, activation) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH)
        self.film = nn.Linear(WIDTH, 2 * WIDTH)
        self.activation = activation()

    def forward(self, x, case):
        scale, shift = self.film(case).chunk(2, -1)
        return self.activation(self.linear(x) * (1 + scale) + shift)


class Surrogate(nn.Module):
    def __init__(self, activation=nn.SiLU, layers: int = 3, dropout: float = 0.0, fields: int = len(FIELDS)) -> None:
        super().__init__()
        self.waves = Waves()
        self.case = nn.Sequential(nn.Linear(PARAMETERS, WIDTH), activation(), nn.Linear(WIDTH, WIDTH))
        sizes = [2 * WAVES + COORDINATES, *[WIDTH] * (layers - 1)]
        self.layers = nn.ModuleList(Layer(size, activation) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, fields)

    def forward(self, inputs):
        case, x = self.case(inputs[:, COORDINATES:]), self.waves(inputs[:, :COORDINATES])
        for layer in self.layers:
            x = layer(x, case)
        return self.head(self.dropout(x))


def solve(place: torch.Tensor, case: torch.Tensor) -> torch.Tensor:
    """(points, fields) in their units: a heated channel; case: where the heater is, its power, the conductivity."""
    x, y = place.unbind(-1)
    heater, power, conductivity = case.unbind(-1)
    distance = (x - heater).square() + (y - 0.4).square()
    heat = 90 * power / (0.5 + conductivity) * torch.exp(-distance / (0.03 + 0.05 * conductivity))
    temperature = 300 + heat + 12 * conductivity * torch.sin(5 * x) * torch.cos(4 * y)
    pressure = (
        101_325 + 380 * power * torch.cos(6 * (x - heater)) * torch.exp(-y) + 160 * conductivity * torch.sin(7 * y)
    )
    speed = 0.05 * power * y * (1 - y) * (1 + 0.6 * torch.sin(6 * x + 4 * heater)) + 0.004 * conductivity * x
    return torch.stack([temperature, pressure, speed], -1)


def cases(n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulations (n, POINTS, coordinates and parameters) and their fields in units."""
    place = torch.rand(n, POINTS, COORDINATES, generator=generator)
    low, high = torch.tensor([0.2, 0.4, 0.3]), torch.tensor([0.8, 1.6, 1.5])
    case = (low + (high - low) * torch.rand(n, 1, PARAMETERS, generator=generator)).expand(-1, POINTS, -1)
    noise = 0.02 * torch.randn(n, POINTS, len(FIELDS), generator=generator)
    fields = solve(place, case) + noise * scales()[1]
    return torch.cat([2 * place - 1, (case - (low + high) / 2) / ((high - low) / 3.4641)], -1), fields


def scales() -> tuple[torch.Tensor, torch.Tensor]:
    """What is subtracted from fields, and what they are divided by."""
    return torch.tensor([mean for mean, _ in FIELDS.values()]), torch.tensor([size for _, size in FIELDS.values()])


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(batch[0])
    return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Mean absolute errors in units, and the explained share of the variance."""
    rest = tensors["outputs"] - batch[1]
    errors = rest.abs().mean(0) * scales()[1]
    explained = 1 - rest.square().mean() / (batch[1] - batch[1].mean(0)).square().mean()
    return {**{f"{name}_mae": float(error) for name, error in zip(FIELDS, errors, strict=True)}, "r2": float(explained)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: cases(n, seeded(seed, n)) for phase, n in (("train", CASES), ("val", 12))}
    mean, size = scales()

    def sample(step: int, phase: str) -> Batch:
        inputs, fields = (part.flatten(0, 1) for part in data[phase])
        chosen = torch.randperm(len(inputs), generator=seeded(seed, step, len(phase)))[:BATCH]
        return inputs[chosen], (fields[chosen] - mean) / size

    optimize = lambda p: torch.optim.Adam(p, 5e-3)  # noqa: E731 - as in other programs
    return Training(Surrogate(**options), sample, forward, measure, optimize, lambda o: ExponentialLR(o, 0.992))
