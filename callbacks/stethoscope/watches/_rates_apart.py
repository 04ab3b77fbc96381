"""Groups of fresh weights whose learning rates are worlds apart: part of `ParameterHealth`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._streaks import Judging

APART = 999.0  # factor between rates of groups; discriminative fine-tuning goes to 100, and begins with weights that were trained


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
