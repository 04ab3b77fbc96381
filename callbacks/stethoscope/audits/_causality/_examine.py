"""Decides one mode: how far ahead, who is to blame, does the batch or the padding leak."""

from __future__ import annotations

from dataclasses import replace
from math import ceil, inf
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope.audits._causality._accuse import accuse
from stethoscope.audits._causality._opinions import disagreements, gradient_leaks, nan_leaks
from stethoscope.audits._causality._perturb import TOLERANCES, Moved, Scan, changes, measured
from stethoscope.audits._causality._repeat import BudgetError, Runs
from stethoscope.audits._causality._report import ModeVerdict

if TYPE_CHECKING:
    from stethoscope.audits._causality._setup import Plan

_POSITIONS = 12
_FEWER = 2
_OVERHEAD = 40
_AGAIN = 8  # passes without which a second look is not worth it


class Examiner:
    """Decides one mode."""

    def __init__(self, runs: Runs, setup: Plan, allowed: int, known: list[int], *, briefly: bool) -> None:
        self.runs = runs
        self.setup = setup
        self.allowed = allowed
        self.known = known
        self.briefly = briefly

    def examine(self, base: dict[str, Tensor]) -> ModeVerdict:
        """Decide in the type given; where rounding could be mistaken for a leak, or hide one, again in float64."""
        dtype = next(iter(base.values())).dtype
        scan = self._scanned(
            self.setup, base, TOLERANCES.get(dtype, TOLERANCES.get(self.setup.inputs.first.dtype, 1e-5))
        )
        reach = max((moved.ahead for moved in scan.seen), default=-inf)
        exact = max((moved.exact for moved in scan.seen), default=-inf)
        short = dtype in (torch.float16, torch.bfloat16)
        if dtype in (torch.float64, torch.complex128):
            return self._verdict(scan, ())
        if exact <= max(reach, self.allowed) and not short and (reach <= self.allowed or self._confirmed(scan)):
            return self._verdict(scan, ())
        verdict = self._verdict_in_float64() if self.runs.widens and self.runs.left >= _AGAIN else None
        if verdict is not None:
            return verdict
        if max((moved.strong for moved in scan.seen), default=-inf) <= self.allowed and self.runs.left >= _AGAIN:
            # Perturbations that change the level let norms blow up rounding: only noise of the input's own level is left.
            level = replace(self.setup, inputs=replace(self.setup.inputs, kinds=("unit",)))
            scan = self._scanned(level, base, scan.tolerance)
        note = f"Changes near rounding were seen; they could not be looked at in float64, so up to {scan.tolerance:.0e} of the largest change counts as rounding."
        return self._verdict(scan, (note,))

    def _confirmed(self, scan: Scan) -> bool:
        """Whether the furthest leak is there in float64, too: a rounding or a comparison makes much of a last bit."""
        best = scan.furthest()
        if best is None or not self.runs.widens or self.runs.left < 2 * _AGAIN:
            return True
        with self.runs.wide():
            wide = self.setup.wide()
            base = self._base_in_float64(wide)
            if base is None:
                return True
            again = Scan(self.runs, wide.inputs, wide.tracks, base, TOLERANCES[torch.float64], wide.pick)
            return again.look(best.start, best.kind).ahead >= best.ahead

    def _verdict_in_float64(self) -> ModeVerdict | None:
        """The verdict with everything in float64; None where the model insists on less."""
        with self.runs.wide():
            wide = self.setup.wide()
            base = self._base_in_float64(wide)
            if base is None:
                return None
            scan = self._scanned(wide, base, TOLERANCES[torch.float64])
            return self._verdict(scan, ("Decided in float64: changes near rounding were seen.",))

    def _base_in_float64(self, wide: Plan) -> dict[str, Tensor] | None:
        try:
            base = wide.outputs(self.runs)
        except (RuntimeError, TypeError, ValueError):
            return None
        whole = all(tensor.dtype in (torch.float64, torch.complex128) for tensor in base.values())
        return base if whole and not self.runs.narrowed else None

    def _scanned(self, setup: Plan, base: dict[str, Tensor], tolerance: float) -> Scan:
        scan = Scan(self.runs, setup.inputs, setup.tracks, base, tolerance, setup.pick)
        # What batch, opinions and culprit need; where that is not there, half of what is.
        kept = min(12, int(min(self.runs.left, 24)) // 2)
        count = _FEWER if self.briefly else _POSITIONS
        if self.runs.limit is not None and not self.briefly:
            # Whoever grants more passes gets more positions.
            count = max(count, int(self.runs.left) - _OVERHEAD)
        positions = scan.positions(count)
        scan.scan([*dict.fromkeys((*self.known, *positions))], 1 if self.briefly else 2, kept)
        scan.climb(kept)
        return scan

    def _verdict(self, scan: Scan, notes: tuple[str, ...]) -> ModeVerdict:
        best = scan.furthest()
        if not scan.seen:
            raise BudgetError(
                f"The budget of {self.runs.limit} forward passes was spent before anything was perturbed."
            )
        if best is None:
            raise ValueError(
                f"No perturbation of x along axis {scan.inputs.time_axis} moved any output: nothing can be said about time. "
                "Give an input that the output depends on."
            )
        lookahead = max(0, int(best.ahead))
        whole = lookahead >= 0.9 * best.start and best.start >= 0.5 * scan.inputs.steps
        batch = self._batch_leak(scan)
        leaks = lookahead > self.allowed
        blame = batch_blame = None
        try:
            if leaks:
                blame = accuse(self.runs, scan, self.setup.other, best, self.allowed, whole=whole)
            if batch is not None:
                batch_blame = accuse(self.runs, scan, self.setup.other, batch, 0, whole=False, batch=True)
        except BudgetError:
            notes = (*notes, "The budget was spent before the culprit was found.")
        nan, gradient = self._opinions(scan, best, leaks=leaks)
        return ModeVerdict(
            lookahead=lookahead,
            allowed=self.allowed,
            culprit=blame.module if blame is not None else None,
            batch_leak=batch is not None,
            padding_leak=self._padding_leak(scan),
            where=_where(scan, self.allowed),
            position=best.start if lookahead else None,
            moved_from=best.first if lookahead else None,
            size=best.size if lookahead else 0.0,
            output_size=best.output_size if lookahead else 0.0,
            dtype=str(next(iter(scan.base.values())).dtype).removeprefix("torch."),
            tolerance=scan.tolerance,
            examined=len({moved.start for moved in scan.seen}),
            nan_leak=nan,
            gradient_leak=gradient,
            notes=(*notes, *disagreements(nan, gradient, leaks=leaks)),
            picture=() if self.briefly and not leaks else self._picture(scan, leaks=leaks),
            blame=blame,
            batch_blame=batch_blame,
        )

    def _batch_leak(self, scan: Scan) -> Moved | None:
        """Change one item everywhere and look at the others."""
        if scan.inputs.items < 2:
            return None
        tries = ((0, 0), (scan.inputs.items - 1, 1))
        for item, kind in tries[:1] if self.briefly else tries:
            if self.runs.left < 1:
                return None
            other = scan.outputs(scan.inputs.perturbed(0, kind, item=item))
            for track in scan.tracks:
                if track.batch is None or other[track.slot].shape != scan.base[track.slot].shape:
                    continue
                change = changes(scan.base[track.slot], other[track.slot], track)
                rest = torch.cat([change[:item], change[item + 1 :]])
                largest = float(measured(change).max())
                if float(rest.max()) > scan.tolerance * largest:
                    return Moved(item, kind, slot=track.slot)
        return None

    def _padding_leak(self, scan: Scan) -> bool | None:
        """Change what lies beyond `lengths` and look at what lies before."""
        inputs = scan.inputs
        if inputs.lengths is None or inputs.batch_axis is None or self.runs.left <= 2:
            return None
        lengths = inputs.lengths
        if int(lengths.min()) >= inputs.steps:
            lengths = lengths.clone()
            lengths[-1] = max(1, 3 * inputs.steps // 4)
        inputs = replace(inputs, lengths=lengths)
        base, other = scan.outputs(inputs), scan.outputs(inputs.perturbed(0, 0, starts=lengths))
        for track in scan.tracks:
            if track.batch is None or base[track.slot].shape != other[track.slot].shape:
                continue
            change = changes(base[track.slot], other[track.slot], track)
            # What a window reaches beyond the end by right is not a leak.
            valid = [max(0, ceil((int(n) - self.allowed) / track.hop)) for n in lengths]
            early = max((float(row[:n].max()) for row, n in zip(change, valid, strict=True) if n), default=0.0)
            if early > scan.tolerance * max(float(measured(change).max()), _size(base[track.slot])):
                return True
        return False

    def _opinions(self, scan: Scan, best: Moved, *, leaks: bool) -> tuple[bool | None, bool | None]:
        if self.runs.left <= 2 or (self.briefly and not leaks):
            return None, None
        start = best.start if best.ahead > 0 else scan.inputs.steps // 2
        return nan_leaks(scan, start, self.allowed), gradient_leaks(scan, start, self.allowed)

    def _picture(self, scan: Scan, *, leaks: bool) -> tuple[tuple[int, tuple[bool, ...]], ...]:
        """Change single steps, to show what each of them moves."""
        rows = []
        steps = scan.inputs.steps
        for start in sorted({steps * k // 8 for k in ((1, 4, 7) if leaks else (2, 6))}):
            if self.runs.left < 1:
                break
            moved = scan.look(start, 0, stop=start + 1)
            if moved.moved:
                rows.append((start, moved.moved))
        return tuple(rows)


def _where(scan: Scan, allowed: int) -> str:
    """Where outputs look ahead, judged by which perturbed steps moved an earlier output."""
    seen = [moved for moved in scan.seen if moved.ahead > -inf]
    bad = {moved.start for moved in seen if moved.ahead > allowed}
    # Steps too near to the start to look ahead by more than allowed say nothing, nor do perturbations of a kind that no
    # step shows a leak for: a gate may open for loud ones only.
    kinds = {moved.kind for moved in seen if moved.ahead > allowed}
    good = {moved.start for moved in seen if moved.kind in kinds and moved.start > allowed} - bad
    if not bad:
        return "nowhere"
    if not good:
        return "everywhere"
    if max(bad) < min(good) and max(bad) < scan.inputs.steps / 2:
        return "at the start"
    return "at block edges"


def _size(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 0.0
