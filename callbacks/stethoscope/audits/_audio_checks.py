"""What the measures of waveforms say: one function per question, each returns findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stethoscope._record import Finding
from stethoscope.audits import _signal
from stethoscope.audits._audio_item import INTEGER_PEAK, SILENT_DB, AudioItem
from stethoscope.audits._waveforms import Waveform, as_floats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from stethoscope._record import JSON, Severity

_CLIPPED = 1e-4
"""Share of samples: one in ten thousand, 1.6 per second at 16 kHz."""

_DC = 0.1
"""Of the rms: -20 dB. Sound cards stay below 1 %."""

_UNRELATED = 0.5
"""Correlation: independent recordings stay below 0.2, the channels of one are above 0.5 unless they are spaced apart."""

_SUM_DB = -30.0
"""Rounding to 16 bit leaves -60 dB and less between a mixture and the sum of its sources."""


def _found(
    code: str, severity: Severity, items: Sequence[AudioItem], total: int, text: str, advice: str, **evidence: JSON
) -> list[Finding]:
    """One finding for all items concerned."""
    if not items:
        return []
    names = ", ".join(item.name for item in items[:5]) + (", ..." if len(items) > 5 else "")
    return [
        Finding(
            code,
            severity,
            f"{len(items)} of {total} items (first: {names}) {text}",
            advice,
            evidence={"items": [item.name for item in items[:100]], **evidence},
        )
    ]


def levels(waves: Sequence[Waveform], items: Sequence[AudioItem], *, saving: bool) -> list[Finding]:
    def which(holds: Callable[[AudioItem], bool]) -> list[AudioItem]:
        return [item for item in items if holds(item)]

    total = len(items)
    broken, integer = which(lambda item: item.nonfinite > 0), which(lambda item: item.peak > INTEGER_PEAK)
    clipped, loud = which(lambda item: item.clipped >= _CLIPPED), which(lambda item: 1 < item.peak <= INTEGER_PEAK)
    silent = which(lambda item: item.silent and not item.nonfinite)
    offset = which(
        lambda item: not item.silent and item.seconds >= 0.1 and abs(item.dc) > _DC * 10 ** (item.level_db / 20)
    )
    kinds = sorted({wave.integer for wave in waves if wave.integer})
    typed = [item for wave, item in zip(waves, items, strict=True) if wave.integer]
    findings = _found(
        code="audio-nonfinite",
        severity="error",
        items=broken,
        total=total,
        text=f"hold NaN or Inf, the first one {broken[0].nonfinite if broken else 0} samples.",
        advice="Where a whole item is NaN, look for a division by its maximum: a silent one has maximum 0. Add a floor to the divisor.",
    )
    findings += _found(
        code="audio-scale",
        severity="error",
        items=typed or integer,
        total=total,
        text=f"are of type {', '.join(kinds)}."
        if typed
        else f"have samples up to {max((i.peak for i in integer), default=0):.0f}: the scale of 16-bit integers.",
        advice="Convert to float and divide by the full scale (32768 for int16): models take samples in [-1, 1].",
    )
    findings += _found(
        code="audio-clipping",
        severity="warning",
        items=clipped,
        total=total,
        text=f"are clipped, up to {max((i.clipped for i in clipped), default=0):.2%} of their samples.",
        advice="Lower the gain before the conversion or mixing that cuts them off; scaling down afterwards keeps the flat tops. Leave such items out of the references.",
        clipped=[item.clipped for item in clipped[:100]],
    )
    findings += _found(
        code="audio-peak",
        severity="warning" if saving else "info",
        items=loud,
        total=total,
        text=f"exceed full scale, up to a peak of {max((i.peak for i in loud), default=0):.2f}.",
        advice="Scale all sources of an item by one common factor before saving as integers, or save as float."
        if saving
        else "Fine for inputs normalised by their rms.",
        peaks=[item.peak for item in loud[:100]],
    )
    findings += _found(
        code="audio-silent",
        severity="warning",
        items=silent,
        total=total,
        text=f"are silent: a channel below {SILENT_DB:g} dBFS.",
        advice="Check the paths, the segment's offset and the mask; leave silent references out of SI-SDR, which has no value for them.",
    )
    findings += _found(
        code="audio-dc",
        severity="warning",
        items=offset,
        total=total,
        text=f"have a mean of more than {_DC:g} of their rms, up to {max((i.dc for i in offset), key=abs, default=0):.3g}.",
        advice="Subtract the mean, or high-pass at 20 Hz; unsigned samples read as signed ones look like this.",
    )
    return findings


def rates(
    waves: Sequence[Waveform], items: Sequence[AudioItem], sample_rate: int, model_rate: int | None
) -> list[Finding]:
    other = [item for wave, item in zip(waves, items, strict=True) if wave.sample_rate not in (None, sample_rate)]
    rates = sorted({wave.sample_rate for wave in waves if wave.sample_rate not in (None, sample_rate)}, key=str)
    upsampled = [item for item in items if item.upsampled_from is not None and item not in other]
    sources = sorted({item.upsampled_from for item in upsampled if item.upsampled_from})
    found = _found(
        code="audio-rate",
        severity="error",
        items=other,
        total=len(items),
        text=f"have a sample rate of {', '.join(map(str, rates))} Hz by their header, the model takes {sample_rate} Hz.",
        advice="Resample them: all pitches and durations are off by the ratio of the rates.",
        rates=rates,
    )
    if model_rate not in (None, sample_rate):
        found += _found(
            code="audio-rate",
            severity="error",
            items=items,
            total=len(items),
            text=f"are sampled at {sample_rate} Hz, the model takes {model_rate} Hz.",
            advice="Resample them: all pitches and durations are off by the ratio of the rates.",
            rates=[sample_rate],
        )
    # one band-limited recording among many is a recording; most of them are a pipeline
    if 2 * len(upsampled) > len(items):
        found += _found(
            code="audio-rate",
            severity="warning",
            items=upsampled,
            total=len(items),
            text=f"hold nothing above {sources[0] / 2:g} Hz: upsampled from {', '.join(map(str, sources))} Hz to {sample_rate} Hz.",
            advice="Use the original rate, or full-band data: a model trained on full-band audio misses the upper half, one trained on this learns its absence.",
            upsampled_from=sources,
        )
    return found


def lengths(items: Sequence[AudioItem], shortest: float, longest: float | None) -> list[Finding]:
    short = [item for item in items if item.seconds < shortest]
    long = [item for item in items if longest is not None and item.seconds > longest]
    return [
        *_found(
            code="audio-length",
            severity="warning",
            items=short,
            total=len(items),
            text=f"are shorter than {shortest:g} s, the first one {short[0].seconds if short else 0:.4f} s.",
            advice="Leave them out or pad them; check that time is the last axis.",
        ),
        *_found(
            code="audio-length",
            severity="warning",
            items=long,
            total=len(items),
            text=f"are longer than {longest} s, up to {max((i.seconds for i in long), default=0):.1f} s.",
            advice="Cut them into segments; memory grows with length, with attention by its square.",
        ),
    ]


def stereo_as_batch(waves: Sequence[Waveform], sample_rate: int) -> list[Finding]:
    """(2, time) handed to a mono model is a batch of two by its shape alone."""
    if len(waves) != 2 or waves[0].samples.shape != waves[1].samples.shape or waves[0].sample_rate is not None:
        return []
    first, second = (torch.nan_to_num(wave.samples[0]) for wave in waves)
    alike = _signal.correlation(first, second, sample_rate // 500)
    if alike <= _UNRELATED:
        return []
    return [
        Finding(
            "audio-channels",
            "warning",
            f"The two items of the batch have correlation {alike:.2f}: two channels of one recording, taken as a batch of two.",
            "Give (1, 2, time) or average the channels. If these are two items on purpose (two views of one), ignore this.",
            evidence={"correlation": alike},
        )
    ]


def duplicates(waves: Sequence[Waveform], items: Sequence[AudioItem]) -> list[Finding]:
    seen: dict[tuple[float, float], list[int]] = {}
    twice = []
    for index, (wave, item) in enumerate(zip(waves, items, strict=True)):
        if item.silent or item.nonfinite:
            continue
        same = seen.setdefault((item.level_db, item.peak), [])
        if any(torch.equal(waves[other].samples, wave.samples) for other in same):
            twice.append(item)
        same.append(index)
    return _found(
        code="audio-duplicate",
        severity="warning",
        items=twice,
        total=len(items),
        text="repeat an earlier item sample by sample.",
        advice="Check the sampler and the seeding of workers: each needs its own (worker_init_fn).",
    )


def sums(waves: Sequence[Waveform], references: Tensor) -> list[Finding]:
    mixtures = (
        torch.stack([wave.samples.mean(0).nan_to_num(0.0, 0.0, 0.0) for wave in waves])
        if len({w.samples.shape for w in waves}) == 1
        else None
    )
    given = as_floats(references.detach().cpu())[0]
    totals = given.sum(1) if given.dim() == 3 else given
    if mixtures is None or totals.shape != mixtures.shape:
        shape = None if mixtures is None else list(mixtures.shape)
        raise ValueError(
            f"references have shape {list(given.shape)}. Legal: (batch, sources, time) for a mixture of {shape}."
        )
    totals = totals.to(mixtures.dtype)
    broken = int(totals.numel() - totals.isfinite().sum())
    if broken:
        return [
            Finding(
                "audio-nonfinite",
                "error",
                f"The references hold NaN or Inf: their sum does at {broken} samples.",
                "Where a whole source is NaN, look for a division by its maximum: a silent one has maximum 0.",
                evidence={"nonfinite": broken},
            )
        ]
    residual = [
        _signal.decibel(float((m - t).norm()) / max(float(m.norm()), 1e-20))
        for m, t in zip(mixtures, totals, strict=True)
    ]
    worst = max(range(len(residual)), key=residual.__getitem__)
    if residual[worst] <= _SUM_DB:
        return []
    mixture, total = mixtures[worst], totals[worst]
    gain = float(mixture @ total) / max(float(total @ total), 1e-20)
    scaled = _signal.decibel(float((mixture - gain * total).norm()) / max(float(mixture.norm()), 1e-20))
    hint = (
        f" With the references times {gain:.3g} it is {scaled:.0f} dB: a factor was applied to one side only."
        if scaled <= _SUM_DB
        else ""
    )
    return [
        Finding(
            "audio-mixture",
            "warning",
            f"The references do not add up to the mixture: item {waves[worst].name} leaves {residual[worst]:.1f} dB of it.{hint}",
            "Apply gains, filters and cuts to mixture and references alike. A noisy mixture needs its noise among the references here.",
            evidence={"residual_db": residual[:100], "gain": gain},
        )
    ]
