"""Synthetic talkers for the demo: harmonic voices with moving pitch, formants and syllables. Nothing is downloaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate

SAMPLE_RATE = 8000
_FRAME_RATE = 100
"""Frames per second in which pitch, formants and syllables are drawn."""
_LOW, _HIGH = (85.0, 140.0), (175.0, 270.0)
"""Pitch ranges in Hz of the two kinds of talkers, roughly those of male and female adults."""
_FORMANTS = ((300.0, 800.0), (900.0, 2200.0), (2300.0, 3200.0))
_BANDWIDTHS = (80.0, 120.0, 180.0)
_NOISE = 3e-3
"""Rms of the recording noise beside a voice of rms 1, -50 dB: a recording is never exactly zero."""


class Batch(NamedTuple):
    """Mixtures `(batch, samples)` and the talkers in them `(batch, 2, samples)`; a mixture is the sum of its talkers."""

    mixture: Tensor
    sources: Tensor


@dataclass(frozen=True)
class Talkers:
    """Recordings of both kinds, `(count, samples)` each, from which batches are mixed."""

    low: Tensor
    high: Tensor

    @classmethod
    def record(cls, count: int, seconds: float, generator: torch.Generator) -> Talkers:
        """Synthesise `count` recordings of each kind."""
        return cls(_voices(count, seconds, _LOW, generator), _voices(count, seconds, _HIGH, generator))

    def mix(self, batch: int, seconds: float, generator: torch.Generator) -> Batch:
        """Mix random excerpts of a low and a high voice, in random order, levels within 5 dB of each other."""
        length = int(seconds * SAMPLE_RATE)
        pairs = [
            torch.stack([_excerpt(self.low, length, generator), _excerpt(self.high, length, generator)])
            for _ in range(batch)
        ]
        sources = torch.stack(pairs)
        level_db = torch.empty(batch, 2, 1).uniform_(-2.5, 2.5, generator=generator)
        sources = sources * 10 ** (level_db / 20)
        swap = torch.rand(batch, 1, 1, generator=generator) < 0.5
        sources = torch.where(swap, sources.flip(1), sources)
        return Batch(sources.sum(1), sources)


def _excerpt(recordings: Tensor, length: int, generator: torch.Generator) -> Tensor:
    which = int(torch.randint(len(recordings), (), generator=generator))
    start = int(torch.randint(recordings.shape[-1] - length + 1, (), generator=generator))
    return recordings[which, start : start + length]


def _voices(count: int, seconds: float, pitch_hz: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Return voices of rms 1, shape `(count, seconds * SAMPLE_RATE)`."""
    frames, samples = int(seconds * _FRAME_RATE), int(seconds * SAMPLE_RATE)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(low, high, generator=generator)

    time = torch.arange(frames) / _FRAME_RATE
    base = uniform(*pitch_hz, count, 1)
    melody = (2 * math.pi * (uniform(0.4, 1.5, count, 1) * time + uniform(0, 1, count, 1))).sin()
    pitch = base * (1 + uniform(0.05, 0.15, count, 1) * melody)

    # every syllable has a loudness and formants of its own
    syllable = (uniform(3, 5, count, 1) * time + uniform(0, 1, count, 1)).floor().long()
    phase_in_syllable = uniform(3, 5, count, 1) * time
    kinds = int(syllable.max()) + 1
    loudness = uniform(0.3, 1, count, kinds) * (uniform(0, 1, count, kinds) > 0.15)
    envelope = loudness.gather(1, syllable) * (0.6 - 0.4 * (2 * math.pi * phase_in_syllable).cos())

    harmonics = torch.arange(1, int(SAMPLE_RATE / 2 / pitch_hz[0]) + 1)
    frequency = pitch[:, None] * harmonics[:, None]  # (count, harmonics, frames)
    response = torch.zeros_like(frequency)
    for (lowest, highest), bandwidth in zip(_FORMANTS, _BANDWIDTHS, strict=True):
        centre = uniform(lowest, highest, count, kinds).gather(1, syllable)[:, None]
        response += 1 / (1 + ((frequency - centre) / bandwidth).square())
    # harmonics above the Nyquist frequency would come back as lower ones
    amplitude = response / harmonics[:, None].sqrt() * envelope[:, None] * (frequency < 0.95 * SAMPLE_RATE / 2)

    phase = 2 * math.pi * (_at_audio_rate(pitch[:, None], samples) / SAMPLE_RATE).cumsum(-1)  # (count, 1, samples)
    voice = torch.zeros(count, samples)
    for harmonic in range(len(harmonics)):  # one at a time: all together would need a gigabyte
        voice += (phase[:, 0] * (harmonic + 1)).sin() * _at_audio_rate(amplitude[:, harmonic, None], samples)[:, 0]
    voice /= voice.square().mean(-1, keepdim=True).sqrt()
    return voice + _NOISE * torch.randn(count, samples, generator=generator)


def _at_audio_rate(frames: Tensor, samples: int) -> Tensor:
    return interpolate(frames, size=samples, mode="linear", align_corners=False)
