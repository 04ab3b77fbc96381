"""Weights that are put back to where they were, and groups whose rates are worlds apart: part of `ParameterHealth`."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from stethoscope._record import Finding
from stethoscope.watches._weight_size import FROM_ZERO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._parameter_roles import Values
    from stethoscope.watches._streaks import Judging

FEWEST = 4  # parameters: the norm of a few may pass the same value twice
NEAR = (
    0.25  # of the furthest distance so far: training that goes round does not come that near, twice, in all parameters
)
MOVED = 0.01  # distance below which nothing was learnt that could be lost
TIMES = 2  # a checkpoint may be gone back to once
APART = 999.0  # factor between rates of groups; discriminative fine-tuning goes to 100, and begins with weights that were trained

Way: TypeAlias = "dict[str, Any]"
"""Norms at the first look, the furthest distance from them since, and how often they were come back to."""


def set_back(judging: Judging, found: Mapping[str, Values], way: Way | None) -> Way | None:
    """Judge whether the norms of all parameters come back to those of the first look again and again; return what is kept."""
    norms, ratios = found["parameter/norm"], found["parameter/update_ratio"]
    if way is None:
        # what begins at zero is far from where it was after any step
        first = {name: norm for name, norm in norms.items() if norm > 0 and ratios.get(name, 1.0) <= FROM_ZERO}
        return {"first": first, "step": judging.step, "far": 0.0, "returns": 0}
    first = way["first"]
    if len(first) < FEWEST or not all(math.isfinite(norms.get(name, math.nan)) for name in first):
        return way
    # each by its own size, and the middle one: where most rest, the few others may walk back by chance
    far = median(abs(norms[name] - norm) / norm for name, norm in first.items())
    back = far < NEAR * way["far"] and way["far"] > MOVED
    returns = way["returns"] + back
    if judging.model("weights-set-back", returns >= TIMES, times=1):
        judging.tell(
            Finding(
                "update-ratio-high",
                "warning",
                f"The weights are back near those of step {way['step']}, for the {returns}th time (distance of their norms {far:.2g}, after "
                f"{way['far']:.2g}): something other than the optimizer writes them, and what was learnt in between is lost.",
                "Look for load_state_dict() or a copy of the weights inside of the loop: a best checkpoint by the wrong mode (min, max), a reset per "
                "epoch, a moving average that is never updated.",
            ),
            values={"distance": far, "before": way["far"], "returns": returns},
        )
    return {**way, "far": far if back else max(far, way["far"]), "returns": returns}


def rates_apart(judging: Judging, rates: Mapping[str, float], *, fresh: bool) -> None:
    """Judge groups whose learning rates differ by a factor of a thousand; `fresh` says that the weights are, and no schedule is through."""
    alive = {name: rate for name, rate in rates.items() if rate > 0}
    least, most = min(alive, key=alive.__getitem__, default=""), max(alive, key=alive.__getitem__, default="")
    if judging.model("rates-apart", fresh and len(alive) > 1 and alive[most] >= APART * alive[least]):
        judging.tell(
            Finding(
                "update-ratio-low",
                "warning",
                f"The rate of one group of parameters ({least}: {alive[least]:.2g}) is {alive[most] / alive[least]:.0f} times below that of another "
                f"({most}: {alive[most]:.2g}), though the weights are fresh: the first group hardly learns.",
                "Compare the groups' rates; rates far apart are for weights that were trained before.",
            ),
            values=alive,
        )
