"""Pure `Tensor -> Tensor` statistics. Everything stays on the device; nothing in here waits for it.

Probes run these inside of hooks, so each function is a handful of tensor operations.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

LOWEST, HIGHEST = -24, 16
_OCTAVES = HIGHEST - LOWEST

HISTOGRAM_EDGES: tuple[float, ...] = (
    *(-(2.0**e) for e in range(HIGHEST, LOWEST - 1, -1)),
    *(2.0**e for e in range(LOWEST, HIGHEST + 1)),
)
"""Edges of the signed logarithmic histogram: one bin per octave and sign from 2^-24 to 2^16, and one bin around zero.

The outermost bins also hold everything beyond 2^16. 81 bins.
"""

BINS = len(HISTOGRAM_EDGES) - 1
ZERO, NONFINITE = BINS, BINS + 1
"""Two more codes of `log_bins`: exactly zero, and NaN or Inf."""
CODES = BINS + 2

_WIDE = {torch.float64, torch.complex128, torch.int64, torch.uint64}


def precision(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which statistics of `dtype` are kept: float32, or float64 for 64-bit types.

    64-bit statistics fall back to float32 on devices without float64 (MPS).
    """
    return torch.float64 if dtype in _WIDE and device.type != "mps" else torch.float32


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has values that can be indexed: not sparse, nested or quantised."""
    return x.layout is torch.strided and not (x.is_nested or x.is_quantized)


def measurable(x: Tensor) -> Tensor | None:
    """Return `x` as a real, strided float32 or float64 tensor, or None where that is not possible.

    Args:
        x: any shape, any dtype, device. Complex tensors are measured by their magnitude, integers and booleans by
            their value, DTensors by their local shard.

    Returns:
        `x` itself (float32, float64), a converted copy, or None for nested, sparse and quantised tensors.
    """
    if x.dtype is torch.float32 and type(x) is Tensor and x.layout is torch.strided and not x.is_nested:
        return x
    to_local = getattr(x, "to_local", None)
    if to_local is not None:
        x = to_local()
    if not is_dense(x):
        return None
    if x.is_complex():
        # complex32 has no abs on most devices
        x = (x.to(torch.complex64) if x.dtype is torch.complex32 else x).abs()
    return x.to(precision(x.dtype, x.device))


def sample_step(numel: int, last: int, limit: int) -> int:
    """Return the stride of a regular sample: at most `limit` values over the whole tensor, every channel visited.

    A stride that shares a factor with the tensor's size would read the same channels again and again, so the
    smallest stride is taken that is large enough and has no common factor with `numel` or `last`.

    Args:
        numel: number of elements.
        last: size of the last dimension.
        limit: largest number of values to take.

    Examples:
        >>> sample_step(8 * 512 * 256, 256, 2048)
        513
    """
    step = -(-numel // limit)
    while step > 1 and (gcd(step, numel) > 1 or gcd(step, last) > 1):
        step += 1
    return step


def sample(x: Tensor, limit: int) -> Tensor:
    """Return at most `limit` values of `x`, regularly spaced over its memory, as a flat tensor (a view where possible).

    Args:
        x: any shape, device.
        limit: largest number of values.
    """
    n = x.numel()
    if n <= limit:
        return x.reshape(-1)
    step = sample_step(n, x.shape[-1], limit)
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        # statistics do not depend on order, so memory order will do and saves a copy of the whole tensor
        return x.as_strided((-(-n // step),), (step,))
    return x.reshape(-1)[::step]


def log_bins(x: Tensor) -> Tensor:
    """Return the histogram bin of each value as int64: an index into `HISTOGRAM_EDGES`' bins, `ZERO` or `NONFINITE`.

    Reads the exponent from the bits of the number, `floor(log2(abs(x)))`, which is exact and several times faster
    than a logarithm.

    Args:
        x: float32 or float64, any shape, device.

    Examples:
        >>> log_bins(torch.tensor([1.0, -1.0, 0.0, float("nan")])).tolist()
        [65, 15, 81, 82]
    """
    integer, width, shift, field, bias = (
        (torch.int64, 64, 52, 2047, 1023) if x.dtype is torch.float64 else (torch.int32, 32, 23, 255, 127)
    )
    bits = x.view(integer)
    exponent = (bits >> shift).bitwise_and_(field)
    octave = (exponent - (bias + LOWEST - 1)).clamp_(0, _OCTAVES)
    # arithmetic, since `where` on integers takes a CPU ten times as long; -1 for negative numbers, whose octave is negated
    sign = bits >> (width - 1)
    bins = octave.bitwise_xor_(sign).sub_(sign).add_(_OCTAVES)
    bins += (x == 0).to(integer).mul_(ZERO - _OCTAVES)
    return bins.masked_fill_(exponent == field, NONFINITE).to(torch.int64)


def nonfinite_level(x: Tensor) -> Tensor:
    """Return 0 where a value is finite, 1 where it is Inf, 2 where it is NaN, in the dtype of `x`.

    The level of a whole tensor is the larger one of the levels of its smallest and its largest value.

    Args:
        x: float32 or float64, any shape, device.

    Examples:
        >>> nonfinite_level(torch.tensor([0.0, -torch.inf, torch.inf, torch.nan])).tolist()
        [0.0, 1.0, 1.0, 2.0]
    """
    # times zero is zero, or NaN where it was not finite: four operations on the device, where isfinite and isnan make ten
    return (x * 0).nan_to_num_(nan=1.0).add_(x.isnan())


def nonfinite_count(x: Tensor) -> Tensor:
    """Return the number of NaN and Inf values, int64, 0-d.

    `x - x` is zero for finite values and NaN for all others; counting is memory-bound, unlike `isfinite`.
    """
    return torch.count_nonzero(x - x)


def central_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of squared and of fourth powers of deviations from the mean, 0-d. NaN for an empty tensor.

    Two passes, so a mean far from zero costs no digits. float32 or float64, any shape, device.
    """
    deviation = x - x.mean()
    squared = deviation * deviation
    return squared.sum(), (squared * squared).sum()


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers of the host as a tensor on the device, without waiting for it (through pinned memory on CUDA)."""
    # said outright, since users set other default devices
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)
