"""Confirms a suspect: only its early changes are put into the unperturbed run, and the output is looked at.

A look-ahead that a later delay takes back harms nobody, and accuses nobody.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope.audits._causality._axes import tensors
from stethoscope.audits._causality._culprit import Slot

if TYPE_CHECKING:
    from collections.abc import Callable

    from stethoscope.audits._causality._culprit import Place, Suspect


def patched(
    module: nn.Module,
    suspect: Suspect,
    where: dict[Slot, Place],
    run: Callable[[], Any],
    run_perturbed: Callable[[], Any],
    early: Callable[[Place, int], Tensor],
) -> Any:
    """Run unperturbed, with the suspect's early steps as they are in the perturbed run.

    Args:
        module: the whole model.
        suspect: the call to change.
        where: time in each tensor.
        run: runs unperturbed, returns the output.
        run_perturbed: runs perturbed.
        early: mask over the steps of a tensor that must not have moved, given its place and length.
    """
    kept: dict[str, Tensor] = {}
    calls = Counter[int]()

    def keep(_: Any, __: Any, output: Any) -> None:
        if calls[0] == suspect.call:
            kept.update({path: tensor.detach().clone() for path, tensor in tensors(output)})
        calls[0] += 1

    def put(_: Any, __: Any, output: Any) -> Any:
        calls[1] += 1
        return _replaced(output, "", swap) if calls[1] - 1 == suspect.call else None

    def swap(path: str, tensor: Tensor) -> Tensor:
        place = where.get(Slot(suspect.module, suspect.call, "out", path))
        if place is None or place.axis is None or path not in kept or kept[path].shape != tensor.shape:
            return tensor
        mask = early(place, tensor.size(place.axis)).to(tensor.device)
        shape = [-1 if axis == place.axis else 1 for axis in range(tensor.dim())]
        return torch.where(mask.reshape(shape), kept[path], tensor)

    target = module.get_submodule(suspect.module)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for hook, call in ((keep, run_perturbed), (put, run)):
            handle = target.register_forward_hook(hook)
            try:
                output = call()
            finally:
                handle.remove()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return output


def _replaced(value: Any, path: str, swap: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return swap(path, value)
    if isinstance(value, dict):
        return (
            type(value)(**{k: _replaced(v, f"{path}[{k!r}]", swap) for k, v in value.items()})
            if all(isinstance(k, str) for k in value)
            else value
        )
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(v, f"{path}.{k}", swap) for k, v in zip(value._fields, value, strict=True)))
    if type(value) in (tuple, list):
        return type(value)(_replaced(v, f"{path}[{i}]", swap) for i, v in enumerate(value))
    return value
