"""Relates findings with one cause: the fold that applies the table of `_rules.py`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope._rules import NUMBERS, RULES, Numbers, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Record

MEMORY = 1000  # steps, or half the run, for which a finding is taken to last
KEEP = 0.8  # of the running means of the numbers below


@dataclass(frozen=True)
class Relate:
    """Sets `cause` on findings that another one explains, and adds the one that explains several.

    A finding is taken to last for 1000 steps or half of the run, whichever is more. Phases are kept apart. A finding
    that was delivered before its cause was known stays as it is, and nothing is explained by what was found at a later step:
    what other ranks have found arrives late. Host only; memory is one number per code and phase.

    Examples:
        >>> flat = Finding("loss-plateau", "warning", "Flat.", "", step=500)
        >>> silent = Finding("output-silent", "error", "Silent.", "", step=500)
        >>> relate = Relate()
        >>> [(finding.code, finding.cause) for finding in relate.update(relate.init(), (), (flat, silent))[1]]
        [('output-silent', ''), ('loss-plateau', 'output-silent')]
    """

    rules: tuple[Rule, ...] = RULES

    def init(self) -> State:
        """Nothing known."""
        return {"numbers": {}, "seen": {}}

    def update(
        self, state: State, records: Sequence[Record], findings: Sequence[Finding]
    ) -> tuple[State, Sequence[Finding]]:
        """Take in one delivery; return what to deliver: the same findings, with causes, and those that were added."""
        state = {**state, "numbers": _follow(state["numbers"], records)}
        if not findings:
            return state, findings
        out: list[Finding] = []
        seen = state["seen"]
        for phase in dict.fromkeys(finding.phase for finding in findings):
            of_phase = [finding for finding in findings if finding.phase == phase]
            step = max((finding.step or 0) for finding in of_phase)
            known = {code: [at, severity] for code, (at, severity) in seen.get(phase, {}).items() if _lasts(at, step)}
            known |= {finding.code: [finding.step or 0, finding.severity] for finding in of_phase}
            fresh = {finding.code for finding in of_phase}
            added = self._draw(known, fresh, _of(state["numbers"], phase), step, phase)
            drawn = {finding.code for finding in added}
            known |= {finding.code: [step, finding.severity] for finding in added}
            told = [self._explain(finding, known, fresh, drawn) for finding in [*of_phase, *added]]
            # the cause first: watches do not know of each other, and conclude in the order in which they were given
            out += sorted(told, key=lambda finding: _depth(finding, told))
            seen = {**seen, phase: known}
        return {**state, "seen": seen}, out

    def _draw(
        self, known: Mapping[str, list[Any]], fresh: set[str], now: Numbers, step: int, phase: str
    ) -> list[Finding]:
        """Add at most one finding: the first rule all of whose premises were seen, one of them just now."""
        for rule in self.rules:
            told = rule.code in known or any(known.get(code) for code in self._above(rule))
            serious = all(_is_serious(known, code) for code in rule.drawn_from)
            if rule.drawn_from and fresh & set(rule.drawn_from) and serious and not told and rule.holds(now):
                message, advice = rule.says(now)
                evidence = {"drawn_from": list(rule.drawn_from), **now}
                return [Finding(rule.code, "warning", message, advice, step, phase=phase, evidence=evidence)]
        return []

    def _above(self, rule: Rule) -> list[str]:
        """Causes in earlier rows that explain all that this one is drawn from: then there is nothing to add."""
        rows = self.rules[: self.rules.index(rule)]
        return [row.code for row in rows if set(rule.drawn_from) <= set(row.explains)]

    def _explain(self, finding: Finding, known: Mapping[str, list[Any]], fresh: set[str], drawn: set[str]) -> Finding:
        if finding.cause:
            return finding
        row = {rule.code: i for i, rule in reversed(list(enumerate(self.rules))) if not rule.by_guard}
        now = finding.step
        for i, rule in enumerate(self.rules):
            if finding.code not in rule.explains or not _is_serious(known, rule.code):
                continue  # an info has done no harm
            at: int | None = now if rule.code in drawn else known[rule.code][0]
            later = now is not None and at is not None and at > now
            # of two that explain each other, in one step the upper row is the cause
            mutual = at == now and i > row.get(finding.code, i)
            elsewhere = rule.by_guard and (at != now or rule.code in fresh)
            if not (later or mutual or elsewhere):
                return replace(finding, cause=rule.code)
        return finding


def _depth(finding: Finding, told: Sequence[Finding]) -> int:
    """How many of the findings told with it lie between this one and what began."""
    causes, depth = {each.code: each.cause for each in told}, 0
    while finding.cause in causes and depth < len(causes):
        finding, depth = replace(finding, cause=causes[finding.cause]), depth + 1
    return depth


def _is_serious(known: Mapping[str, list[Any]], code: str) -> bool:
    """Whether a code was found, as more than an info."""
    return code in known and known[code][1] != "info"


def _lasts(at: int, step: int) -> bool:
    return step - at <= max(MEMORY, step / 2)


def _follow(numbers: Mapping[str, float], records: Sequence[Record]) -> Mapping[str, float]:
    fresh = {}
    for record in records:
        value = record.value
        if record.name in NUMBERS and not record.module and isinstance(value, (int, float)) and math.isfinite(value):
            key = f"{record.phase}:{record.name}"
            before = numbers.get(key, value)
            fresh[key] = float(value) if record.name == "lr" else KEEP * before + (1 - KEEP) * value
    return {**numbers, **fresh} if fresh else numbers


def _of(numbers: Mapping[str, float], phase: str) -> Numbers:
    """The numbers of a phase; the learning rate and gradients are known from training."""
    train = {
        name: numbers[f"train:{name}"]
        for name in ("lr", "gradient/norm", "optimizer/held_fraction", "optimizer/steps")
        if f"train:{name}" in numbers
    }
    prefix = f"{phase}:"
    return train | {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}
