"""Turns what people hand over as audio (arrays, files, lists) into waveforms of shape (channels, time)."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stethoscope._record import Finding

if TYPE_CHECKING:
    import numpy as np

_MOST_CHANNELS = 8


class Waveform(NamedTuple):
    """One item.

    Args:
        name: index in the batch, or file name.
        samples: (channels, time), floating point; integers are divided by their full scale.
        sample_rate: from the file's header, None for an array.
        integer: name of the integer type that was given, `""` for floating point.
    """

    name: str
    samples: Tensor
    sample_rate: int | None = None
    integer: str = ""


def waveforms(batch: Any, channels: int) -> tuple[list[Waveform], list[Finding]]:
    """Split a batch into items; findings say where its layout is not what the model expects.

    Raises:
        TypeError: neither array nor path.
        ValueError: empty, or of a shape that cannot be audio.
        FileNotFoundError: no such file.
    """
    if isinstance(batch, (str, pathlib.Path)):
        return _read([pathlib.Path(batch)], channels)
    if isinstance(batch, Sequence) and batch and all(isinstance(item, (str, pathlib.Path)) for item in batch):
        return _read([pathlib.Path(item) for item in batch], channels)
    if isinstance(batch, Sequence):
        items: list[Waveform] = []
        findings: list[Finding] = []
        for index, item in enumerate(batch):
            found, notes = waveforms(item, channels)
            items += [one._replace(name=f"{index}/{one.name}" if len(found) > 1 else str(index)) for one in found]
            findings += notes[: 1 if not findings else 0]  # the first one speaks for all
        if not items:
            raise ValueError("The batch is empty: an empty list. Give at least one waveform.")
        return items, findings
    return _split(_tensor(batch), channels)


def _tensor(array: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(array, torch.Tensor):
        return array.detach() if array.is_meta else array.detach().cpu()
    if hasattr(array, "__array_interface__"):
        # a copy: no negative strides, no foreign byte order, writable
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    raise TypeError(f"Audio is a tensor, an array, a path or a list of them, not {type(array).__name__}.")


def as_floats(x: Tensor) -> tuple[Tensor, str]:
    """Floating-point samples, integers divided by their full scale; and the name of the integer type, if it was one."""
    if x.is_complex() or x.dtype == torch.bool:
        raise TypeError(
            f"Audio has real samples, not {x.dtype}. Spectrograms are no waveforms: give what goes into the STFT."
        )
    if x.is_floating_point():
        return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32), ""
    if x.dtype == torch.uint8:
        return (x.float() - 128) / 128, "uint8"
    return (x.double() / (torch.iinfo(x.dtype).max + 1)).float(), str(x.dtype).removeprefix("torch.")


def _split(array: Tensor, channels: int) -> tuple[list[Waveform], list[Finding]]:
    shape = list(array.shape)
    if array.numel() == 0:
        raise ValueError(f"The batch is empty: shape {shape}. Give at least one waveform with at least one sample.")
    if not 1 <= array.dim() <= 3:
        raise ValueError(f"Audio has shape (time,), (batch, time) or (batch, channels, time), not {shape}.")
    if array.is_meta:
        raise ValueError("Audio on the meta device has no samples. Give a batch with values.")
    x, integer = as_floats(array)
    findings = []
    if x.dim() >= 2 and x.shape[-1] <= _MOST_CHANNELS and x.shape[-2] > 100 * x.shape[-1]:
        findings.append(_layout(shape, channels))
        x = x.transpose(-1, -2)
        items = list(x) if x.dim() == 3 else [x]
    elif x.dim() == 3:
        items = list(x)
    elif x.dim() == 2 and channels > 1 and x.shape[0] == channels:
        items = [x]
    else:
        items = list(x.reshape(-1, 1, x.shape[-1]))
    found = {item.shape[0] for item in items}
    if not findings and found != {channels}:
        findings.append(_channels(f"shape {shape}", found.pop(), channels))
    return [Waveform(str(index), item, integer=integer) for index, item in enumerate(items)], findings


def _read(paths: list[pathlib.Path], channels: int) -> tuple[list[Waveform], list[Finding]]:
    try:
        import soundfile
    except ImportError as error:
        raise ImportError("Reading audio files needs soundfile: pip install 'stethoscope[audio]'.") from error
    items, findings = [], []
    others: list[tuple[str, int]] = []  # with another number of channels
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"No audio file at '{path}'.")
        try:
            samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as error:
            findings.append(
                Finding(
                    code="audio-unreadable",
                    severity="error",
                    message=f"'{path.name}' cannot be read as audio: {str(error).rstrip('.')}.",
                    advice="Compare its size with the original and decode it anew; soundfile reads WAV, FLAC, OGG and MP3.",
                )
            )
            continue
        if samples.shape[0] == 0:
            findings.append(
                Finding(
                    code="audio-unreadable",
                    severity="error",
                    message=f"'{path.name}' is empty: it has a header and no samples.",
                    advice="Leave it out, or look at what wrote it: a cut whose end lies before its start, a full disk.",
                )
            )
            continue
        if samples.shape[1] != channels:
            others.append((path.name, samples.shape[1]))
        items.append(Waveform(path.name, torch.from_numpy(samples.T.copy()), int(rate)))
    if others:
        name, found = others[0]
        alike = f" (one of {len(others)} files that do not fit)" if len(others) > 1 else ""
        findings.append(_channels(f"'{name}'{alike}", found, channels))
    return items, findings


def _layout(shape: list[int], channels: int) -> Finding:
    return Finding(
        code="audio-channels",
        severity="error",
        message=f"The batch of shape {shape} looks like (time, channels): its last length is {shape[-1]}, the one before it {shape[-2]}.",
        advice=f"Transpose it: time is the last axis. soundfile.read returns (time, channels). The model takes {channels} channel(s).",
        evidence={"shape": shape, "expected": channels},
    )


def _channels(what: str, found: int, channels: int) -> Finding:
    return Finding(
        code="audio-channels",
        severity="error",
        message=f"{what} has {found} channel(s), the model takes {channels}.",
        advice="Average the channels or take one of them for a mono model; state channels= for one that takes several.",
        evidence={"channels": found, "expected": channels},
    )
