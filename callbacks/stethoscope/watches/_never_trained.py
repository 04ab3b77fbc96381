"""Layers that stay as they were drawn, though an optimizer holds them: part of `ParameterHealth`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._parameter_roles import FROZEN
from stethoscope.watches._streaks import listing, owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._parameter_roles import Values
    from stethoscope.watches._streaks import Judging

PATIENCE = 0.3  # share of the planned steps in which a plan of thawing may begin
UNPLANNED = 1000.0  # steps, where nothing is planned


def never_trained(judging: Judging, found: Mapping[str, Values], fresh: list[str] | None, planned: float) -> list[str]:
    """Judge weights that are frozen since the start although an optimizer holds them, and as an initialisation has drawn them.

    A backbone that was loaded, a base of LoRA or filters that were computed are not as drawn; who wants random features does not give
    them to an optimizer.

    Args:
        judging: the observed step.
        found: records by name.
        fresh: weights that were as drawn at the first look, and have not moved since; None before it.
        planned: steps of the run, 0 where that is not known.

    Returns:
        `fresh`, without those that have moved.
    """
    roles, still = found["parameter/role"], found["parameter/unchanged"]
    before = list(found["parameter/drawn"]) if fresh is None else fresh
    resting = [name for name in before if roles.get(name, FROZEN) == FROZEN and still.get(name, 1.0) == 1.0]
    hits = [name for name in resting if name in found["parameter/listed"]] if is_late(judging.step, planned) else []
    news = judging.hold("optimizer-frozen-parameters", hits, roles)
    if news:
        judging.tell(
            Finding(
                "optimizer-frozen-parameters",
                "warning",
                f"{len(news)} of {len(roles)} parameters ({listing(news)}) are in the optimizer, but frozen since the start, and as their "
                "initialisation has drawn them: random layers that never learn.",
                "If they are to be trained, requires_grad_(True); if they were to be loaded, look at what load_state_dict has matched; if "
                "random features are meant, leave them out of the optimizer.",
                module=owner(news[0]),
            ),
            news,
        )
    return resting


def is_late(step: int, planned: float) -> bool:
    """Whether parts that are to be thawed or grown would be so by now, in a run of `planned` steps (0: not known)."""
    return step >= (PATIENCE * planned or UNPLANNED)
