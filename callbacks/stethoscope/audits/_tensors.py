"""Tensors that are no good whatever they are loaded into: NaN, dead, of a type that does not convert, never trained."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

_SHOWN = 5


def broken(tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> list[Finding]:
    """Examine the file's tensors, against the model's where one receives them (`targets`: file key to model tensor)."""
    extremes = {key: _extremes(value) for key, value in tensors.items()}
    nonfinite = [key for key, pair in extremes.items() if pair is not None and not all(map(_finite, pair))]
    flat = [
        key for key, pair in extremes.items() if pair is not None and pair[0] == pair[1] and is_matrix(tensors[key])
    ]
    dead = [key for key in flat if key not in targets or not equal(tensors[key], targets[key])]
    unscaled = [key for key, target in targets.items() if _loses_scale(tensors[key], target)]
    narrowed = [key for key, target in targets.items() if tensors[key].dtype != target.dtype and key not in unscaled]
    same = [
        key
        for key, target in targets.items()
        if target.requires_grad and not _flat(extremes[key]) and equal(tensors[key], target)
    ]
    hollow = [key for key, target in targets.items() if tensors[key].is_meta and not target.is_meta]
    return [
        *_hollow(hollow, len(tensors)),
        *_nonfinite(nonfinite, len(tensors)),
        *_dead(dead, tensors),
        *_dtype(unscaled, narrowed, tensors, targets),
        *_unchanged(same, [key for key, target in targets.items() if target.requires_grad]),
    ]


def is_matrix(tensor: Tensor) -> bool:
    """A floating-point tensor with at least two lengths above one: weights of a Linear or a convolution, no scale, no bias."""
    return tensor.is_floating_point() and sum(length > 1 for length in tensor.shape) >= 2


def equal(first: Tensor, second: Tensor) -> bool:
    """Bit for bit, after conversion to the second one's type; never on meta or quantised tensors."""
    if first.is_meta or second.is_meta or first.is_quantized or second.is_quantized or first.shape != second.shape:
        return False
    return torch.equal(first.detach().to(second.device, second.dtype), second.detach())


def _extremes(tensor: Tensor) -> tuple[float, float] | None:
    """Smallest and largest element; NaN if there is one. None where that means nothing."""
    if tensor.numel() == 0 or tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        return None
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point():
        return None
    low, high = torch.aminmax(tensor.detach() if tensor.element_size() > 1 else tensor.detach().float())
    return float(low), float(high)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # NaN compares False


def _flat(pair: tuple[float, float] | None) -> bool:
    return pair is None or pair[0] == pair[1]


def _loses_scale(source: Tensor, target: Tensor) -> bool:
    """Integers and 8-bit floats are stored with a scale beside them; `copy_` ignores it."""
    if source.is_quantized:
        return not target.is_quantized
    coarse = not source.is_floating_point() and not source.is_complex() and source.dtype != torch.bool
    return target.is_floating_point() and (
        coarse or (source.is_floating_point() and source.element_size() == 1 < target.element_size())
    )


def _names(keys: Sequence[str]) -> str:
    return ", ".join(f"'{key}'" for key in keys[:_SHOWN]) + (
        f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    )


def _about(keys: Sequence[str], finding: Finding) -> list[Finding]:
    """The finding with the tensors that it is about; none where there are none."""
    if not keys:
        return []
    return [replace(finding, module=keys[0].rpartition(".")[0], evidence={"keys": list(keys[:100])})]


def _hollow(keys: Sequence[str], number: int) -> list[Finding]:
    return _about(
        keys,
        Finding(
            "checkpoint-unreadable",
            "error",
            f"{len(keys)} of {number} tensors in the checkpoint are on the meta device and hold no values: {_names(keys)}.",
            "Save the model after its weights were made or loaded, not while it is on the meta device.",
        ),
    )


def _nonfinite(keys: Sequence[str], number: int) -> list[Finding]:
    return _about(
        keys,
        Finding(
            "checkpoint-nonfinite",
            "error",
            f"{len(keys)} of {number} tensors in the checkpoint hold NaN or Inf: {_names(keys)}.",
            "Go back to an earlier checkpoint: this run had already diverged when it was saved.",
        ),
    )


def _dead(keys: Sequence[str], tensors: Mapping[str, Tensor]) -> list[Finding]:
    first = f" (the first one: {float(tensors[keys[0]].flatten()[0]):g})" if keys else ""
    return _about(
        keys,
        Finding(
            "checkpoint-constant",
            "warning",
            f"{len(keys)} weight matrices in the checkpoint hold one number everywhere: {_names(keys)}{first}.",
            "Check how the file was made: an untrained zero initialisation, or a gathering over ranks that lost a shard.",
        ),
    )


def _dtype(
    unscaled: Sequence[str], narrowed: Sequence[str], tensors: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> list[Finding]:
    found = []
    if unscaled:
        first = unscaled[0]
        found.append(
            Finding(
                "checkpoint-dtype",
                "error",
                f"{len(unscaled)} tensors are stored as {_short(tensors[first])} and would be copied into {_short(targets[first])} without their scale: {_names(unscaled)}.",
                "Load into a model that was quantised in the same way, or multiply by the scales first.",
                module=first.rpartition(".")[0],
                evidence={"keys": list(unscaled[:100])},
            )
        )
    if narrowed:
        kinds = sorted({f"{_short(tensors[key])} to {_short(targets[key])}" for key in narrowed})
        found.append(
            Finding(
                "checkpoint-dtype",
                "info",
                f"{len(narrowed)} tensors are converted on loading: {', '.join(kinds)}.",
                "Nothing to do unless the lost digits matter.",
                evidence={"keys": list(narrowed[:100]), "kinds": kinds},
            )
        )
    return found


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _unchanged(same: Sequence[str], trained: Sequence[str]) -> list[Finding]:
    if not same:
        return []
    everything = len(same) == len(trained)
    return [
        Finding(
            "checkpoint-unchanged",
            "info",
            f"{'All' if everything else len(same)} of {len(trained)} parameters in the checkpoint equal what the model holds already: {_names(same)}.",
            "Fine if the model was loaded before or these are frozen; if it is freshly built with the seed of that run, they were never trained.",
            evidence={"keys": list(same[:100])},
        )
    ]
