"""`Seen`: one thing that an observer reported, in words of ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Seen:
    """One report of warning or above (or info, where so marked).

    Args:
        codes: findings of ours that it stands for: one for ours, for a peer all that its message may mean.
        step: at which it was said.
        modules: names that it points at, the first one first.
        text: what was said.
        cause: code that the observer itself gives as the reason.
        info: below a warning.
    """

    codes: tuple[str, ...]
    step: int
    modules: tuple[str, ...] = ("",)
    text: str = ""
    cause: str = ""
    info: bool = False


def once(reports: list[Seen]) -> list[Seen]:
    """The first of each kind about each module: a peer that repeats itself at every step is counted once."""
    first: dict[tuple[tuple[str, ...], str], Seen] = {}
    for seen in reports:
        first.setdefault((seen.codes, seen.modules[0]), seen)
    return list(first.values())
