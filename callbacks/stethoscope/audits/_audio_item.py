"""The measures of one waveform."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from stethoscope.audits import _signal

if TYPE_CHECKING:
    from stethoscope.audits._waveforms import Waveform

INTEGER_PEAK = 100.0
"""No normalised waveform reaches it: the crest factor of speech and music is below 40 dB. int16 exceeds it."""

SILENT_DB = -80.0
"""Root mean square of 3 steps of 16 bit."""


class AudioItem(NamedTuple):
    """What was measured on one waveform, over all its channels.

    Args:
        name: index in the batch, or file name.
        channels: number of channels.
        seconds: length.
        level_db: root mean square in dB re full scale (a full-scale sine has -3.0).
        peak: largest absolute sample, 1 is full scale.
        clipped: share of samples that are cut off, in [0, 1].
        dc: mean, 1 is full scale.
        silent: whether a channel is below -80 dB.
        bandwidth_hz: highest frequency within 60 dB of the strongest; None when too short (2048 samples) or silent.
        upsampled_from: lower rate at half of which the spectrum breaks off, Hz; None if it does not.
        nonfinite: number of NaN and Inf samples; they count as 0 elsewhere.
    """

    name: str
    channels: int
    seconds: float
    level_db: float
    peak: float
    clipped: float
    dc: float
    silent: bool
    bandwidth_hz: float | None
    upsampled_from: int | None
    nonfinite: int


def measure(wave: Waveform, sample_rate: int) -> AudioItem:
    """Measure one waveform; `sample_rate` in Hz counts where it has none of its own."""
    raw = wave.samples
    x = torch.nan_to_num(raw, nan=0.0, posinf=0.0, neginf=0.0)
    peak = float(x.abs().max())
    scale = 32768.0 if peak > INTEGER_PEAK else 1.0
    x = x / scale
    rms = [float(channel.norm()) / channel.numel() ** 0.5 for channel in x]
    level = _signal.decibel((sum(value**2 for value in rms) / len(rms)) ** 0.5)
    silent = min(map(_signal.decibel, rms)) < SILENT_DB
    # a few steps of 16 bit have flat tops by themselves
    clipped = sum(_signal.clipped(channel) for channel in x if float(channel.abs().max()) > 64 / 32768)
    rate = wave.sample_rate or sample_rate
    power = _signal.spectrum(x.mean(0)) if level >= SILENT_DB else None
    return AudioItem(
        name=wave.name,
        channels=x.shape[0],
        seconds=x.shape[1] / rate,
        level_db=level,
        peak=peak,
        clipped=clipped / x.numel(),
        dc=max((float(channel.mean()) for channel in x), key=abs),
        silent=silent,
        bandwidth_hz=None if power is None else _signal.bandwidth(power, rate),
        upsampled_from=None if power is None else _signal.upsampled_from(power, rate),
        nonfinite=int(raw.numel() - raw.isfinite().sum()),
    )
