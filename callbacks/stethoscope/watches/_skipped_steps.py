"""Optimizer steps that a `GradScaler` leaves out, one after the other: part of `GradientHealth`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope.watches._streaks import listing, owner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope.watches._streaks import Judging

LONGEST = 20
"""Steps in a row. A scale of 65536 that is halved at each of them is then 0.06: no gradient in float16 needs less."""

FIRST = 30
"""The same from the first step on, where a scale may have been set too high."""


def skipped(judging: Judging, before: Mapping[str, Any] | None, bad: Sequence[str], total: float) -> dict[str, Any]:
    """Judge a step without an optimizer's, whose gradients hold NaN or Inf (`bad`), after `total` optimizer steps of the run.

    Returns what to remember: since when no optimizer has stepped. Between two observed steps `total` tells that none has.
    """
    known = math.isfinite(total)
    since = before["since"] if before is not None and before["total"] == total else judging.step
    count = judging.step - since + 1
    if judging.model("step-skipped", known and count > (LONGEST if total else FIRST), times=1):
        where = f" of {listing(bad, 1)}" if bad else ""
        judging.tell(
            Finding(
                "step-skipped",
                "warning",
                f"No optimizer has stepped for {count} steps{' since the run began' if not total else ''}: the gradient{where} holds NaN or Inf each "
                "time, and the GradScaler leaves the step out. Nothing is learnt.",
                "This is no matter of scale any more (look at scaler.get_scale()): audits.nonfinite finds the operation, and Monitor(guard='raise') "
                "stops at it. Look for an overflow of float16 in the forward pass, for sqrt, norm or log at zero; bfloat16 needs no scaler.",
                module=owner(bad[0]) if bad else "",
            ),
            values={"count": float(count), "since": float(since)},
        )
    return {"since": since, "total": total if known else None}
