"""How large the weights as a whole become: part of `ParameterHealth`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeAlias

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._streaks import Judging

Sizes: TypeAlias = "tuple[int, float, int, float, float]"
"""Step and norm, first and last, and the norm that the usual schemes of initialisation would have given."""

DECAY = 0.01  # share of a weight per step: what 100 steps have taught is gone. 1e-3 (momentum 0.9, 0.1 * 1e-3) is the most that is usual
STRONG = 1e-3  # share of a weight per step, with which a norm that has fallen is no chance
FROM_ZERO = 1 - 1e-5  # update ratio of a weight that was zero before the step
UNJUDGED = -1.0  # in place of a first norm
OUTWARD = 0.4  # cosine of step and weight, mean over parameters; steps that fit weights to data keep near 0
GROWN = 2.0  # factor over the first norm: below, what was learnt is not yet most of the weights
LASTING = 5  # observed steps in a row
STEADY = 0.75  # growth per step, of that since the start: what rewards size goes on and on, weights that began too small arrive


def drift(
    judging: Judging, found: Mapping[str, Mapping[str, float]], sizes: Sizes | None, factor: float
) -> Sizes | None:
    """Judge the norm of all weights against its first, and return what is kept of it; `factor` either way is too much."""
    norms = found["parameter/norm"]
    size = math.hypot(*norms.values(), 0.0)
    if not norms or not math.isfinite(size):
        return sizes
    if sizes is None or sizes[1] == 0:
        # what begins at zero has no size that it could leave: a logistic regression grows as it learns
        zeros = [
            norms[name]
            for name, ratio in found["parameter/update_ratio"].items()
            if ratio > FROM_ZERO and name in norms
        ]
        grows = math.hypot(*zeros, 0.0) > size / 2
        return judging.step, UNJUDGED if grows else size, judging.step, size, _usual(found)
    start, first, last, before, usual = sizes
    decay = found["optimizer/decay"].get("", 0.0)
    _decay(judging, decay, size)
    if first == UNJUDGED:
        return sizes
    change = size / first
    least = factor / (2 if decay > STRONG else 1)
    # what strong decay does to the norm has been told by its cause
    off = (change > factor and size > usual) or (change < 1 / least and decay <= DECAY)
    if judging.model("weight-norm-drift", off):
        grown = change > 1
        judging.tell(
            Finding(
                "weight-norm-drift",
                "warning",
                f"The norm of all weights has {'grown' if grown else 'shrunk'} from {first:.3g} to {size:.3g}.",
                "Lower the learning rate or add weight decay; look at whether targets and inputs are normalised."
                if grown
                else "Weight decay is stronger than the gradients: lower it (AdamW decays by lr * weight_decay per step).",
            ),
            values={"first": first, "now": size},
        )
    step = judging.step
    steady = (size - before) * (step - start) >= STEADY * (size - first) * (step - last)
    grows = steady and size > usual
    _outward(judging, found["parameter/outward"].get("", 0.0) if grows else 0.0, first, size)
    return start, first, step, size, usual


def _usual(found: Mapping[str, Mapping[str, float]]) -> float:
    """The norm of all weights at a gain of one, and of tables at an rms of one: what began smaller may grow as far."""
    norms, gains = found["parameter/norm"], {**found["parameter/gain"], **found["parameter/table_rms"]}
    return math.hypot(*(norms[name] / gain for name, gain in gains.items() if gain > 0 and name in norms), 0.0)


def _decay(judging: Judging, decay: float, size: float) -> None:
    if judging.model("weight-decay-high", decay > DECAY):
        judging.tell(
            Finding(
                "weight-norm-drift",
                "warning",
                f"Weight decay takes {decay:.2g} of each weight per step (lr * weight_decay; 1e-7 to 1e-4 are usual): a weight that the "
                f"gradient does not renew is halved within {math.ceil(math.log(2) / decay)} steps.",
                "Lower weight_decay: AdamW multiplies by 1 - lr * weight_decay per step, and SGD with momentum m by about "
                "1 - lr * weight_decay / (1 - m).",
            ),
            values={"decay": decay, "now": size},
        )


def _outward(judging: Judging, outward: float, first: float, size: float) -> None:
    if judging.model("weight-norm-outward", outward > OUTWARD and size > GROWN * first, times=LASTING):
        judging.tell(
            Finding(
                "weight-norm-drift",
                "warning",
                f"Steps make the weights longer rather than turn them (cosine of step and weight {outward:.2f}, mean over parameters): the "
                f"norm of all weights has grown from {first:.3g} to {size:.3g}.",
                "Look for a term of the loss that rewards large weights: a penalty with the wrong sign, a loss that has no lowest "
                "value; or add weight decay.",
            ),
            values={"outward": outward, "first": first, "now": size},
        )
