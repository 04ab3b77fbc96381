"""What is wrong with audio before a model hears it, or before it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stethoscope._record import Report
from stethoscope.audits import _audio_checks
from stethoscope.audits._audio_item import AudioItem, measure
from stethoscope.audits._waveforms import waveforms

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AudioReport(Report):
    """What was measured, item by item.

    Args:
        items: one per waveform.
        sample_rate: Hz, as declared.
    """

    items: tuple[AudioItem, ...] = ()
    sample_rate: int = 0


def audio(
    batch: Any,
    *,
    sample_rate: int,
    channels: int = 1,
    model_rate: int | None = None,
    references: Tensor | None = None,
    saving: bool = False,
    min_seconds: float = 0.025,
    max_seconds: float | None = None,
) -> AudioReport:
    """Examine waveforms that a model is to hear, or has made.

    **Decides** (thresholds in the findings' pages): NaN and Inf, samples on an integer scale, clipping (also
    after rescaling), silence, DC, wrong or merely declared sample rate, wrong channels and layouts, lengths,
    duplicates, references that do not add up to the mixture.
    **Cost:** host; copies the batch there; 0.15 s per minute of audio at 16 kHz, measured on one core.

    Args:
        batch: tensor or array of shape (time,), (batch, time), (batch, channels, time), or (channels, time) where channels is
            above 1; a path or a list of paths (needs soundfile, extra `audio`); or a list of arrays.
        sample_rate: Hz, of the model; a file's header is compared with it. For arrays nothing but the spectrum can tell.
        channels: that the model takes.
        model_rate: Hz, where the model's rate is not that of the arrays: a difference is then reported.
        references: (batch, sources, time) whose sum is to be the batch; noise must be among them.
        saving: the batch is output about to be saved: a peak above 1 would be clipped by integer formats.
        min_seconds: shortest useful item; default: one analysis window.
        max_seconds: longest item that the model can take; None for no limit.

    Returns:
        The report, `.items` with the measures of each waveform.

    Raises:
        ValueError: an empty batch, a shape that cannot be audio, a rate or number of channels below 1.
        TypeError: neither array nor path.
        ImportError: a path was given and soundfile is not installed.

    Examples:
        >>> import torch
        >>> tone = torch.sin(torch.arange(16000) * 0.3).repeat(2, 1) * torch.tensor([[0.5], [3.0]])
        >>> report = audio(tone.clamp(-1, 1)[1], sample_rate=16000)
        >>> [finding.code for finding in report.findings]
        ['audio-clipping']
    """
    if sample_rate < 1 or channels < 1:
        raise ValueError(f"Got sample_rate={sample_rate}, channels={channels}. Legal: 1 or more, sample_rate in Hz.")
    waves, findings = waveforms(batch, channels)
    items = tuple(measure(wave, sample_rate) for wave in waves)
    findings += _audio_checks.rates(waves, items, sample_rate, model_rate)
    findings += _audio_checks.levels(waves, items, saving=saving)
    findings += _audio_checks.lengths(items, min_seconds, max_seconds)
    known = channels > 1 or any(finding.code == "audio-channels" for finding in findings)
    alike = [] if known else _audio_checks.stereo_as_batch(waves, sample_rate)
    findings += alike or _audio_checks.duplicates(waves, items)
    if references is not None:
        findings += _audio_checks.sums(waves, references)
    levels = [item.level_db for item in items if not item.silent] or [item.level_db for item in items]
    return AudioReport(
        title=f"audio, {len(items)} items at {sample_rate} Hz",
        summary=f"level {min(levels):.1f} to {max(levels):.1f} dBFS, {min(i.seconds for i in items):.2f} to {max(i.seconds for i in items):.2f} s"
        if items
        else "",
        findings=tuple(findings),
        items=items,
        sample_rate=sample_rate,
    )
