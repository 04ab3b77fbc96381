"""Measures of one waveform, a tensor of shape (time,), or of its power spectrum. Tensor in, numbers out; host."""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_FFT = 1024
_FRAMES = 400
_FLOOR_DB = -400.0


def decibel(ratio: float) -> float:
    """20 log10 of an amplitude ratio; -400 for zero."""
    return 20 * math.log10(ratio) if ratio > 1e-20 else _FLOOR_DB


def clipped(x: Tensor) -> int:
    """Number of samples cut off at the waveform's own highest or lowest value, so also after rescaling.

    On each side samples count if at least 8 of them, and 5 times as many as at the next lower value, share the extreme (noise
    and speech meet their extreme once or twice; a test tone meets it at equal distances, which do not count); or if they form runs of 3 and more, entered and left by a jump of at
    least 1 % of the peak and of 5 steps of the amplitude there (the crest of a quantised low tone is reached gradually).
    """
    peak = float(x.abs().max())
    total = 0
    for side in (x, -x):
        top = float(side.max())
        if top < 0.1 * peak or top <= 0:
            continue
        at = side >= top * (1 - 1e-5)
        below = side[~at]
        if below.numel() == 0:
            continue
        following = float(below.max())
        number = int(at.sum())
        beneath = int((below >= following - 1e-5 * top).sum())
        if number >= 8 and number >= 5 * beneath and not _periodic(at):
            total += number
        else:
            jump = max(0.01 * top, min(5 * (top - following), 0.1 * top))
            total += _in_sharp_runs(side, at, top - jump)
    return total


def _periodic(at: Tensor) -> bool:
    """Single samples at one distance, or at two that take turns, as a tone has that divides the rate."""
    gaps = at.nonzero().flatten().diff()
    return bool(gaps.min() > 1) and len(set(gaps.tolist())) <= 2


def _in_sharp_runs(side: Tensor, at: Tensor, edge: float) -> int:
    """Samples in runs of at least three whose neighbours on both sides are at or below the edge."""
    padded = torch.nn.functional.pad(at.to(torch.int8), (1, 1))
    change = padded.diff()
    starts, ends = (change == 1).nonzero().flatten(), (change == -1).nonzero().flatten()
    before = side[(starts - 1).clamp(min=0)]
    after = side[ends.clamp(max=side.numel() - 1)]
    sharp = (ends - starts >= 3) & ((before <= edge) | (starts == 0)) & ((after <= edge) | (ends == side.numel()))
    return int((ends - starts)[sharp].sum())


def spectrum(x: Tensor) -> Tensor | None:
    """Mean power per frequency bin, `_FFT // 2 + 1` of them from 0 to half the rate; None for less than two windows."""
    if x.numel() < 2 * _FFT:
        return None
    frames = x.unfold(0, _FFT, _FFT // 2)
    frames = frames[:: max(1, frames.shape[0] // _FRAMES)] * torch.signal.windows.nuttall(_FFT, dtype=x.dtype)
    power: Tensor = torch.fft.rfft(frames).abs().square().mean(0)
    return power


def bandwidth(power: Tensor, sample_rate: int) -> float:
    """Highest frequency, in Hz, with power within 60 dB of the strongest bin."""
    bins = (power >= 1e-6 * power.max()).nonzero()
    return float(bins.max()) * sample_rate / 2 / (power.numel() - 1) if bins.numel() else 0.0


def upsampled_from(power: Tensor, sample_rate: int) -> int | None:
    """The lower standard rate at half of which the spectrum breaks off; None if it does not.

    Medians over bins, and a window without skirts, so that single tones do not count: from 0.6 to 0.85 of the edge against all above 1.08 of it. A
    resampler leaves 30 dB and more between them, speech and music 5 to 20 dB. The band below the edge must itself be
    within 60 dB of the strongest bin.
    """
    hertz = torch.linspace(0, sample_rate / 2, power.numel())
    strongest = float(power.max())
    for rate in RATES:
        edge = rate / 2
        above = power[hertz >= 1.08 * edge]
        beside = power[(hertz >= 1.08 * edge) & (hertz <= 1.3 * edge)]
        below = power[(hertz >= 0.6 * edge) & (hertz <= 0.85 * edge)]
        if rate >= 0.95 * sample_rate or beside.numel() < 4 or above.numel() < 8 or below.numel() < 16:
            continue
        level = float(below.median())
        # every part of what is above is empty, not only most of it
        loudest = max(float(part.median()) for part in (beside, *above.chunk(4)))
        if level >= 1e-6 * strongest and loudest <= 1e-3 * level:
            return rate
    return None


def correlation(first: Tensor, second: Tensor, most: int) -> float:
    """Largest absolute correlation coefficient over shifts of up to `most` samples."""
    first, second = first - first.mean(), second - second.mean()
    size = 2 * first.numel()
    product = torch.fft.rfft(first, size) * torch.fft.rfft(second, size).conj()
    shifts = torch.fft.irfft(product, size)
    norm = float(first.norm() * second.norm())
    near = torch.cat([shifts[: most + 1], shifts[-most:] if most else shifts[:0]])
    return float(near.abs().max()) / norm if norm > 0 else 0.0
