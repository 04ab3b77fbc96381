"""Turns a measured leak into a named culprit: suspects from two runs, confirmed one by one, then the source line."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope.audits._causality._culprit import (
    Place,
    Signer,
    Slot,
    Suspect,
    batch_places,
    find,
    moved_steps,
    places,
    shapes_of,
    steps_ahead,
    trace,
)
from stethoscope.audits._causality._operations import Line, Operations
from stethoscope.audits._causality._patch import patched
from stethoscope.audits._causality._perturb import Moved, Scan, changes
from stethoscope.audits._causality._why import reason

if TYPE_CHECKING:
    from collections.abc import Callable

    from stethoscope.audits._causality._inputs import Inputs
    from stethoscope.audits._causality._repeat import Runs

_SUSPECTS = 6


@dataclass(frozen=True)
class Culprit:
    """The first module whose inputs are still causal while its output is not.

    Args:
        module: its name; `""` for the root, None where there is no module at all.
        type: its class.
        why: what it does.
        advice: what to change.
        axis: its time axis, `"unknown"` where a module inside it, whose time axis could not be told, may be the one.
        operation: the operation, where it was found.
        source: file, line and code of it.
        alike: other modules of the same type in the model.
    """

    module: str | None
    type: str
    why: str
    advice: str
    axis: int | str | None = None
    operation: str = ""
    source: str = ""
    alike: tuple[str, ...] = ()

    def __str__(self) -> str:
        who = (
            "The function itself"
            if self.module is None
            else f"Module {self.module!r} ({self.type})"
            if self.module
            else f"The model's own forward ({self.type})"
        )
        line = f", at {self.source}" if self.source and self.source not in self.why else ""
        alike = f" {len(self.alike)} more of its type are in the model." if self.alike else ""
        unknown = (
            " A module inside it, whose time axis could not be told, may be the one." if self.axis == "unknown" else ""
        )
        return f"{who} {self.why}{line}.{unknown}{alike}"

    def evidence(self) -> dict[str, Any]:
        """JSON for a finding."""
        return {
            "type": self.type,
            "why": self.why,
            "axis": self.axis,
            "operation": self.operation,
            "source": self.source,
            "alike": list(self.alike),
        }


def accuse(
    runs: Runs, scan: Scan, other: int | None, leak: Moved, allowed: int, *, whole: bool, batch: bool = False
) -> Culprit:
    """Find who leaks.

    Args:
        runs: calls the model, in the mode of the leak.
        scan: what was decided.
        other: a second input length; None where the model takes one length only.
        leak: the perturbation that showed the leak.
        allowed: look-ahead that was declared.
        whole: whether the leak reaches the start from afar.
        batch: look for leaks across the batch, of item `leak.start`.
    """
    return _Search(runs, scan, other, leak, allowed, whole=whole, batch=batch).run()


class _Search:
    def __init__(
        self, runs: Runs, scan: Scan, other: int | None, leak: Moved, allowed: int, *, whole: bool, batch: bool
    ) -> None:
        self.runs = runs
        self.scan = scan
        self.other = other
        self.leak = leak
        self.allowed = 0 if batch else allowed
        self.whole = 0.9 * leak.ahead if whole else None
        self.batch = batch
        self.inputs = scan.inputs
        self.perturbed = (
            self.inputs.perturbed(0, leak.kind, item=leak.start)
            if batch
            else self.inputs.perturbed(leak.start, leak.kind)
        )
        eps = {torch.float64: 2.3e-16, torch.complex128: 2.3e-16}.get(self.inputs.first.dtype, 1.2e-7)
        self.moved: Callable[[Tensor, Tensor], Tensor] = lambda a, b: moved_steps(a, b, scan.tolerance, eps)
        self.ahead = self._items_ahead if batch else steps_ahead(leak.start)

    def run(self) -> Culprit:
        module = self.runs.subject.module
        if module is None:
            return self._named(Suspect("", 0, None, unknown=False), None)
        where = (
            batch_places(lambda i: shapes_of(self.runs, i), self.inputs)
            if self.batch
            else places(lambda i: shapes_of(self.runs, i), self.inputs, self.other)
        )
        signer = Signer(where)
        with trace(module, signer) as base:
            self.runs(self.inputs.call())
        with trace(module, signer) as other:
            self.runs(self.perturbed.call())
        suspects = find(base, other, where, ahead=self.ahead, limit=self.allowed, whole=self.whole, moved=self.moved)
        for suspect in suspects[:_SUSPECTS]:
            if self._harms(module, suspect, where):
                return self._named(suspect, module)
        return self._named(Suspect("", 0, None, unknown=False), module)

    def _items_ahead(self, moved: Tensor, _: Place) -> float:
        others = moved.clone()
        if len(others) == self.inputs.items:
            others[self.leak.start] = False
        return 1.0 if bool(others.any()) else 0.0

    def _harms(self, module: nn.Module, suspect: Suspect, where: dict[Slot, Place]) -> bool:
        """Whether the output still leaks when nothing but the suspect's early steps is put into the unperturbed run."""
        if suspect.module == "" or self.runs.left < 2:
            return True

        def early(place: Place, size: int) -> Tensor:
            if self.batch:
                return torch.arange(size) != self.leak.start
            return torch.arange(size) < ceil(self.leak.start / place.hop)

        try:
            output = patched(
                module,
                suspect,
                where,
                lambda: self.runs(self.inputs.call()),
                lambda: self.runs(self.perturbed.call()),
                early,
            )
        except (RuntimeError, TypeError, ValueError):
            return True
        found = self.scan.take(output)
        if self.batch:
            return any(
                track.batch is not None and self._others_change(self.scan.base[track.slot], found[track.slot], track)
                for track in self.scan.tracks
            )
        return self.scan.compare(found, self.leak.start, self.leak.kind).ahead > self.allowed

    def _others_change(self, base: Tensor, other: Tensor, track: Any) -> bool:
        change = changes(base, other, track)
        change[self.leak.start] = 0
        return bool(change.max() > 0)

    def _named(self, suspect: Suspect, root: nn.Module | None) -> Culprit:
        module = dict(root.named_modules())[suspect.module] if root is not None else None
        line, statistic = self._line(module, suspect)
        ahead = 0 if self.batch else int(self.leak.ahead)
        explained = reason(
            module,
            whole=self.whole is not None,
            batch=self.batch,
            ahead=ahead,
            statistic=str(statistic) if statistic else "",
        )
        alike = (
            tuple(name for name, m in root.named_modules() if type(m) is type(module) and name != suspect.module)
            if root is not None and suspect.module
            else ()
        )
        return Culprit(
            suspect.module if root is not None else None,
            type(module).__name__ if module is not None else "function",
            explained.why,
            explained.advice,
            "unknown" if suspect.unknown else suspect.axis,
            line.operation if line else "",
            str(line) if line else "",
            alike,
        )

    def _line(self, module: nn.Module | None, suspect: Suspect) -> tuple[Line | None, Line | None]:
        """The first operation in the culprit's own forward whose output leaks, and the statistic behind it, if any."""
        inside_torch = module is not None and type(module).__module__.startswith("torch.nn.modules")
        if self.runs.left < 5 or inside_torch:
            return None, None
        try:
            return self._first_operation(module, suspect)
        except (RuntimeError, TypeError, ValueError):
            return None, None

    def _first_operation(self, module: nn.Module | None, suspect: Suspect) -> tuple[Line | None, Line | None]:
        # A root that is not called itself (another method is) has no call to wait for.
        waits = module if suspect.module or module is None or self._root_is_called() else None

        def watch(inputs: Inputs, look: Any) -> Operations:
            operations = Operations(look, waits, suspect.call)
            with operations:
                self.runs(inputs.call())
            return operations

        def look_at_shape(_: Slot, tensor: Tensor) -> tuple[int, ...]:
            return tuple(tensor.shape)

        def sizes(inputs: Inputs) -> dict[Slot, tuple[int, ...]]:
            return {slot: shape for _, looked in watch(inputs, look_at_shape).seen for slot, shape in looked.items()}

        where = batch_places(sizes, self.inputs) if self.batch else places(sizes, self.inputs, self.other)
        signer = Signer(where)
        base, other = watch(self.inputs, signer), watch(self.perturbed, signer)
        statistic = None
        for (line, a), (_, b) in zip(base.seen, other.seen, strict=False):
            if a.keys() != b.keys():
                break
            for slot in a:
                moved = self.moved(a[slot], b[slot])
                place = where.get(slot, Place(None, Fraction(1), folded=True))
                if not bool(moved.any()) or place.folded:
                    continue
                if place.axis is None:
                    statistic = statistic or line
                elif self.ahead(moved, place) > self.allowed:
                    return line, statistic
        return None, None

    def _root_is_called(self) -> bool:
        call = self.runs.subject.call
        return call is self.runs.subject.module
