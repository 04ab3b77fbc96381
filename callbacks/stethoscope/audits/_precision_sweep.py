"""At which input levels does a model stay finite?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope._tree import tensors
from stethoscope.audits._nonfinite_run import Task, run

if TYPE_CHECKING:
    from torch import nn

LEVELS = tuple(10.0**power for power in range(-6, 4))
"""Root mean squares that the input is scaled to: from a whisper of 120 dB below full scale to far beyond it."""


def sweep(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, bool]:
    """Say for each level, for silence and for ones whether the output is finite; empty without a float tensor with values.

    The first float tensor among the arguments is scaled, all others stay.
    """
    found = [each for _, each in tensors((args, kwargs), depth=8) if each.is_floating_point() and each.numel()]
    if not found:
        return {}
    signal = found[0]
    x = signal.detach()
    rms = float(x.double().square().mean().sqrt())
    inputs = {"silence": torch.zeros_like(x), "ones": torch.ones_like(x)}
    if rms and math.isfinite(rms):
        inputs |= {f"{level:g}": x * (level / rms) for level in LEVELS}
    return {
        name: run(Task(model, model, _swap(args, signal, each), _swap(kwargs, signal, each))).phase is None
        for name, each in inputs.items()
    }


def finite_range(swept: dict[str, bool], rms: float) -> tuple[float, float] | None:
    """Return the lowest and highest level, around `rms`, without a break; None where that level is not finite itself."""
    finite = [swept.get(f"{level:g}", False) for level in LEVELS]
    if not rms or not math.isfinite(rms):
        return None
    start = min(range(len(LEVELS)), key=lambda i: abs(math.log10(LEVELS[i] / rms)))
    if not finite[start]:
        return None
    low = high = start
    while low and finite[low - 1]:
        low -= 1
    while high + 1 < len(LEVELS) and finite[high + 1]:
        high += 1
    return LEVELS[low], LEVELS[high]


def _swap(value: Any, old: Tensor, new: Tensor) -> Any:
    if isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        return type(value)(_swap(each, old, new) for each in value)
    if isinstance(value, dict):
        return {key: _swap(each, old, new) for key, each in value.items()}
    return new if value is old else value
