"""Second opinions, which finite perturbations overrule: where does NaN spread, where do gradients come from.

NaN proves quickly that nothing leaks, but 0 * NaN is a false alarm; gradients miss what is detached or has none.
"""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stethoscope.audits._causality._axes import Track
    from stethoscope.audits._causality._perturb import Scan


def nan_leaks(scan: Scan, start: int, allowed: int) -> bool | None:
    """Whether NaN from `start` on reaches outputs more than `allowed` steps earlier; None where the model refuses NaN."""
    if not _continuous(scan):
        return None
    try:
        other = scan.outputs(scan.inputs.poisoned(start))
    except Exception:  # models may refuse NaN in any way; then there is no opinion
        return None
    leaks = False
    for track in scan.tracks:
        if other[track.slot].shape != scan.base[track.slot].shape:
            return None
        new, old = (_early(tensors[track.slot], track, start - allowed) for tensors in (other, scan.base))
        leaks |= bool((torch.isnan(new) & ~torch.isnan(old)).any())
    return leaks


def gradient_leaks(scan: Scan, start: int, allowed: int) -> bool | None:
    """Whether inputs from `start` on have a gradient from outputs more than `allowed` steps earlier; None where there is none."""
    if not _continuous(scan):
        return None
    args = list(scan.inputs.call())
    sources = [args[i].requires_grad_() for i in scan.inputs.timed]
    for i, source in zip(scan.inputs.timed, sources, strict=True):
        # Models may write into what they are given, which a leaf that requires gradients forbids.
        args[i] = source * 1
    try:
        outputs = scan.take(scan.runs(tuple(args), grad=True), detach=False)
        total = sum(_weighted(_early(outputs[track.slot], track, start - allowed)) for track in scan.tracks)
        gradients = torch.autograd.grad(total, sources, allow_unused=True) if isinstance(total, Tensor) else ()
    except Exception:  # not differentiable, in whatever way; then there is no opinion
        return None
    sizes = [gradient.abs() for gradient in gradients if gradient is not None]
    late = [size.narrow(scan.inputs.time_axis, start, scan.inputs.steps - start) for size in sizes]
    return any(float(end.max()) > scan.tolerance * float(size.max()) for end, size in zip(late, sizes, strict=True))


def disagreements(nan: bool | None, gradient: bool | None, *, leaks: bool) -> list[str]:
    """Explain second opinions that differ from the decision."""
    said = "leaks" if leaks else "does not leak"
    notes = []
    if nan is not None and nan != leaks:
        spread = "reaches" if nan else "does not reach"
        why = (
            "0 * NaN is NaN, as in masked attention" if nan else "nan_to_num, where, a comparison or a maximum hides it"
        )
        notes.append(f"A NaN in the future {spread} the past although the model {said}: {why}.")
    if gradient is not None and gradient != leaks:
        why = "it is detached or passes an operation without gradient" if leaks else "no finite change moves the output"
        notes.append(f"Gradients {'miss the leak' if leaks else 'reach the future although nothing leaks'}: {why}.")
    return notes


def _continuous(scan: Scan) -> bool:
    return scan.inputs.first.is_floating_point() or scan.inputs.first.is_complex()


def _early(tensor: Tensor, track: Track, before: int) -> Tensor:
    return tensor.narrow(track.axis, 0, min(max(0, ceil(before / track.hop)), tensor.size(track.axis)))


def _weighted(part: Tensor) -> Tensor:
    """A sum with random weights: plain sums cancel behind norms and softmax."""
    part = torch.view_as_real(part) if part.is_complex() else part
    weights = torch.randn(part.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (part * weights.to(part.device, part.dtype)).sum()
