"""Layers that make the same of all items, and masks that are open for all: part of `ActivationHealth`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._streaks import listing

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stethoscope.watches._streaks import Judging

OPEN = 0.99
"""Share of a last sigmoid's values that exceed 0.99. Near zero nothing is said: what is sought in pictures and sounds may be rare."""


def opened(judging: Judging, shares: Mapping[str, float]) -> None:
    """Judge a last sigmoid of which (nearly) all values are at its upper end."""
    news = judging.hold("activation-saturated open", [name for name, share in shares.items() if share >= OPEN], shares)
    if news:
        judging.tell(
            Finding(
                "activation-saturated",
                "warning",
                f"{shares[news[0]]:.0%} of what {news[0]!r} returns, the last module of the model, is above 0.99, whatever it is given: a "
                "mask that is open everywhere, or one answer to all.",
                "Compare targets with inputs (are they the same files?), look at the share of positive labels and at the biases in front.",
                module=news[0],
            ),
            news,
            shares,
        )


def levelled(judging: Judging, flags: Iterable[str], seen: Iterable[str]) -> None:
    """Judge layers that return the same for all items of a batch, though what they are given differs."""
    hits = list(flags)
    news = judging.hold("feature-constant levelled", hits, [*hits, *seen])
    if news:
        judging.tell(
            Finding(
                "feature-constant",
                "warning",
                f"Every item of the batch gets the same from {listing(news)}, though what it is given differs.",
                "Look for a mean, a normalisation or an index over the axis of the batch (a model that was written for (time, batch)?), and "
                "for weights of zero.",
                module=news[0],
            ),
            news,
        )
