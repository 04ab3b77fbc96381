"""Where time runs in a tensor and how fast, found by running two lengths and two batch sizes."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stethoscope.audits._causality._inputs import Inputs

# Highly composite, so that lengths which differ by one of them differ by a whole number of most hops in use.
_DIFFERENCES = (61440, 30720, 15360, 7680, 3840, 1920, 960, 480, 240, 120, 60, 48, 24, 16, 12, 8, 6, 4, 3, 2, 1)


REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError, TypeError, KeyError)
"""What models raise when they do not take an input's size."""


class Track(NamedTuple):
    """One tensor along time: step `n` of `axis` stands for input step `n * hop`."""

    slot: str
    axis: int
    batch: int | None
    hop: Fraction


def tensors(value: Any, slot: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor within tuples, lists, dicts, dataclasses and packed sequences, with the path that leads to it."""
    if isinstance(value, Tensor):
        if not value.is_nested and value.layout.__str__() == "torch.strided":
            yield slot, value
    elif isinstance(getattr(value, "real", None), Tensor) and isinstance(getattr(value, "imag", None), Tensor):
        # Complex numbers made of two real tensors, as torch_complex has them.
        yield from tensors((value.real, value.imag), slot)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{slot}[{key!r}]")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for name, inner in zip(value._fields, value, strict=True):
            yield from tensors(inner, f"{slot}.{name}")
    elif isinstance(value, (tuple, list)):
        for i, inner in enumerate(value):
            yield from tensors(inner, f"{slot}[{i}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for member in fields(value):
            yield from tensors(getattr(value, member.name), f"{slot}.{member.name}")


def numbers(tensor: Tensor) -> Tensor:
    """The tensor, without a gradient, as numbers that can be subtracted: masks and indices count as float64."""
    tensor = tensor.detach()
    return tensor if tensor.is_floating_point() or tensor.is_complex() else tensor.double()


Shapes = dict[Any, tuple[int, ...]]


def shapes(output: Any) -> Shapes:
    """Slot to shape."""
    return {slot: tuple(tensor.shape) for slot, tensor in tensors(output)}


def growing(full: tuple[int, ...], other: tuple[int, ...] | None, wider: tuple[int, ...] | None) -> list[int] | None:
    """Axes that follow time. None where one of them follows the batch as well: time is folded into something else."""
    if other is None or len(other) != len(full):
        return None
    axes = [axis for axis, size in enumerate(full) if other[axis] != size]
    if wider is not None and (len(wider) != len(full) or any(wider[axis] != full[axis] for axis in axes)):
        return None
    return axes


class Lengths(NamedTuple):
    """A second input length and what the model makes of it."""

    steps: int
    shapes: Shapes


def second_length(inputs: Inputs, run: Callable[[Inputs], Any], full: Shapes, *, refused: list[str]) -> Lengths | None:
    """Find another length that the model takes and that changes some output; None where there is none.

    Args:
        inputs: the call at full length.
        run: runs the model and returns its output.
        full: shapes at full length.
        refused: gets the errors of the lengths that the model did not take.
    """
    steps = inputs.steps
    shorter = [steps - d for d in _DIFFERENCES if 2 * d <= steps]
    for other in [*shorter[:3], *shorter[-2:-1], 2 * steps]:
        try:
            found = shapes(run(inputs.resized(other)))
        except REFUSALS as error:
            refused.append(f"{other} steps: {type(error).__name__}: {error}")
            continue
        if any(growing(shape, found.get(slot), None) for slot, shape in full.items()):
            return Lengths(other, found)
    return None


def hop(steps: int, other: int, size: int, other_size: int, size_at: Callable[[int], int] | None = None) -> Fraction:
    """Input steps per step of an axis that has `size` at `steps` and `other_size` at `other` input steps.

    Args:
        steps: one input length.
        other: the other one.
        size: the axis's size at `steps`.
        other_size: its size at `other`.
        size_at: runs another length; asked only where two lengths leave several hops possible.
    """
    change, difference = abs(size - other_size), abs(steps - other)
    guess = Fraction(difference, change)
    if guess == 1 or guess.numerator == 1 or size_at is None:
        return guess
    # A size is a floor of steps / hop, so the change is known to within one.
    lowest, highest = Fraction(difference, change + 1), Fraction(difference, max(change - 1, 1))
    whole = [n for n in range(int(lowest) + 1, int(highest) + 1) if lowest < n < highest]
    if len(whole) == 1:
        return Fraction(whole[0])
    # Sizes change at every hop-th length: look for the two lengths at which the size changes last.
    try:
        last, last_size = _first_length_of(size, steps, size_at)
        before, before_size = _first_length_of(size_at(last - 1), last - 1, size_at) if last > 1 else (0, 0)
    except REFUSALS:
        # The model takes certain lengths only, so the two that it took lie a whole number of hops apart.
        return guess
    stair = Fraction(last - before, max(last_size - before_size, 1))
    return stair if abs(change - difference / stair) <= max(last_size - before_size, 1) else guess


def _first_length_of(size: int, steps: int, size_at: Callable[[int], int]) -> tuple[int, int]:
    """The smallest length at which the axis has `size`, going down from `steps`."""
    low, high, reach = steps, steps, 1
    while low > 1:
        low = max(1, steps - reach)
        if size_at(low) != size:
            break
        high, reach = low, 2 * reach
    while high - low > 1:
        middle = (low + high) // 2
        if size_at(middle) == size:
            high = middle
        else:
            low = middle
    return high, size
