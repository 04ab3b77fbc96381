"""What is wrong with a batch of images, features or anything else that is no waveform."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from stethoscope._record import Finding, Report
from stethoscope._tree import tensors
from stethoscope.stats import is_dense

if TYPE_CHECKING:
    from torch import Tensor

_ENOUGH_ITEMS = 8
"""A feature that is the same in fewer items may be so by chance."""

_ENOUGH_VALUES = 8
"""Whole numbers in shorter items (classes, categories) are alike by chance."""

_NO_SIGNAL = ("mask", "label", "target", "seg")
"""Names of what is given beside the signal."""


class TensorFacts(NamedTuple):
    """One tensor of a batch.

    Args:
        path: where it is in the batch, e.g. `"0"` or `"image"`; `""` for a bare tensor.
        shape: its shape; the first axis counts as items.
        dtype: its type, e.g. `"float32"`.
        low: smallest finite value.
        high: largest finite value.
        mean: of the finite values.
        std: of the finite values, population.
        nonfinite: number of NaN and Inf values.
        constant: items whose values are all equal.
        repeated: items that equal an earlier one.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    mean: float
    std: float
    nonfinite: int
    constant: tuple[int, ...]
    repeated: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class BatchReport(Report):
    """What was measured, tensor by tensor.

    Args:
        tensors: one entry per floating-point, complex or uint8 tensor.
    """

    tensors: tuple[TensorFacts, ...] = ()


def batch(data: Any, *, value_range: tuple[float, float] | None = None) -> BatchReport:
    """Examine the tensors of a batch: range, constants, types, duplicates. For waveforms see `audits.audio`.

    **Decides:** `input-nonfinite`; `input-range` outside of `value_range`, or, without one, images (3 axes and more) of whole
    numbers from 0 to 255, which nobody scaled; `input-constant` for items of one value, and, from 8 items on, for entries
    of the last axis of a 2-D tensor that are the same in all items (info); `input-duplicate` for items that repeat;
    `input-dtype` for float64, which float32 weights refuse (info). Token numbers, masks and labels (by type, name or values:
    one-hot vectors, a few whole numbers) are left out.
    **Cost:** host; copies the batch there; a few passes.

    Args:
        data: a tensor, or anything nested that holds tensors.
        value_range: smallest and largest legal value of all floating-point tensors.

    Raises:
        ValueError: no tensor with values, or a range that is upside down.

    Examples:
        >>> report = batch({"image": torch.arange(2 * 3 * 8 * 8).view(2, 3, 8, 8) % 256.0})
        >>> [finding.code for finding in report.findings]
        ['input-range']
    """
    if value_range is not None and not value_range[0] < value_range[1]:
        raise ValueError(f"value_range is {value_range}. Legal: (smallest, largest), the first below the second.")
    found = [(path, x.detach()) for path, x in tensors(data)]
    if not any(_readable(x) for _, x in found):
        shapes = [(path, "nested" if x.is_nested else list(x.shape)) for path, x in found]
        raise ValueError(f"The batch holds no values in dense tensors: {shapes or 'no tensors'}.")
    facts, findings = [], []
    for path, x in found:
        if _readable(x) and (x.is_floating_point() or x.is_complex() or x.dtype == torch.uint8):
            one = _facts(path, torch.view_as_real(x.resolve_conj()) if x.is_complex() else x)
            facts.append(one)
            findings += _judge(one, x.cpu(), value_range)
    lines = [
        f"{one.path or 'tensor'} {list(one.shape)} {one.dtype}: {one.low:g} to {one.high:g}, mean {one.mean:.3g}, std {one.std:.3g}"
        for one in facts
    ]
    return BatchReport(
        title=f"batch, {len(facts)} tensors", summary="\n".join(lines), findings=tuple(findings), tensors=tuple(facts)
    )


def _facts(path: str, x: Tensor) -> TensorFacts:
    items = x.cpu().double().reshape(x.shape[0] if x.dim() else 1, -1)
    finite = items[items.isfinite()]
    known: dict[tuple[float, float], list[int]] = {}
    repeated = []
    low, high = items.aminmax(dim=1)
    codes = _codes(items) and x.dim() <= 2
    constant = ((low == high) & (items.shape[1] > 1) & (not codes)).tolist()
    for index, key in enumerate(zip(items.sum(1).tolist(), high.tolist(), strict=True)):
        same = known.setdefault(key, [])
        if (
            items.shape[1] > 1
            and not codes
            and not constant[index]
            and any(torch.equal(items[index], items[other]) for other in same)
        ):
            repeated.append(index)
        same.append(index)
    some = finite.numel() > 0
    return TensorFacts(
        path=path,
        shape=tuple(x.shape),
        dtype=str(x.dtype).removeprefix("torch."),
        low=float(finite.min()) if some else float("nan"),
        high=float(finite.max()) if some else float("nan"),
        mean=float(finite.mean()) if some else float("nan"),
        std=float(finite.std(correction=0)) if some else float("nan"),
        nonfinite=items.numel() - finite.numel(),
        constant=tuple(index for index, holds in enumerate(constant) if holds),
        repeated=tuple(repeated),
    )


def _readable(x: Tensor) -> bool:
    return is_dense(x) and not x.is_meta and x.numel() > 0


def _codes(items: Tensor) -> bool:
    """Classes, one-hot and multi-hot vectors, masks: whole numbers, few per item or nothing but both 0 and 1."""
    if not bool((items == items.round()).all()):
        return False
    binary = bool(((items == 0) | (items == 1)).all()) and float(items.max()) == 1 > float(items.min())
    return binary or items.shape[1] < _ENOUGH_VALUES


def _judge(one: TensorFacts, x: Tensor, value_range: tuple[float, float] | None) -> list[Finding]:
    name = f"'{one.path}'" if one.path else "The tensor"
    signal = not any(word in one.path.lower() for word in _NO_SIGNAL)
    found = []
    if one.nonfinite:
        found.append(
            Finding(
                "input-nonfinite",
                "error",
                f"{name} {list(one.shape)} holds {one.nonfinite} NaN or Inf values.",
                "Look for a division by a zero spread in the normalisation, a logarithm of 0, or missing values in a table.",
                evidence={"path": one.path, "nonfinite": one.nonfinite},
            )
        )
    if value_range is not None and x.is_floating_point() and (one.low < value_range[0] or one.high > value_range[1]):
        text = (
            f"{name} has values from {one.low:g} to {one.high:g}, outside of {value_range[0]:g} to {value_range[1]:g}."
        )
        found.append(_range(one, text, "Apply the scaling that the model was made for, in the same order."))
    elif value_range is None and signal and x.is_floating_point() and x.dim() >= 3 and _unscaled(one, x):
        text = f"{name} holds whole numbers from {one.low:g} to {one.high:g}: an image on the scale of bytes."
        found.append(
            _range(one, text, "Divide by 255 and normalise, or state value_range=(0, 255) if the model does it.")
        )
    if one.dtype == "float64":
        found.append(
            Finding(
                "input-dtype",
                "info",
                f"{name} is float64; float32 weights refuse it, and autocast does not change that.",
                "Convert in the data set: NumPy makes float64 unless told otherwise.",
                evidence={"path": one.path},
            )
        )
    if one.constant and signal:
        found.append(
            Finding(
                "input-constant",
                "warning",
                f"{len(one.constant)} of {one.shape[0]} items of {name} hold one value only (first: item {one.constant[0]}).",
                "Look at these items: black images, silence, padding, or a loader that returns zeros for unreadable files.",
                evidence={"path": one.path, "items": list(one.constant[:100])},
            )
        )
    same = _constant_features(x)
    if same and not one.constant:
        found.append(
            Finding(
                "input-constant",
                "info",
                f"{len(same)} of {one.shape[1]} features of {name} are the same in all {one.shape[0]} items (first: {same[0]}).",
                "Leave them out, or check the join that fills them.",
                evidence={"path": one.path, "features": same[:100]},
            )
        )
    if one.repeated:
        found.append(
            Finding(
                "input-duplicate",
                "warning",
                f"{len(one.repeated)} of {one.shape[0]} items of {name} equal an earlier one (first: item {one.repeated[0]}).",
                "Check the sampler and the seeding of workers: each needs its own (worker_init_fn).",
                evidence={"path": one.path, "items": list(one.repeated[:100])},
            )
        )
    return found


def _range(one: TensorFacts, text: str, advice: str) -> Finding:
    return Finding(
        "input-range", "warning", text, advice, evidence={"path": one.path, "low": one.low, "high": one.high}
    )


def _unscaled(one: TensorFacts, x: Tensor) -> bool:
    """Whole numbers from 0 to 255, too many of them for a mask or classes."""
    bytes_only = one.low >= 0 and 32 <= one.high <= 255 and one.nonfinite == 0
    return (
        bytes_only
        and bool((x == x.round()).all())
        and torch.histc(x.float(), bins=256, min=0, max=255).count_nonzero().item() > 16
    )


def _constant_features(x: Tensor) -> list[int]:
    if x.dim() != 2 or x.shape[0] < _ENOUGH_ITEMS or x.is_complex():
        return []
    low, high = x.aminmax(dim=0)
    return [index for index, holds in enumerate((low == high).tolist()) if holds]
