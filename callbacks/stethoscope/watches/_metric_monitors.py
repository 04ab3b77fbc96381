"""Keys that a callback or a scheduler waits for and that nothing logs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


def unknown_monitors(
    asked: Sequence[tuple[str, str]],
    known: Mapping[str, Iterable[str]],
    phase: str = "train",
    absent: Iterable[str] = (),
) -> list[Finding]:
    """Return one finding per key that is asked for and was not logged, with the nearest name.

    A key is judged once its phase has logged something: one that says val, after validation has (Lightning's sanity
    check counts); one that says no phase, after train and val both have.

    Args:
        asked: who asks for which key, e.g. `("EarlyStopping", "val/loss")`.
        known: phase to the names that it has logged so far.
        phase: phase in which this is found, for the finding.
        absent: phases that the run does not have: nothing will be logged in them.

    Examples:
        >>> found = unknown_monitors([("EarlyStopping", "val_los")], {"train": ["loss"], "val": ["val_loss"]})
        >>> found[0].code, found[0].evidence["nearest"]
        ('metric-monitor-unknown', 'val_loss')
    """
    logged = {names.phase(each): list(given) for each, given in known.items()}
    everything = [name for given in logged.values() for name in given]
    seen = {names.split(name).phase or each for each, given in logged.items() for name in given}
    seen |= set(map(names.phase, absent))
    found = []
    for who, key in asked:
        needed = {names.split(key).phase} - {""} or {"train", "val"}
        if key in everything or not needed <= seen:
            continue
        meant = names.nearest(key, everything)
        listed = ", ".join(sorted(set(everything))[:12])
        found.append(
            Finding(
                "metric-monitor-unknown",
                "warning",
                f"{who} asks for {key!r}, which nothing logs (logged so far: {listed})."
                + (f" Nearest name: {meant!r}." if meant else ""),
                f"Set it to {meant!r}, or log {key!r}." if meant else f"Log {key!r}, or monitor a name that is logged.",
                phase=phase,
                evidence={"who": who, "metric": key, **({"nearest": meant} if meant else {})},
            )
        )
    return found
