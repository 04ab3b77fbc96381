"""The demo's network: a small Conv-TasNet (Luo and Mesgarani 2019, arXiv:1809.07454), and its loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrameNorm(nn.Module):
    """Normalises each frame over its channels: mean 0, variance 1, then a gain and a bias per channel.

    Args:
        channels: of the input `(batch, channels, frames)`.
        eps: added to the variance; 0 divides a silent frame by zero.

    `over` is what mean and variance are taken over: (1,), the channels; with (1, 2) they would be of the whole recording.
    """

    def __init__(self, channels: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1))
        self.eps = eps
        self.over: tuple[int, ...] = (1,)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape."""
        centred = x - x.mean(self.over, keepdim=True)
        variance = centred.square().mean(self.over, keepdim=True)
        return self.gain * centred / (variance + self.eps).sqrt() + self.bias


class Block(nn.Module):
    """Adds what a dilated convolution sees around each frame."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, 3, padding=dilation, dilation=dilation)
        self.act = nn.PReLU()
        self.norm = FrameNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape, `(batch, channels, frames)`."""
        out: Tensor = x + self.norm(self.act(self.conv(x)))
        return out


class Masker(nn.Module):
    """Says how much of each encoded value belongs to each talker, in [0, 1]."""

    def __init__(self, filters: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.norm = FrameNorm(filters)
        self.blocks = nn.Sequential(*(Block(filters, dilation) for dilation in dilations))
        self.mask = nn.Conv1d(filters, 2 * filters, 1)

    def forward(self, encoded: Tensor) -> Tensor:
        """Return masks, `(batch, 2, filters, frames)`."""
        masks: Tensor = self.mask(self.blocks(self.norm(encoded))).sigmoid()
        batch, filters, frames = encoded.shape
        return masks.view(batch, 2, filters, frames)


class Separator(nn.Module):
    """Learned encoder, masker, decoder: mixtures `(batch, samples)` to talkers `(batch, 2, samples)`.

    The number of samples is a multiple of the hop, 8 samples or 1 ms. Looks `lookahead` samples ahead, 123 ms.
    """

    def __init__(self, filters: int = 64, dilations: tuple[int, ...] = (1, 3, 9, 27, 81)) -> None:
        super().__init__()
        self.lookahead = 8 * sum(dilations) + 15
        self.encoder = nn.Sequential(nn.Conv1d(1, filters, 16, 8, padding=8, bias=False), nn.ReLU())
        self.masker = Masker(filters, dilations)
        self.decoder = nn.ConvTranspose1d(filters, 1, 16, 8, padding=8, bias=False)

    def forward(self, mixture: Tensor) -> Tensor:
        """Return the talkers, in any order."""
        encoded = self.encoder(mixture[:, None])
        masked = self.masker(encoded) * encoded[:, None]
        talkers: Tensor = self.decoder(masked.flatten(0, 1))
        return talkers.view(len(mixture), 2, -1)


def si_sdr_db(estimate: Tensor, reference: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB over the last axis (Le Roux et al. 2019, arXiv:1811.02508)."""
    estimate = estimate - estimate.mean(-1, keepdim=True)
    reference = reference - reference.mean(-1, keepdim=True)
    eps = torch.finfo(estimate.dtype).eps
    scale = (estimate * reference).sum(-1, keepdim=True) / (reference.square().sum(-1, keepdim=True) + eps)
    target = scale * reference
    noise = estimate - target
    return 10 * ((target.square().sum(-1) + eps) / (noise.square().sum(-1) + eps)).log10()


def pit_loss(estimates: Tensor, sources: Tensor) -> Tensor:
    """Negative SI-SDR in dB, each item in its better order of two talkers (PIT, Yu et al. 2017, arXiv:1607.00325).

    Args:
        estimates: `(batch, 2, samples)`.
        sources: `(batch, 2, samples)`.

    Returns:
        0-d; on the device.
    """
    straight = si_sdr_db(estimates, sources).mean(-1)
    swapped = si_sdr_db(estimates, sources.flip(1)).mean(-1)
    return -torch.maximum(straight, swapped).mean()
