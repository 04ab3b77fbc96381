"""A variational autoencoder of small made-up pictures: strided convolutions, BatchNorm, a warm-up of the divergence, Adam."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SIDE, LATENT, BATCH, ITEMS, WARM_UP = 16, 6, 32, 2000, 100


class Encoder(nn.Module):
    """From pictures to the mean and the logarithm of the variance of what may have caused them."""

    def __init__(self, norm, activation, width: int) -> None:
        super().__init__()
        self.layer1 = stage(nn.Conv2d(1, width, 3, 2, 1), norm(width), activation())
        self.layer2 = stage(nn.Conv2d(width, 2 * width, 3, 2, 1), norm(2 * width), activation())
        self.mean = nn.Linear(2 * width * 16, LATENT)
        self.log_variance = nn.Linear(2 * width * 16, LATENT)

    def forward(self, x):
        x = self.layer2(self.layer1(x)).flatten(1)
        return self.mean(x), self.log_variance(x)


class Decoder(nn.Module):
    """From a code to the logits of pixels."""

    def __init__(self, norm, activation, width: int) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(LATENT, 2 * width * 16)
        self.activation = activation()
        self.layer1 = stage(nn.ConvTranspose2d(2 * width, width, 4, 2, 1), norm(width), activation())
        self.layer2 = stage(nn.ConvTranspose2d(width, width, 4, 2, 1), norm(width), activation())
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, code):
        x = self.activation(self.start(code)).unflatten(1, (2 * self.width, 4, 4))
        return self.head(self.layer2(self.layer1(x)))


class Generator(nn.Module):
    """Both of them, with a code drawn in training; `beta` is the weight of the divergence."""

    def __init__(self, norm=nn.BatchNorm2d, activation=nn.ReLU, width: int = 12) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(norm, activation, width), Decoder(norm, activation, width)
        self.beta = 1.0

    def draw(self, mean, log_variance):
        return mean + torch.randn_like(mean) * (0.5 * log_variance).exp() if self.training else mean

    def forward(self, x):
        mean, log_variance = self.encoder(x)
        return self.decoder(self.draw(mean, log_variance)), mean, log_variance


def stage(conv: nn.Module, norm: nn.Module, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=conv, norm=norm, activation=activation))


def pictures(n: int, generator: torch.Generator) -> torch.Tensor:
    """A soft disc and a bar, of any place, size and brightness, on black; values from 0 to 1."""
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    u = torch.rand(8, n, 1, 1, generator=generator)
    distance = ((rows - 4 - 8 * u[0]).square() + (columns - 4 - 8 * u[1]).square()).sqrt()
    disc = (0.5 + 0.5 * u[2]) * torch.sigmoid(3 * (2 + 2 * u[3] - distance))
    bar = (0.4 + 0.4 * u[4]) * torch.sigmoid(4 * (1.2 - (rows - 2 - 12 * u[5]).abs()))
    return torch.maximum(disc, bar)[:, None]


def divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """From the standard normal distribution, in nats, of each item."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)


def forward(model: nn.Module, batch: Batch) -> Tensors:
    logits, mean, log_variance = model(batch[0])
    rebuilt = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="none").sum((1, 2, 3)).mean()
    apart = divergence(mean, log_variance).mean()
    outputs = logits.sigmoid()
    return {"loss": rebuilt + model.beta * apart, "divergence": apart, "outputs": outputs, "targets": batch[0]}


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    """Explained share of the variance of pixels, and the divergence."""
    rest = (tensors["outputs"] - batch[0]).square().mean() / (batch[0] - batch[0].mean(0)).square().mean()
    return {"explained": 1 - float(rest), "divergence": float(tensors["divergence"])}


def warm_up(t: Training, step: int) -> None:
    """The divergence counts more and more in the first steps, so that codes come to mean something."""
    t.model.beta = min(1.0, step / WARM_UP)


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {phase: pictures(n, seeded(seed, n)) for phase, n in (("train", ITEMS), ("val", 200))}

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase]), (BATCH,), generator=seeded(seed, step, len(phase)))
        return (data[phase][chosen],)

    optimize = lambda p: torch.optim.Adam(p, 3e-3)  # noqa: E731 - one line beside its program
    return Training(Generator(**options), sample, forward, measure, optimize, steps=250, before=[warm_up])
