"""Compares a model that gets everything at once with the same model fed chunk by chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope._record import Finding, Report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 0.5}
"""Relative to the largest output. Chunks sum in another order: ten times what one operation on 10^5 terms rounds."""

_SHIFTS = 512


@dataclass(frozen=True, kw_only=True)
class StreamingReport(Report):
    """What `streaming` found.

    Args:
        equal: whether both outputs are the same, in length and in value.
        first_difference: first output step that differs; None for none. A missing step differs.
        size: largest difference, relative to the largest offline output.
        delay: steps by which the stream is late where it is otherwise the same; None where no shift makes them equal.
        offline_steps: output steps offline.
        stream_steps: output steps of the stream.
    """

    equal: bool = True
    first_difference: int | None = None
    size: float = 0.0
    delay: int | None = 0
    offline_steps: int = 0
    stream_steps: int = 0


def streaming(
    offline: Callable[[Tensor], Any],
    stream: Callable[[Tensor], Any],
    x: Tensor,
    *,
    chunk: int | None = None,
    time_axis: int = -1,
    out_time_axis: int | None = None,
    tolerance: float | None = None,
) -> StreamingReport:
    """Say whether chunk by chunk equals the whole, and from which output step on it does not.

    **Cost:** one offline pass and one streamed pass, without gradients. Modes and state are the caller's: use `eval()`.

    Args:
        offline: takes all of `x`, returns a tensor.
        stream: takes all of `x` and returns a tensor, or the chunks of one in order (a list or a generator). With
            `chunk`, it is called with one chunk after the other and keeps its own state.
        x: any shape and device.
        chunk: steps per call of `stream`; None where `stream` cuts `x` itself.
        time_axis: axis of `x` along which time runs.
        out_time_axis: the same of the outputs, `time_axis` by default.
        tolerance: largest difference that counts as equal, relative to the largest offline output; by default 1e-4
            for float32 and 1e-9 for float64.

    Returns:
        A report; `.ok` is `.equal`.

    Raises:
        ValueError: the outputs are no tensors, or differ in more than their length.

    Examples:
        >>> import torch
        >>> def chunks(x):
        ...     return [part.cumsum(-1) for part in x.split(10, dim=-1)]  # forgets the sum so far
        >>> streaming(lambda x: x.cumsum(-1), chunks, torch.ones(2, 30)).first_difference
        10
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"`chunk` must be at least one step, got {chunk}.")
    axis = time_axis if out_time_axis is None else out_time_axis
    if not isinstance(x, Tensor):
        raise ValueError(f"`x` must be a tensor, got {type(x).__name__}.")  # noqa: TRY004  # as all wrong arguments here
    if not -x.dim() <= time_axis < x.dim():
        raise ValueError(f"x has shape {tuple(x.shape)}: there is no axis {time_axis} for time_axis.")
    with torch.no_grad():
        whole = offline(x.clone())
        if not isinstance(whole, Tensor):
            raise ValueError(f"`offline` must return a tensor, got {type(whole).__name__}. Pick one in a function.")  # noqa: TRY004  # its value is wrong, x's type is not
        parts = (
            stream(x.clone())
            if chunk is None
            else [stream(part) for part in torch.split(x.clone(), chunk, dim=time_axis)]
        )
        pieces = _joined(parts, axis)
    a, b = whole.movedim(axis, 0), pieces.movedim(axis, 0)
    if a.shape[1:] != b.shape[1:]:
        raise ValueError(
            f"Offline returns {tuple(whole.shape)}, the stream {tuple(pieces.shape)}: only axis {axis} may differ. Is out_time_axis right?"
        )
    limit = _TOLERANCES.get(a.dtype, 1e-4) if tolerance is None else tolerance
    return _compared(a, b, limit)


def _joined(parts: Tensor | Iterable[Tensor], axis: int) -> Tensor:
    if isinstance(parts, Tensor):
        return parts
    pieces = [part for part in parts if isinstance(part, Tensor) and part.numel()]
    if not pieces:
        raise ValueError("`stream` returned no tensor. Return a tensor, or the chunks of one in order.")
    try:
        return torch.cat(pieces, dim=axis)
    except (RuntimeError, IndexError) as error:
        shapes = [tuple(piece.shape) for piece in pieces[:3]]
        raise ValueError(
            f"What `stream` returned cannot be joined along axis {axis}: shapes {shapes}, {error}. Return the output only, without states."
        ) from error


def _compared(whole: Tensor, pieces: Tensor, limit: float) -> StreamingReport:
    whole, pieces = (t.double() if t.dtype == torch.bool else t for t in (whole, pieces))
    sizes = whole.abs()[torch.isfinite(whole)]
    scale = float(sizes.max()) if sizes.numel() else 0.0
    common = min(len(whole), len(pieces))
    gaps = _gaps(whole[:common], pieces[:common])
    far = (gaps > limit * (scale or 1.0)).nonzero()
    first = int(far[0]) if len(far) else (common if len(whole) != len(pieces) else None)
    equal = first is None
    size = float(gaps.max()) / (scale or 1.0) if common else 0.0
    delay = 0 if equal else _delay(whole, pieces, limit * (scale or 1.0))
    findings = () if first is None else (_finding(first, size, delay, len(whole), len(pieces), at_end=not len(far)),)
    return StreamingReport(
        title="streaming against offline",
        summary=f"{common} output steps compared, largest difference {size:.1e} of the largest output",
        findings=findings,
        equal=equal,
        first_difference=first,
        size=size,
        delay=delay,
        offline_steps=len(whole),
        stream_steps=len(pieces),
    )


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference per step; equal non-finite numbers do not differ."""
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))
    gap = torch.where(same, torch.zeros_like(a, dtype=torch.float64), (a - b).abs().double())
    return gap.nan_to_num(nan=float("inf"), posinf=float("inf")).reshape(len(a), -1).amax(dim=1)


def _delay(whole: Tensor, pieces: Tensor, limit: float) -> int | None:
    """By how many steps the stream is late, where that is all: at least half of it must be there to tell."""
    for shift in range(1, min(_SHIFTS, len(pieces) // 2)):
        late = pieces[shift : shift + len(whole)]
        if bool((_gaps(whole[: len(late)], late) <= limit).all()):
            return shift
    return None


def _finding(first: int, size: float, delay: int | None, whole: int, pieces: int, *, at_end: bool) -> Finding:
    if delay is not None:
        message = f"The stream is the offline output, {delay} output steps late."
        advice = f"Drop its first {delay} steps, and feed as many more at the end, before comparing or scoring."
    elif at_end:
        message = f"The stream gives {pieces} output steps, offline gives {whole}; the first {first} are the same."
        advice = "Flush the stream: feed the last incomplete block and the look-ahead's worth of zeros."
    else:
        message = (
            f"The stream differs from offline from output step {first} on, by up to {size:.1e} of the largest output."
        )
        advice = (
            "Carry the state (convolution history, RNN state, attention cache, running norms) from chunk to chunk: a difference "
            "from the first chunk's end on is a state that starts anew, one from step 0 on is padding or a statistic of the clip."
        )
    return Finding(
        code="streaming-mismatch",
        severity="error",
        message=message,
        advice=advice,
        evidence={
            "first_difference": first,
            "size": size,
            "delay": delay,
            "offline_steps": whole,
            "stream_steps": pieces,
        },
    )
