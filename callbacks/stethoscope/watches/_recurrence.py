"""Weights of recurrent layers that the loss does not reach, though it reaches the layer: part of `GradientHealth`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._streaks import listing, owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._streaks import Judging

_OVER_TIME = re.compile(r"weight_hh(_l\d+)?$|weight_[ih]h_l\d+_reverse$")
"""torch's names of the weights from state to state, and of the backward direction."""


def unreached(judging: Judging, gradients: Mapping[str, float]) -> None:
    """Judge weights over time that have a gradient of exactly zero, while another weight of their layer has one.

    The state before the first step is zero: where nothing but that first step is used, or one direction is left out, the
    weights of the others are never asked for. `gradients` are norms by parameter.
    """
    alive = {owner(name) for name, norm in gradients.items() if norm > 0}
    seen = [name for name in gradients if _OVER_TIME.search(name.rpartition(".")[2])]
    hits = [name for name in seen if gradients[name] == 0 and owner(name) in alive]
    news = judging.hold("gradient-zero-recurrence", hits, seen)
    if news:
        back = all(name.endswith("_reverse") for name in news)
        judging.tell(
            Finding(
                "gradient-zero",
                "warning",
                f"The gradient of {listing(news)} is exactly zero, while the rest of the layer has one: "
                + (
                    "what the backward direction returns is not used."
                    if back
                    else "only states that no earlier one has led to are used."
                ),
                "Look at which part of the output is taken: out[:, -1] is the last step, out[:, 0] the first, h_n[-2] and h_n[-1] are the "
                "two directions; sequences of one step have no recurrence.",
                module=owner(news[0]),
            ),
            news,
        )
