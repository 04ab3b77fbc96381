"""What `Monitor.load_state_dict` is given: whether it is a state, and whether the monitor goes back with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from stethoscope._record import JSON

VERSION = 1
_WANTED = {"version": int, "run": str, "step": int, "watches": Mapping, "diagnosis": Mapping}


def check_state(state: Mapping[str, JSON]) -> None:
    """Raise ValueError unless `state` comes from `Monitor.state_dict` of this version."""
    keys = sorted(state) if isinstance(state, Mapping) else None
    right = keys is not None and all(isinstance(state.get(key), kind) for key, kind in _WANTED.items())
    if not right or state["version"] != VERSION:
        raise ValueError(
            f"Not a state of this version of Monitor: keys {keys}, of version {VERSION} are {sorted(_WANTED)}."
        )


def backwards(now: int, then: int, told: int) -> Finding:
    """Say at step `told` that a state leads from step `now` back to step `then`."""
    return Finding(
        "step-backwards",
        "warning",
        f"The monitor goes back from step {now} to step {then}: steps will appear twice.",
        "Load the monitor's state before the first step, or write to a new folder.",
        told,
    )
