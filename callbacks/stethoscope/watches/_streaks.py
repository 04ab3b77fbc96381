"""What holds for how long, module by module: a condition is news once it was seen several times in a row.

Many modules with one fault make one finding: it is told once, with a list, and again only when it has left all of them or when
it holds for twice as many.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stethoscope._record import JSON, Finding, Record

Before = TypeVar("Before")

LISTED = 100
"""Modules that the evidence of a finding lists."""


def confirm(
    memory: Mapping[str, JSON],
    code: str,
    step: int,
    hits: Iterable[str],
    seen: Iterable[str],
    *,
    times: int = 3,
    steps: int = 0,
) -> tuple[dict[str, JSON], list[str]]:
    """Count how often a condition was seen in a row, and say for which modules it is news.

    Args:
        memory: of all codes; not changed.
        code: the condition.
        step: of the observation.
        hits: modules for which it holds now.
        seen: modules that were looked at; others keep their count, since a module that was not called is neither well nor ill.
        times: observations in a row that confirm it.
        steps: steps that must lie between the first of them and now.

    Returns:
        The new memory, and all modules for which it is confirmed, in the order of `hits`; empty where that is no news.

    Examples:
        >>> memory, news = confirm({}, "dead", 0, ["a"], ["a", "b"], times=2)
        >>> confirm(memory, "dead", 50, ["a"], ["a", "b"], times=2)[1]
        ['a']
    """
    held: dict[str, list[int]] = memory.get(code, {}).get("held", {})
    told: list[str] = memory.get(code, {}).get("told", [])
    hit, looked = list(dict.fromkeys(hits)), set(seen)
    kept = {module: value for module, value in held.items() if module not in looked}
    now = kept | {module: [held.get(module, [step, 0])[0], held.get(module, [step, 0])[1] + 1] for module in hit}
    told = [module for module in told if module in now]
    ready = [module for module in hit if now[module][1] >= times and step - now[module][0] >= steps]
    news = ready if set(ready) - set(told) and (not told or len(ready) >= 2 * len(told)) else []
    if news:
        told = news
    if not now and not told:
        return {key: value for key, value in memory.items() if key != code}, []
    return {**memory, code: {"held": now, "told": told}}, news


@dataclass(eq=False)
class Judging:
    """One observed step as it is judged: states that hold are counted, findings gather.

    Args:
        held: what `confirm` remembers; replaced, never changed.
        step: that is judged.
        times: observations in a row that confirm a state.
        steps: steps that they span at least.
    """

    held: Mapping[str, JSON]
    step: int
    times: int
    steps: int
    findings: list[Finding] = field(default_factory=list["Finding"])

    def hold(self, code: str, hits: Iterable[str], seen: Iterable[str], *, times: int | None = None) -> list[str]:
        """Count, see `confirm`; `times` of its own goes before and needs no span. Returns the names that are news."""
        often, span = (self.times, self.steps) if times is None else (times, 0)
        self.held, news = confirm(self.held, code, self.step, hits, seen, times=often, steps=span)
        return news

    def model(self, code: str, hit: bool, *, times: int | None = None) -> bool:
        """Do the same for a state of the model as a whole."""
        return bool(self.hold(code, [""] if hit else [], [""], times=times))

    def tell(self, finding: Finding, names: Sequence[str] = (), values: Mapping[str, float] | None = None) -> None:
        """Add a finding: `names` it is about, at most 100 of them in the evidence, with their `values`."""
        shown: JSON = list(names[:LISTED])
        if names and values is not None:
            shown = {name: values[name] for name in names[:LISTED]}
        evidence = {"modules": shown, "count": len(names)} if names else values or {}
        self.findings.append(replace(finding, step=self.step, evidence={**finding.evidence, **evidence}))


def train_values(records: Sequence[Record], *names: str) -> dict[str, dict[str, float]]:
    """Return, per record name, the numbers of each module that probes have read in training, of its first call."""
    found: dict[str, dict[str, float]] = {name: {} for name in names}
    for record in records:
        if record.name in found and record.source == "probe" and record.phase == "train" and not record.call:
            value = record.value
            found[record.name].setdefault(record.module, float(value) if isinstance(value, (int, float)) else 0.0)
    return found


def told(records: Sequence[Record], name: str, before: Before) -> float | Before:
    """Return what a run says of itself, once, under a name such as `plan/steps`; `before` where these records do not hold it."""
    values = (record.value for record in records if record.name == name)
    return next((float(value) for value in values if isinstance(value, (int, float))), before)


def owner(parameter: str) -> str:
    """Return the module that a parameter belongs to: of a parametrized one, the layer, not what computes its weight."""
    return parameter.rpartition(".")[0].partition(".parametrizations.")[0]


def listing(modules: Sequence[str], most: int = 3) -> str:
    """Return names for a message: the first few, and how many more.

    Examples:
        >>> listing(["a", "b", "c", "d", "e"])
        "'a', 'b', 'c' and 2 more"
    """
    named = ", ".join(repr(module) if module else "the model itself" for module in modules[:most])
    return f"{named} and {len(modules) - most} more" if len(modules) > most else named
