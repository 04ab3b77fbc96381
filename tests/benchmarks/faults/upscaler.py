"""Super-resolution of small pictures by two: residual blocks without normalisation, pixel shuffle, L1, Adam, halved rate."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from faults._training import Batch, Tensors, Training, seeded

SIDE, PATCH, SCALE, WIDTH, BLOCKS, ITEMS, BATCH = 32, 24, 2, 16, 4, 160, 8
MEAN = (0.5, 0.45, 0.4)


class MeanShift(nn.Module):
    """Takes the mean colour of all pictures off, or puts it back. Source: Lim et al. 2017, arXiv:1707.02921."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.register_buffer("shift", sign * torch.tensor(MEAN)[:, None, None])

    def forward(self, x):
        return x + self.shift


class ResidualBlock(nn.Module):
    def __init__(self, activation, scale: float) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.activation = activation()
        self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.conv2(self.activation(self.conv1(x)))


class Upsampler(nn.Sequential):
    """Four times as many channels, laid out as two by two pixels."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(WIDTH, WIDTH * SCALE**2, 3, padding=1), nn.PixelShuffle(SCALE))


class Upscaler(nn.Module):
    def __init__(self, activation=nn.ReLU, blocks: int = BLOCKS, scale: float = 0.5) -> None:
        super().__init__()
        self.centre = MeanShift(-1.0)
        self.head = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.body = nn.Sequential(*(ResidualBlock(activation, scale) for _ in range(blocks)))
        self.merge = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.upsample = Upsampler()
        self.tail = nn.Conv2d(WIDTH, 3, 3, padding=1)
        self.restore = MeanShift(1.0)

    def forward(self, low):
        """(batch, 3, side, side) from 0 to 1; the result is twice as large."""
        features = self.head(self.centre(low))
        features = features + self.merge(self.body(features))
        return self.restore(self.tail(self.upsample(features)))


def photos(n: int, seed: int) -> torch.Tensor:
    """Colour gradients, a sharp-edged ellipse and fine stripes behind a sharp edge, from 0 to 1."""
    made = seeded(71, seed)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, 1, 1, generator=made)

    grid = torch.linspace(-1, 1, SIDE)
    y, x = grid[:, None].expand(SIDE, SIDE), grid.expand(SIDE, SIDE)
    back = drawn(3) + (drawn(3) - 0.5) * x + (drawn(3) - 0.5) * y
    angle, place, width = math.pi * drawn(1), 1.6 * drawn(2) - 0.8, 0.3 + 0.4 * drawn(2)
    inside = ((x - place[:, :1]) / width[:, :1]).square() + ((y - place[:, 1:]) / width[:, 1:]).square() < 1
    turned = x * angle.cos() + y * angle.sin()
    stripes = drawn(3) * (0.5 + 0.5 * torch.sign(torch.sin((8 + 10 * drawn(1)) * turned + 6 * drawn(1))))
    picture = torch.where(turned > drawn(1) - 0.2, 0.4 * back + 0.6 * stripes, back)
    return torch.where(inside, 0.3 * picture + 0.7 * drawn(3), picture).clamp(0, 1)


def reduced(high: torch.Tensor) -> torch.Tensor:
    """Half the size, by the mean of two by two pixels."""
    return F.avg_pool2d(high, SCALE)


def patches(high: torch.Tensor, made: torch.Generator) -> torch.Tensor:
    """A random part of each picture, turned and mirrored at random."""
    cut = [SCALE * int(torch.randint((SIDE - PATCH) // SCALE + 1, (), generator=made)) for _ in range(2)]
    high = high[:, :, cut[0] : cut[0] + PATCH, cut[1] : cut[1] + PATCH]
    if torch.rand((), generator=made) < 0.5:
        high = high.flip(3)
    return high.rot90(int(torch.randint(4, (), generator=made)), (2, 3))


def result(outputs: torch.Tensor, batch: Batch, loss: torch.Tensor | None = None) -> Tensors:
    return {"loss": F.l1_loss(outputs, batch[1]) if loss is None else loss, "outputs": outputs, "targets": batch[1]}


def forward(model: nn.Module, batch: Batch) -> Tensors:
    return result(model(batch[0]), batch)


def psnr(outputs: torch.Tensor, high: torch.Tensor) -> float:
    """In dB, the mean over pictures."""
    error = (outputs.clamp(0, 1) - high).square().mean((1, 2, 3))
    return float((-10 * torch.log10(error + 1e-8)).mean())


def ssim(outputs: torch.Tensor, high: torch.Tensor) -> float:
    """Likeness of structure in windows of eight by eight, at most 1. Source: Wang et al. 2004."""
    mean, means = F.avg_pool2d(outputs, 8, 2), F.avg_pool2d(high, 8, 2)
    own = F.avg_pool2d(outputs.square(), 8, 2) - mean.square()
    theirs = F.avg_pool2d(high.square(), 8, 2) - means.square()
    both = F.avg_pool2d(outputs * high, 8, 2) - mean * means
    light = (2 * mean * means + 1e-4) / (mean.square() + means.square() + 1e-4)
    return float((light * (2 * both + 9e-4) / (own + theirs + 9e-4)).mean())


def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
    return {"psnr_db": psnr(tensors["outputs"], batch[1]), "ssim": ssim(tensors["outputs"], batch[1])}


def build(seed: int = 0, **options) -> Training:
    torch.manual_seed(seed)
    data = {"train": photos(ITEMS, seed), "val": photos(60, seed + 1000)}

    def sample(step: int, phase: str) -> Batch:
        made = seeded(seed, step, len(phase))
        high = data[phase][torch.randperm(len(data[phase]), generator=made)[:BATCH]]
        high = patches(high, made) if phase == "train" else high
        return reduced(high), high

    return Training(
        Upscaler(**options), sample, forward, measure, lambda p: torch.optim.Adam(p, 3e-3),
        schedule=lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [150, 200], 0.5), steps=250,
    )  # fmt: skip
