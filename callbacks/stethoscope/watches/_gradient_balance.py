"""Modules whose gradient is out of all proportion to the others': part of `GradientHealth`."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._gradient_modules import FEWEST, Module
from stethoscope.watches._streaks import listing

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._streaks import Judging

SHUT = 5  # observed steps in a row: a layer scale that begins at 1e-6 has grown by then


def far_above(judging: Judging, modules: Mapping[str, Module], bar: float) -> None:
    """Judge gradients more than `bar` times the median of all modules, absolutely and relatively."""
    alive = {name: each for name, each in modules.items() if each.relative > 0}
    high: dict[str, float] = {}
    if len(alive) >= FEWEST:
        # of two halves the higher: an adapter's zero half starts with tiny gradients in the other one
        level = sorted(each.gradient for each in alive.values())[len(alive) // 2]
        relative = sorted(each.relative for each in alive.values())[len(alive) // 2]
        high = {
            name: each.gradient / level
            for name, each in alive.items()
            if each.gradient > bar * level and each.relative > bar * relative
        }
    news = judging.hold("gradient-imbalance", high, list(modules))
    if news:
        judging.tell(
            Finding(
                "gradient-imbalance",
                "warning",
                f"The gradient of {listing(news)} is {high[news[0]]:.2g} times the median of all modules: one learning "
                "rate cannot fit both.",
                "Normalise what this module gets (an input in the thousands?), look for a loss term that only reaches it, or "
                "give it a parameter group of its own.",
                module=news[0],
            ),
            news,
            high,
        )


def far_below(judging: Judging, modules: Mapping[str, Module], bar: float) -> None:
    """Judge relative gradients below `bar` times the median of all modules: something that is shut lies between them and the loss."""
    alive = {name: each.relative for name, each in modules.items() if each.relative > 0}
    level = median(alive.values()) if len(alive) >= FEWEST else 0.0
    low = {name: relative for name, relative in alive.items() if relative < bar * level}
    news = judging.hold("gradient-vanishing module", low, list(modules), times=SHUT)
    if news:
        judging.tell(
            Finding(
                "gradient-vanishing",
                "warning",
                f"Hardly any gradient reaches {listing(news)}: {low[news[0]]:.2g} of its weights' norm, where the median of all modules has "
                f"{level:.2g}.",
                "Look at what lies between it and the loss: a sigmoid or tanh far in its flat end (a gate that is shut: its bias), a factor "
                "near zero, scores so small that the softmax behind them is uniform.",
                module=news[0],
            ),
            news,
            low,
        )
