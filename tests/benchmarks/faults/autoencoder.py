"""An autoencoder without normalisation: 24 numbers from a curved surface of four dimensions, tanh, Adam."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

WIDTH, LATENT, BATCH = 24, 4, 32


class Autoencoder(nn.Module):
    def __init__(self, activation=nn.Tanh, norm=None) -> None:
        super().__init__()
        self.encoder = mlp((WIDTH, 32, 16, LATENT), activation, norm)
        self.decoder = mlp((LATENT, 16, 32, WIDTH), activation, norm)

    def forward(self, x):
        return self.decoder(self.encoder(x))


def mlp(sizes: tuple[int, ...], activation, norm=None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), *([norm(outputs)] if norm else []), activation()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def points(n: int, generator: torch.Generator) -> torch.Tensor:
    made = seeded(17)
    first, second = torch.randn(LATENT, 16, generator=made), torch.randn(16, WIDTH, generator=made) / 2
    x = torch.tanh(torch.randn(n, LATENT, generator=generator) @ first / 2) @ second
    return x + 0.2 * torch.randn(n, WIDTH, generator=generator)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    outputs = model(batch[0])
    return {"loss": F.mse_loss(outputs, batch[0]), "outputs": outputs, "targets": batch[0]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    error = (tensors["outputs"] - batch[0]).square().mean() / batch[0].var()
    return {"explained": 1 - float(error)}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)

    def sample(step: int, phase: str) -> Batch:
        return (points(BATCH, seeded(seed, step, len(phase))),)

    return Training(Autoencoder(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 2e-3))
