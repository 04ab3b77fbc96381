"""Signals that grow by a factor in each layer of a stack, and gradients that shrink by one: part of `ActivationHealth` and `GradientHealth`."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope.watches._streaks import Judging

FEWEST = 5  # layers that make a stack
STEADY = 0.75  # share of the layers of a stack that go one way
GROWING = 1.5  # factor per layer: residual branches of the size of their input make 1.41 at first, and less with each


def stacks(values: Mapping[str, float]) -> list[list[tuple[str, float]]]:
    """Return what is alike but for one number in its name, in the order of that number: the layers of a stack.

    Examples:
        >>> stacks({"blocks.1.0.out": 2.0, "blocks.0.0.out": 1.0, "head": 3.0})
        [[('blocks.0.0.out', 1.0), ('blocks.1.0.out', 2.0)]]
    """
    found: dict[tuple[str, ...], list[tuple[int, str, float]]] = {}
    for name, value in values.items():
        parts = name.split(".")
        for i, part in enumerate(parts):
            if part.isdigit():
                found.setdefault((*parts[:i], "*", *parts[i + 1 :]), []).append((int(part), name, value))
    return [[(name, value) for _, name, value in sorted(each)] for each in found.values() if len(each) > 1]


def steadily(stack: Sequence[tuple[str, float]], factor: float) -> bool:
    """Whether most layers of a stack multiply by `factor` or more."""
    steps = [late >= factor * early for (_, early), (_, late) in pairwise(stack)]
    return len(stack) >= FEWEST and sum(steps) >= STEADY * len(steps)


def compounding(judging: Judging, outputs: Mapping[str, float], large: float) -> None:
    """Judge stacks whose layers multiply the signal one after the other, to more than `large` times what the first of them returns."""
    blocks = {name: rms for name, rms in outputs.items() if re.search(r"(^|\.)\d+$", name) and 0 < rms < math.inf}
    hits = [stack for stack in stacks(blocks) if stack[-1][1] > large * stack[0][1] and steadily(stack, GROWING)]
    news = judging.hold("activation-exploding-stack", [stack[-1][0] for stack in hits], blocks, times=2)
    if news:
        (first, before), *_, (last, now) = next(stack for stack in hits if stack[-1][0] == news[0])
        judging.tell(
            Finding(
                "activation-exploding",
                "warning",
                f"The signal grows from layer to layer: {first!r} returns an rms of {before:.3g}, {last!r} one of {now:.3g}.",
                "Look for an input that is added twice (in a block and by its caller), scale what residual branches add (by one over the root "
                "of twice the number of layers), or lower the gain of the initialisation.",
                module=first,
            ),
            news,
            outputs,
        )
