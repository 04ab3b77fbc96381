"""Names of metrics that differ between ranks, which makes a synchronised log call wait for ever."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope._record import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from stethoscope._record import Record


def names_by_rank(records: Iterable[Record]) -> dict[int, dict[str, set[str]]]:
    """Return rank -> phase -> names logged, from the records of several ranks."""
    by_rank: dict[int, dict[str, set[str]]] = {}
    for record in records:
        if record.source == "log":
            by_rank.setdefault(record.rank, {}).setdefault(record.phase, set()).add(record.name)
    return by_rank


def rank_differences(by_rank: Mapping[int, Mapping[str, Iterable[str]]]) -> list[Finding]:
    """Return one finding per name that some ranks log in a phase and others do not.

    No rank asks another one while training: give it what was gathered before (`audits.metrics` does) or recorded
    (`names_by_rank` of the records of all ranks).

    Args:
        by_rank: rank -> phase -> names.

    Examples:
        >>> found = rank_differences({0: {"train": ["loss"]}, 1: {"train": ["loss", "aux"]}})
        >>> found[0].code, found[0].evidence["missing_on"]
        ('metric-ranks', [0])
    """
    found = []
    held = {rank: {(phase, name) for phase in phases for name in phases[phase]} for rank, phases in by_rank.items()}
    for phase, name in sorted(set().union(*held.values())):
        absent = sorted(rank for rank in held if (phase, name) not in held[rank])
        if absent:
            present = sorted(held.keys() - set(absent))
            found.append(
                Finding(
                    "metric-ranks",
                    "error",
                    f"{name!r} in the {phase} metrics is logged on {_ranks(present)}, but not on {_ranks(absent)}.",
                    "Log the same names on every rank (NaN or None where there is no value): reduced across ranks "
                    "(sync_dist=True), a name that one rank lacks waits for ever, or is added to another name.",
                    phase=phase,
                    rank=absent[0],
                    evidence={"metric": name, "logged_on": present, "missing_on": absent},
                )
            )
    return found


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"
