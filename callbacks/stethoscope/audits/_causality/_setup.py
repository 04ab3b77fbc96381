"""Finds out, before anything is decided, how a model's outputs follow its inputs, and that it answers reliably."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stethoscope.audits._causality._axes import REFUSALS, Track, growing, hop, numbers, second_length, shapes, tensors
from stethoscope.audits._causality._culprit import Signer, trace
from stethoscope.audits._causality._repeat import BudgetError

if TYPE_CHECKING:
    from collections.abc import Callable

    from stethoscope.audits._causality._inputs import Inputs
    from stethoscope.audits._causality._repeat import Runs


@dataclass(frozen=True)
class Plan:
    """What is called with what, and which outputs are looked at.

    Args:
        inputs: the unperturbed call, batch axis known.
        tracks: outputs along time.
        pick: takes the outputs to judge out of what the model returned.
        other: another input length that the model takes, None where there is none.
        notes: what a reader should know.
    """

    inputs: Inputs
    tracks: tuple[Track, ...]
    pick: Callable[[Any], Any]
    other: int | None
    notes: tuple[str, ...] = ()

    def outputs(self, runs: Runs) -> dict[str, Tensor]:
        """Call unperturbed and keep the outputs along time, by slot."""
        wanted = {track.slot for track in self.tracks}
        found = tensors(self.pick(runs(self.inputs.call())))
        return {slot: numbers(tensor).clone() for slot, tensor in found if slot in wanted}

    def wide(self) -> Plan:
        """The same in float64."""
        return replace(self, inputs=self.inputs.wide())


def picker(output: Any) -> Callable[[Any], Any]:
    """Turn `output=` into a function: None, a key, an index, a tuple of those, or a callable."""
    if output is None:
        return lambda value: value
    if callable(output):
        picked: Callable[[Any], Any] = output
        return picked
    path = output if isinstance(output, tuple) else (output,)

    def pick(value: Any) -> Any:
        for part in path:
            try:
                value = getattr(value, part) if isinstance(part, str) and hasattr(value, part) else value[part]
            except (KeyError, IndexError, TypeError) as error:  # a path has two parts or three
                legal = list(value) if isinstance(value, dict) else f"a {type(value).__name__}"
                raise ValueError(f"output={output!r}: the model's output has no {part!r}; it is {legal}.") from error
        return value

    return pick


def plan(runs: Runs, inputs: Inputs, out_time_axis: int | None, output: Any) -> Plan:
    """Run the model at two lengths and two batch sizes, and find the outputs along time.

    Raises:
        ValueError: the model fails on the input, takes no other length, or returns nothing along time.
    """
    pick = picker(output)
    shape = tuple(inputs.first.shape)

    def run(other: Inputs) -> Any:
        return pick(runs(other.call()))

    try:
        whole = runs(inputs.call())
    except REFUSALS as error:
        raise ValueError(
            f"The model fails on x of shape {shape}: {type(error).__name__}: {error}. Where x is shorter than the receptive field, give a longer one."
        ) from error
    full = shapes(pick(whole))
    refused: list[str] = []
    second = second_length(inputs, run, full, refused=refused)
    inputs, wider = _with_batch(inputs, run, full)
    tracks = _tracks(inputs, full, second, wider, out_time_axis, run)
    if not tracks:
        found = ", ".join(f"{slot or 'output'} {size}" for slot, size in full.items()) or "no tensor"
        taken = f" The model took no other length ({'; '.join(refused[:2])})." if refused and second is None else ""
        raise ValueError(
            f"No output follows time: x has shape {shape}, {inputs.steps} steps along axis {inputs.time_axis}; got {found}.{taken} "
            "Is time_axis right? Give the output's time axis as out_time_axis where it is fixed, or pick an output along time with output=."
        )
    notes: tuple[str, ...] = ()
    if inputs.batch_axis is None:
        notes = ("No batch axis was found, so leaks across the batch were not examined.",)
    elif inputs.items == 1:
        inputs = inputs.one_more(inputs.batch_axis)
        notes = ("x has one item; it was taken twice, so that leaks across the batch show.",)
    return Plan(inputs, tuple(tracks), pick, second.steps if second is not None else None, notes)


def _with_batch(inputs: Inputs, run: Callable[[Inputs], Any], full: dict[Any, tuple[int, ...]]) -> tuple[Inputs, Any]:
    """Axis 0 (1 where time is axis 0) is a batch if the model takes one item more and returns one item more."""
    axis = 1 if inputs.time_axis % inputs.first.dim() == 0 else 0
    if inputs.first.dim() < 2:
        return inputs, None
    try:
        wider = shapes(run(inputs.one_more(axis)))
    except BudgetError:
        raise
    except Exception:  # a model may refuse another batch size in any way
        return inputs, None
    items = inputs.first.size(axis)
    for slot, shape in full.items():
        axes = growing(shape, wider.get(slot), None)
        if axes and any(shape[a] == items and wider[slot][a] == items + 1 for a in axes):
            return replace(inputs, batch_axis=axis), wider
    return inputs, wider


def _tracks(
    inputs: Inputs, full: Any, second: Any, wider: Any, out_time_axis: int | None, run: Callable[[Inputs], Any]
) -> list[Track]:
    tracks = []
    for slot, shape in full.items():
        other = second.shapes.get(slot) if second is not None else None
        axes = growing(shape, other, wider.get(slot) if wider is not None else None) or []
        if out_time_axis is not None:
            if not -len(shape) <= out_time_axis < len(shape):
                continue
            axis = out_time_axis % len(shape)
            if axis not in axes and second is not None:
                continue
        elif len(axes) == 1:
            axis = axes[0]
        elif axes and inputs.time_axis % len(shape) in axes:
            axis = inputs.time_axis % len(shape)
        elif axes:
            raise ValueError(
                f"Axes {axes} of output {slot or ''}{shape} all follow time. Say which one with out_time_axis."
            )
        else:
            continue

        def size_at(steps: int, slot: str = slot, axis: int = axis) -> int:
            return shapes(run(inputs.resized(steps)))[slot][axis]

        rate = (
            Fraction(inputs.steps, shape[axis])
            if other is None
            else hop(inputs.steps, second.steps, shape[axis], other[axis], size_at)
        )
        known = inputs.batch_axis is not None and wider is not None and slot in wider
        batch = next((a for a, size in enumerate(shape) if known and wider[slot][a] != size), None)
        tracks.append(Track(slot, axis, batch, rate))
    return tracks


def repeats(runs: Runs, setup: Plan, mode: str) -> dict[str, Tensor]:
    """Ask the same question twice and return the outputs along time.

    In eval mode the RNG goes on in between: a model that draws random numbers there is not finished for use. In train
    mode it is set back, so that dropout drops the same.

    Raises:
        ValueError: the answers differ.
    """

    def ask(*, fresh: bool) -> dict[str, Tensor]:
        found = tensors(setup.pick(runs(setup.inputs.call(), fresh=fresh)))
        return {slot: numbers(tensor).clone() for slot, tensor in found}

    first, second = ask(fresh=True), ask(fresh=mode == "train")
    worst = 0.0
    for slot, tensor in first.items():
        if slot not in second or second[slot].shape != tensor.shape:
            worst = float("inf")
            continue
        kind = torch.complex128 if tensor.is_complex() else torch.float64
        a, b = tensor.to(kind), second[slot].to(kind)
        gap = (a - b).abs()[~((a == b) | (torch.isnan(a) & torch.isnan(b)))]
        if gap.numel():
            scale = float(a[torch.isfinite(a)].abs().max()) if bool(torch.isfinite(a).any()) else 1.0
            worst = max(worst, float(gap.nan_to_num(float("inf")).max()) / (scale or 1.0))
    if worst <= 1e-6:
        wanted = {track.slot for track in setup.tracks}
        return {slot: tensor for slot, tensor in first.items() if slot in wanted}
    who = _restless(runs, setup, mode)
    cause = (
        "it keeps state between calls or draws from a generator of its own: reset it in a function given as forward="
        if mode == "train"
        else "switch off its random numbers in eval mode (dropout with training=self.training, dither, sampling), or reset the state that it keeps between calls; "
        "random numbers from torch's, numpy's or python's global generator are repeated with modes=('train',)"
    )
    raise ValueError(
        f"The model is not deterministic in {mode} mode: two calls with the same input differ by {worst:.1e} of the largest output"
        f"{f', first in module {who!r}' if who else ''}. A change cannot be told from that: {cause}."
    )


def _restless(runs: Runs, setup: Plan, mode: str) -> str:
    """The first module that gives two answers to the same inputs."""
    module = runs.subject.module
    if module is None or runs.left < 4:
        return ""
    signer = Signer({})
    with trace(module, signer) as first:
        runs(setup.inputs.call())
    with trace(module, signer) as second:
        runs(setup.inputs.call(), fresh=mode == "train")
    for a, b in zip(first, second, strict=False):
        same_in = all(torch.equal(v, b.inputs.get(k, v)) for k, v in a.inputs.items())
        same_out = all(torch.equal(v, b.outputs.get(k, v)) for k, v in a.outputs.items())
        if same_in and not same_out:
            return a.module or type(module).__name__
    return ""
