"""Names the first module whose inputs are still causal while its output is not.

Every module is watched in two runs, unperturbed and perturbed. Of each tensor only one number per time step is kept, a
projection on fixed random weights: memory stays small, and two different steps have the same number with probability 0.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from math import floor, inf
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope.audits._causality._axes import growing, hop, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stethoscope.audits._causality._inputs import Inputs
    from stethoscope.audits._causality._repeat import Runs


class Slot(NamedTuple):
    """Names one tensor of one call of one module."""

    module: str
    call: int
    side: str
    path: str


@dataclass
class Call:
    """One call of one module; `begin` and `end` order all calls of a run."""

    module: str
    index: int
    begin: int
    end: int = -1
    inputs: dict[Slot, Any] = field(default_factory=dict[Slot, Any])
    outputs: dict[Slot, Any] = field(default_factory=dict[Slot, Any])


class Place(NamedTuple):
    """Where time runs in one tensor. `axis` None: it has none (`folded` False) or it could not be told (`folded` True)."""

    axis: int | None
    hop: Fraction
    folded: bool


class Suspect(NamedTuple):
    """The module found, and whether some module inside it could not be judged."""

    module: str
    call: int
    axis: int | None
    unknown: bool


@contextmanager
def trace(module: nn.Module, look: Callable[[Slot, Tensor], Any]) -> Iterator[list[Call]]:
    """Look at every tensor that goes into or comes out of a module, in the order in which calls end."""
    finished: list[Call] = []
    running: list[Call] = []
    counts: Counter[str] = Counter()
    clock = iter(range(1 << 60))

    def before(name: str, args: Any, kwargs: Any) -> None:
        call = Call(name, counts[name], next(clock))
        counts[name] += 1
        for path, tensor in tensors((*args, kwargs)):
            slot = Slot(name, call.index, "in", path)
            call.inputs[slot] = look(slot, tensor)
        running.append(call)

    def after(name: str, output: Any) -> None:
        while running and running[-1].module != name:
            running.pop()
        if not running:
            return
        call = running.pop()
        call.end = next(clock)
        for path, tensor in tensors(output):
            slot = Slot(name, call.index, "out", path)
            call.outputs[slot] = look(slot, tensor)
        finished.append(call)

    handles = []
    # Fused inference kernels of torch's own transformer layers call no inner module.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for name, child in module.named_modules():
            if isinstance(child, torch.jit.ScriptModule):  # takes no hooks
                continue
            handles.append(
                child.register_forward_pre_hook(lambda _, a, k, name=name: before(name, a, k), with_kwargs=True)
            )
            handles.append(child.register_forward_hook(lambda _, __, out, name=name: after(name, out)))
        yield finished
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def places(
    run: Callable[[Inputs], dict[Slot, tuple[int, ...]]], inputs: Inputs, other: int | None
) -> dict[Slot, Place]:
    """Find time in every tensor by running two lengths and, where there is a batch axis, two batch sizes.

    Where the model takes one length only (`other` None), an axis as long as time is taken for it.
    """
    full = run(inputs)
    short = run(inputs.resized(other)) if other is not None else {}
    wide = run(inputs.one_more(inputs.batch_axis)) if inputs.batch_axis is not None else None
    found: dict[Slot, Place] = {}
    for slot, shape in full.items():
        changed = short.get(slot) if other is not None else tuple(-(size == inputs.steps) or size for size in shape)
        axes = growing(shape, changed, wide.get(slot) if wide is not None else None)
        if axes is None or len(axes) > 1:
            found[slot] = Place(None, Fraction(1), folded=True)
        elif not axes:
            found[slot] = Place(None, Fraction(1), folded=False)
        elif other is None:
            found[slot] = Place(axes[0], Fraction(1), folded=False)
        else:
            rate = hop(inputs.steps, other, shape[axes[0]], short[slot][axes[0]])
            found[slot] = Place(axes[0], rate, folded=False)
    return found


def batch_places(run: Callable[[Inputs], dict[Slot, tuple[int, ...]]], inputs: Inputs) -> dict[Slot, Place]:
    """The same for the batch axis."""
    assert inputs.batch_axis is not None
    full, more = run(inputs), run(inputs.one_more(inputs.batch_axis))
    found: dict[Slot, Place] = {}
    for slot, shape in full.items():
        axes = growing(shape, more.get(slot), None)
        single = axes is not None and len(axes) == 1 and shape[axes[0]] == inputs.items
        found[slot] = Place(axes[0] if single and axes else None, Fraction(1), folded=bool(axes) and not single)
    return found


class Signer:
    """Turns a tensor into one float64 number per step."""

    def __init__(self, where: dict[Slot, Place]) -> None:
        self._where = where
        self._weights: dict[int, Tensor] = {}

    def __call__(self, slot: Slot, tensor: Tensor) -> Tensor:
        """Project each step on fixed random weights; the whole tensor counts as one step where time has no axis."""
        axis = self._where[slot].axis if slot in self._where else None
        return self.sign(tensor.detach(), axis)

    def sign(self, tensor: Tensor, axis: int | None) -> Tensor:
        """See above."""
        rows = tensor.movedim(axis, 0).reshape(tensor.size(axis), -1) if axis is not None else tensor.reshape(1, -1)
        if rows.is_complex():
            rows = torch.view_as_real(rows.resolve_conj()).flatten(1)
        rows = rows.double().nan_to_num(nan=0.5, posinf=1.5, neginf=-1.5)
        width = rows.size(1)
        if width not in self._weights:
            generator = torch.Generator().manual_seed(width)
            self._weights[width] = torch.randn(width, generator=generator, dtype=torch.float64).to(rows.device)
        return (
            torch.cat([(rows @ self._weights[width])[:, None], rows.abs().amax(1, keepdim=True)], dim=1)
            if width
            else rows.new_zeros(len(rows), 2)
        )


def moved_steps(base: Tensor, other: Tensor, tolerance: float, eps: float) -> Tensor:
    """Which steps differ between two signatures."""
    if base.shape != other.shape:
        return torch.ones(len(other), dtype=torch.bool)
    change = (other - base)[:, 0].abs()
    floor_ = 16 * eps * base[:, 1].max() if len(base) else 0.0
    return change > max(tolerance * float(change.max() if len(change) else 0.0), float(floor_))


def find(
    base: Sequence[Call],
    other: Sequence[Call],
    where: dict[Slot, Place],
    *,
    ahead: Callable[[Tensor, Place], float],
    limit: float,
    whole: float | None,
    moved: Callable[[Tensor, Tensor], Tensor],
) -> list[Suspect]:
    """Modules that turn causal inputs into an output that is not, innermost first, in call order.

    Args:
        base: calls of the unperturbed run.
        other: calls of the perturbed run.
        where: time in each tensor.
        ahead: look-ahead of a tensor, of which steps moved.
        limit: look-ahead that is allowed.
        whole: where the output looks ahead over everything, the look-ahead that counts as that: modules that do so by
            themselves come first, before windows and paddings that look ahead by a few steps.
        moved: which steps differ between two signatures.
    """
    some: list[Suspect] = []
    far: list[Suspect] = []
    unknown: list[tuple[int, int]] = []
    leaked_at = inf
    by_call = {(call.module, call.index): call for call in other}
    for a in base:
        b = by_call.get((a.module, a.index))
        if b is None or a.inputs.keys() != b.inputs.keys():
            continue
        reach = {"in": -inf, "out": -inf}
        tainted = False
        axis = None
        for slot in (*a.inputs, *a.outputs):
            first, second = (a.inputs, b.inputs) if slot.side == "in" else (a.outputs, b.outputs)
            place = where.get(slot, Place(None, Fraction(1), folded=True))
            if slot not in second:
                continue
            steps = moved(first[slot], second[slot])
            if not bool(steps.any()):
                continue
            if place.axis is None:
                tainted |= slot.side == "in"
                if place.folded:
                    unknown.append((a.begin, a.end))
                continue
            reach[slot.side] = max(reach[slot.side], ahead(steps, place))
            axis = place.axis if slot.side == "out" else axis
        if reach["in"] > limit:
            leaked_at = min(leaked_at, a.begin)
        if tainted or reach["in"] == -inf:
            # What moved its output came in unseen.
            continue
        inside = any(a.begin < begin and end < a.end and begin < leaked_at for begin, end in unknown)
        suspect = Suspect(a.module, a.index, axis, inside)
        if reach["in"] <= limit < reach["out"]:
            some.append(suspect)
        if whole is not None and reach["in"] < whole / 2 and reach["out"] >= whole:
            far.append(suspect)
    return far + [suspect for suspect in some if suspect not in far]


def steps_ahead(start: int) -> Callable[[Tensor, Place], float]:
    """How far ahead of `start` the first moved step lies, in input steps; a hop that is no whole number is uncertain by one step."""

    def ahead(moved: Tensor, place: Place) -> float:
        first = int(moved.nonzero()[0])
        slack = 0 if 1 in (place.hop.numerator, place.hop.denominator) else place.hop
        return start - floor(first * place.hop + slack)

    return ahead


def shapes_of(runs: Runs, inputs: Inputs) -> dict[Slot, tuple[int, ...]]:
    """Shapes of every tensor of every module's calls."""
    assert runs.subject.module is not None
    seen: dict[Slot, tuple[int, ...]] = {}

    def look(slot: Slot, tensor: Tensor) -> None:
        seen[slot] = tuple(tensor.shape)

    with trace(runs.subject.module, look):
        runs(inputs.call())
    return seen
