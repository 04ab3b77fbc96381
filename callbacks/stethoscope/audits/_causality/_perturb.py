"""Decides by finite perturbations how far a model looks ahead."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import floor, inf
from typing import TYPE_CHECKING, Any

import torch

from stethoscope.audits._causality._axes import numbers, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from stethoscope.audits._causality._axes import Track
    from stethoscope.audits._causality._inputs import Inputs
    from stethoscope.audits._causality._repeat import Runs

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest change of an earlier output that counts as rounding, relative to the largest change anywhere.

About 80 units of the last place for float32, what an FFT convolution of 10^5 steps makes; far above rounding in float64;
some units for 16 bits, where only the last rounding counts, since sums over time are made in float32.
"""

STRONG = 1e-3
"""Relative change from which on no rounding of float32 comes into question."""


@dataclass(frozen=True)
class Moved:
    """What one perturbation from `start` on moved.

    Args:
        start: first perturbed input step.
        kind: see `Inputs.perturbed`.
        ahead: `start` minus the input step of the earliest output that moved; -inf where nothing did.
        exact: the same where any change of a bit counts.
        strong: the same where only changes above `STRONG` count.
        first: input step of the earliest output that moved.
        size: largest change of an output before `start`, relative to the largest change anywhere.
        output_size: the same change relative to the rms of the output.
        slot: the output concerned.
        moved: per output step, whether it moved, of the output concerned.
    """

    start: int
    kind: int
    ahead: float = -inf
    exact: float = -inf
    strong: float = -inf
    first: int = 0
    size: float = 0.0
    output_size: float = 0.0
    slot: str = ""
    moved: tuple[bool, ...] = ()


@dataclass
class Scan:
    """Perturbs one model in one mode.

    Args:
        runs: calls the model.
        inputs: the unperturbed call.
        tracks: outputs to look at.
        base: outputs of the unperturbed call, by slot.
        tolerance: see `TOLERANCES`.
        pick: takes the outputs to judge out of what the model returned.
    """

    runs: Runs
    inputs: Inputs
    tracks: Sequence[Track]
    base: dict[str, Tensor]
    tolerance: float
    pick: Callable[[Any], Any]
    seen: list[Moved] = field(default_factory=list[Moved])

    def outputs(self, inputs: Inputs) -> dict[str, Tensor]:
        """Call the model and take its outputs along time."""
        return self.take(self.runs(inputs.call()))

    def take(self, output: Any, *, detach: bool = True) -> dict[str, Tensor]:
        """Outputs along time, by slot."""
        wanted = {track.slot for track in self.tracks}
        found = {slot: tensor for slot, tensor in tensors(self.pick(output)) if slot in wanted}
        return {slot: numbers(tensor) for slot, tensor in found.items()} if detach else found

    def look(self, start: int, kind: int, *, stop: int | None = None) -> Moved:
        """Perturb from `start` on and see which outputs move."""
        moved = self.compare(self.outputs(self.inputs.perturbed(start, kind, stop=stop)), start, kind)
        if stop is None:
            self.seen.append(moved)
        return moved

    def compare(self, other: dict[str, Tensor], start: int, kind: int = 0) -> Moved:
        """Find the earliest change between the unperturbed call and another one."""
        best, exact, strong = Moved(start, kind), -inf, -inf
        for track in self.tracks:
            if track.slot not in other or other[track.slot].shape != self.base[track.slot].shape:
                continue
            base = self.base[track.slot]
            change = changes(base, other[track.slot], track)
            largest = measured(change).amax(dim=1, keepdim=True)
            rounding = 16 * torch.finfo(base.dtype).eps * _absmax(base)
            above = change > (self.tolerance * largest).clamp(min=rounding)
            exact = max(exact, start - _first(change > 0, track))
            if not bool(above.any()):
                continue
            strong = max(strong, start - _first(change > STRONG * largest, track))
            first = _first(above, track)
            if start - first > best.ahead:
                early = change[:, : max(0, -floor(-start / track.hop))]
                relative = (early / largest.clamp(min=1e-300)).clamp(max=1.0)
                best = replace(
                    best,
                    ahead=start - first,
                    first=int(first),
                    size=float(relative.max()) if early.numel() else 0.0,
                    output_size=float(measured(early).max()) / (_rms(base) or 1.0) if early.numel() else 0.0,
                    slot=track.slot,
                    moved=tuple(above.any(dim=0).tolist()),
                )
        return replace(best, exact=exact, strong=strong)

    def positions(self, count: int) -> list[int]:
        """Steps to perturb from: the end, the middle, the first ones, powers of two, round numbers and evenly between.

        One perturbation from step `m` on catches every dependence of an output before `m` on any input from `m` on, so
        few are enough; what they can miss is a short look-ahead that occurs at a few isolated steps only.
        """
        steps = self.inputs.steps
        if steps - 1 <= count:
            return sorted(range(1, steps), key=lambda m: (m not in (1, steps - 1), m))
        wanted = [steps - 1, 1, steps // 2, 2, steps // 2 + 1, 3, steps - 2]
        powers = [2**k for k in range(2, steps.bit_length())][::-1]
        round_ones = [10 * 2**k for k in range(steps.bit_length())]
        even = [round(steps * (k + 0.5) / count) for k in range(count)]
        for i in range(max(len(powers), len(round_ones), len(even))):
            wanted += [*powers[i : i + 1], *even[i : i + 1], *round_ones[i : i + 1]]
        return [m for m in dict.fromkeys(wanted) if 0 < m < steps][:count]

    def scan(self, positions: Sequence[int], thorough: int, reserve: int) -> None:
        """Look at every position.

        Args:
            positions: steps to perturb from.
            thorough: how many of them, the first ones, get every kind of perturbation; the others get one pass each.
            reserve: forward passes to leave in the budget.
        """
        per_pass = min(self.inputs.items, len(self.inputs.kinds))
        turn = 0
        for i, start in enumerate(positions):
            kinds = range(0, len(self.inputs.kinds), per_pass) if i < thorough else (turn % len(self.inputs.kinds),)
            for kind in kinds:
                if self.runs.left <= reserve:
                    return
                moved = self.look(start, kind)
                if moved.ahead >= start - self._first_step() and start >= 0.9 * self.inputs.steps:
                    return
            turn += per_pass

    def climb(self, reserve: int) -> None:
        """From the furthest looks ahead, go on to the last input step that the same output depends on."""
        leads = sorted((moved for moved in self.seen if moved.ahead > 0), key=lambda moved: -moved.ahead)
        done: set[tuple[str, int]] = set()
        for lead in leads:
            if (lead.slot, lead.first) in done or len(done) == 3:
                continue
            done.add((lead.slot, lead.first))
            low, high, reach = lead.start, self.inputs.steps - 1, 1
            if low >= high or self._still(high, lead, reserve):
                continue
            while low + reach < high:
                if self._still(low + reach, lead, reserve):
                    low, reach = low + reach, 2 * reach
                else:
                    high = low + reach
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._still(middle, lead, reserve) else (low, middle)

    def furthest(self) -> Moved | None:
        """The perturbation that moved the output furthest ahead of it; None where none moved any."""
        return max((moved for moved in self.seen if moved.ahead > -inf), key=lambda moved: moved.ahead, default=None)

    def _still(self, start: int, lead: Moved, reserve: int) -> bool:
        if self.runs.left <= reserve:
            return False
        moved = self.look(start, lead.kind)
        return moved.ahead > -inf and moved.first <= lead.first

    def _first_step(self) -> int:
        return max((floor(track.hop) for track in self.tracks), default=0)


def changes(base: Tensor, other: Tensor, track: Track) -> Tensor:
    """Largest absolute change per item and step, float64. Non-finite on both sides is no change, on one side is inf."""
    kind = torch.complex128 if base.is_complex() else torch.float64
    base, other = base.to(kind), other.to(kind)
    change = (other - base).abs()
    change = torch.where(torch.isfinite(base) & torch.isfinite(other), change, torch.full_like(change, inf))
    change = torch.where((base == other) | (torch.isnan(base) & torch.isnan(other)), torch.zeros_like(change), change)
    change = change.movedim(track.axis, 0)
    if track.batch is None:
        return change.reshape(len(change), -1).amax(dim=1)[None] if change.dim() > 1 else change[None]
    batch = track.batch + 1 if track.batch < track.axis else track.batch
    return change.movedim(batch, 0).reshape(change.size(batch), change.size(0), -1).amax(dim=2)


def measured(change: Tensor) -> Tensor:
    """Changes that are a measure for others: a number that turned into NaN or Inf, or back, has moved, but is none."""
    return change.nan_to_num(posinf=0.0)


def _first(moved: Tensor, track: Track) -> float:
    """Input step of the first output step that moved, inf for none."""
    at = moved.any(dim=0).nonzero()
    return floor(int(at[0]) * track.hop) if len(at) else inf


def _absmax(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].abs().double()
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0
