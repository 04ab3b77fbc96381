"""What toolkits hand over as estimates, references and mixture, read as one matrix of signals per item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from stethoscope import separation_stats as stats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


class Names(Protocol):
    """The fields of a probe that say under which names and how the signals are given."""

    @property
    def estimates(self) -> str: ...
    @property
    def references(self) -> str | None: ...
    @property
    def mixture(self) -> str | None: ...
    @property
    def lengths(self) -> str | None: ...
    @property
    def pairwise(self) -> str | None: ...
    @property
    def source_axis(self) -> int: ...


class LayoutError(ValueError):
    """What was given cannot be read as signals.

    Args:
        message: what was given, and what is legal.
        certain: whether it can only be a mistake, in the script as well.
    """

    def __init__(self, message: str, *, certain: bool = False) -> None:
        super().__init__(message)
        self.certain = certain


@dataclass(frozen=True)
class SignalBatch:
    """Estimates, references and mixture of one batch as rows of one matrix per item."""

    signals: Tensor
    """(B, N, T), mean-free: estimates, references, mixture."""
    products: Tensor
    """(B, N, N) Gram matrix."""
    count: Tensor | int
    outputs: int
    sources: int
    mixture_row: int | None
    same_length: bool
    """Whether mixture and references are equally long, up to 5 %: features and waveforms are not."""

    @property
    def estimates(self) -> Tensor:
        return self.signals[:, : self.outputs]

    @property
    def references(self) -> Tensor | None:
        return self.signals[:, self.reference_rows] if self.sources else None

    @property
    def reference_rows(self) -> slice:
        return slice(self.outputs, self.outputs + self.sources)

    @staticmethod
    def of(spec: Names, given: Mapping[str, Tensor]) -> SignalBatch:
        estimates = find(given, spec.estimates)
        assert estimates is not None
        rows = [_signals(estimates, spec.source_axis, spec.estimates)]
        references = find(given, spec.references or "references")
        _compare(estimates, references)
        mixture = given.get(spec.mixture or "mixture")
        outputs, sources, mixture_row = rows[0].shape[1], 0, None
        if references is not None:
            rows.append(_signals(references, spec.source_axis, spec.references or "references"))
            sources = rows[1].shape[1]
        if mixture is not None:
            rows.append(_mixture(mixture))
            mixture_row = outputs + sources
        if len({row.shape[0] for row in rows}) > 1:
            sizes = [tuple(row.shape) for row in rows]
            raise LayoutError(f"Estimates, references and mixture differ in batch size: (B, S, T) are {sizes}.")
        items, size = len(rows[0]), min(row.shape[-1] for row in rows)
        if not items or not size:
            raise LayoutError(f"The batch is empty: {spec.estimates!r} has shape {tuple(rows[0].shape)}.")
        for name in (spec.lengths or "lengths", spec.pairwise or "pairwise", "ids"):
            if name in given and given[name].shape[:1].numel() != items:
                raise LayoutError(f"{name!r} has shape {tuple(given[name].shape)}, the batch has {items} items.")
        device = rows[0].device
        same_length = max(row.shape[-1] for row in rows[1:] or rows) * 0.95 <= size
        signals = torch.cat([row[..., :size].to(device, non_blocking=True) for row in rows], 1)
        lengths = given.get(spec.lengths or "lengths")
        count: Tensor | int = size
        if lengths is not None:
            lengths = lengths.detach().to(device, non_blocking=True).flatten()
            if lengths.is_floating_point():
                lengths = (lengths * size).round()
            elif not isinstance(estimates, torch.Tensor) and estimates[0].is_complex():
                lengths = lengths * (size // estimates[0].shape[1])  # frames of complex bins
            count = lengths = lengths.long().clamp(1, size)
        signals = stats.centred(signals, lengths)
        return SignalBatch(signals, stats.gram(signals), count, outputs, sources, mixture_row, same_length)


def find(given: Mapping[str, Tensor], name: str) -> Tensor | Sequence[Tensor] | None:
    """What was given under a name; a list that the monitor has spread over `name/0`, `name/1` ... is gathered again."""
    if name in given or f"{name}/0" not in given:
        return given.get(name)
    parts: list[Tensor] = []
    while f"{name}/{len(parts)}" in given:
        parts.append(given[f"{name}/{len(parts)}"])
    return parts


def _compare(estimates: object, references: object) -> None:
    """Refuse references that have the sizes of the estimates in another order."""
    if not isinstance(estimates, torch.Tensor) or not isinstance(references, torch.Tensor):
        return
    one, two = tuple(estimates.shape), tuple(references.shape)
    if len(one) != 3 or len(two) != 3:
        return
    (*few, many), (*others, most) = sorted(one), sorted(two)
    long = one.index(many)
    # time may differ a little, the rest may not; two and three items of two and three sources may be either
    alike = few == others and abs(many - most) <= 0.05 * many and many > 32
    rest = [size for size in one if size != many], [size for size in two if size != most]
    if alike and (two.index(most) != long or rest[0] != rest[1]):
        raise LayoutError(
            f"The references have shape {two}, the estimates {one}: the same sizes in another order. Unless "
            "the loss puts them in order itself, it compares other samples than you mean.",
            certain=True,
        )


def _signals(given: Tensor | Sequence[Tensor], source_axis: int, name: str) -> Tensor:
    """Any of the layouts as (B, S, T) float32."""
    if not isinstance(given, torch.Tensor):
        shapes = [tuple(part.shape) for part in given]
        if len({shape[:-1] for shape in shapes}) > 1:
            raise LayoutError(f"The parts of {name!r} differ in shape: {shapes}.")
        size = min(shape[-1] for shape in shapes)  # the common part counts
        given, source_axis = torch.stack([part[..., :size] for part in given], 1), 1
    given = given.detach()
    if given.is_complex():
        given = torch.view_as_real(given).flatten(-2)
    if given.dim() == 2:
        given, source_axis = given[:, None], 1
    if given.dim() < 3 or given.shape[source_axis] > 32:
        raise LayoutError(
            f"{name!r} has shape {tuple(given.shape)}, which is not (batch, sources, time) with source_axis={source_axis} "
            "and at most 32 sources."
        )
    return given.movedim(source_axis, 1).flatten(2).float()


def _mixture(given: Tensor) -> Tensor:
    given = given.detach()
    if given.is_complex():
        return torch.view_as_real(given).flatten(1)[:, None].float()
    if given.dim() > 2:
        given = given[..., 0] if given.shape[-1] <= 32 < given.shape[1] else given[:, 0]
    return given[:, None].float()
