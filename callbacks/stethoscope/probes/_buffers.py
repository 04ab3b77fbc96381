"""`Buffers`: whether the running statistics of normalisations are finite."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stethoscope import stats
from stethoscope._protocols import Columns, Key, Readings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope._protocols import Attachment, Probe

LARGEST = 1e18
"""Magnitude whose square leaves float32."""


@dataclass(frozen=True)
class Buffers:
    """Running statistics that are NaN, Inf or beyond reason: `running_mean` and `running_var` of normalisations.

    Other buffers may be Inf for good reasons (masks of -Inf, `best = inf`) and are not looked at.

    **Records**, in training only, at the end of the step: `buffer/count`, how many there are; per buffer `buffer/nonfinite`, 2 where it holds NaN or Inf, 1 where a value is larger than
    1e18, whose square leaves float32 (left out where neither holds).

    **Cost:** on observed steps one fused norm over all such buffers. Never waits for the device.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> Buffers(every=10).every
        10
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the buffers of `model`, anew on each observed step: a moved model has others."""
        return BufferReader(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` looks no more often."""
        return isinstance(other, Buffers) and (self.every == other.every or self.every == 1)


class BufferReader:
    """What one `Buffers` reads."""

    def __init__(self, model: nn.Module) -> None:
        self._home = next((each.device for each in model.parameters()), torch.device("cpu"))
        self._owners = [
            (f"{path}.{name}".lstrip("."), module, name)
            for path, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if name.startswith("running_")
        ]
        self._armed = False

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`. Statistics are written in training."""
        if phase == "train":
            self._armed = on

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if not self._armed:
            return Readings(())
        places: dict[tuple[torch.device, torch.dtype], tuple[list[Key], list[Tensor]]] = {}
        for path, module, name in self._owners:
            value = getattr(module, name, None)
            if (
                isinstance(value, Tensor)
                and not is_lazy(value)
                and value.is_floating_point()
                and value.numel()
                and not hasattr(value, "to_local")
            ):
                keys, values = places.setdefault((value.device, value.dtype), ([], []))
                keys.append(Key("buffer/nonfinite", path))
                values.append(value)
        count = stats.upload(
            [float(sum(len(keys) for keys, _ in places.values()))], torch.float32, next(iter(places), (self._home,))[0]
        )
        columns = [Columns([Key("buffer/count")], count, [0])]
        with torch.no_grad():
            for keys, values in places.values():
                sizes = torch.stack(torch._foreach_norm(values, float("inf")))  # noqa: SLF001
                flags = (~sizes.isfinite()).float() + (~(sizes <= LARGEST)).float()
                columns.append(Columns(keys, flags, range(len(keys)), sparse=True))
        return Readings(columns)

    def detach(self) -> None:
        """See `Attachment`. There are no hooks."""
        self._armed = False
