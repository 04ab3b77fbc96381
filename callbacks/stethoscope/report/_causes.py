"""Groups findings by what explains them, so that one mistake is told once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from stethoscope._record import SEVERITIES, Finding, Severity

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Consequence:
    """Findings of one code that a cause explains.

    Args:
        code: their code.
        severity: the worst of theirs.
        count: how many there are.
        step: the first one's step.
    """

    code: str
    severity: Severity
    count: int
    step: int | None


@dataclass(frozen=True)
class Cause:
    """All findings of one code that nothing else explains, and what they explain.

    Args:
        code: their code.
        severity: the worst of theirs.
        first: the earliest one of that severity: its message and advice speak for all.
        findings: all of them, in the order of steps.
        explains: findings of other codes that name this one as their cause.
    """

    code: str
    severity: Severity
    first: Finding
    findings: tuple[Finding, ...]
    explains: tuple[Consequence, ...] = ()

    @property
    def steps(self) -> tuple[int, int] | None:
        """First and last step; None where all were found outside of the training."""
        steps = [finding.step for finding in self.findings if finding.step is not None]
        return (min(steps), max(steps)) if steps else None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules concerned, the earliest first."""
        return tuple(dict.fromkeys(finding.module for finding in self.findings if finding.module))

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that found it."""
        return tuple(sorted({finding.rank for finding in self.findings}))

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases it was found in."""
        return tuple(dict.fromkeys(finding.phase for finding in self.findings))


def causes(findings: Sequence[Finding]) -> list[Cause]:
    """Group findings by cause, the most severe first, then the earliest.

    A finding belongs to the code that its `cause` leads to, over several findings if need be. Where the code that
    explains was not found itself, the finding stands on its own.

    Examples:
        >>> nan = Finding("nonfinite-activation", "error", "NaN in 'a'.", "", step=4, module="a")
        >>> loss = Finding("nonfinite-loss", "error", "NaN.", "", step=4, cause="nonfinite-activation")
        >>> [(cause.code, [each.code for each in cause.explains]) for cause in causes([loss, nan])]
        [('nonfinite-activation', ['nonfinite-loss'])]
    """
    above = {finding.code: finding.cause for finding in findings if finding.cause}
    known = {finding.code for finding in findings}
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(_root(finding, above, known), []).append(finding)
    found = [_cause(code, group) for code, group in groups.items()]
    return sorted(found, key=lambda cause: (-_rank(cause.severity), _when(cause.first)))


def worst(findings: Sequence[Finding]) -> Severity | None:
    """Return the most severe severity; None where there is no finding."""
    return max((finding.severity for finding in findings), key=_rank, default=None)


def _root(finding: Finding, above: dict[str, str], known: set[str]) -> str:
    path, cause = [finding.code], finding.cause
    while cause in known:
        if cause in path:  # they name each other
            return min(path[path.index(cause) :])
        path.append(cause)
        cause = above.get(cause, "")
    return path[-1]


def _cause(code: str, group: Sequence[Finding]) -> Cause:
    own = sorted((finding for finding in group if finding.code == code), key=_when)
    others: dict[str, list[Finding]] = {}
    for finding in sorted(group, key=_when):
        if finding.code != code:
            others.setdefault(finding.code, []).append(finding)
    explains = tuple(
        Consequence(other, worst(found) or "info", len(found), found[0].step) for other, found in others.items()
    )
    severity = worst(group) or "info"
    # one code may be told with several causes: then the group of a code need not hold it
    first = min(own or group, key=lambda finding: (-_rank(finding.severity), _when(finding)))
    return Cause(code, severity, first, tuple(own), explains)


def _rank(severity: Severity) -> int:
    return SEVERITIES.index(severity)


def _when(finding: Finding) -> int:
    """Findings of audits, which have no step, come first: they were made before the training."""
    return -1 if finding.step is None else finding.step
