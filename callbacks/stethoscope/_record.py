"""The values on the wire: what a probe measured (`Record`), what a watch concluded (`Finding`), what an audit returns (`Report`).

Standard library only. Everything here is immutable and lives on the host.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from rich.console import RenderableType

JSON: TypeAlias = Any
"""None, bool, int, float, str, or a list or str-keyed dict of them."""

Severity: TypeAlias = Literal["info", "warning", "error"]
Source: TypeAlias = Literal["probe", "step", "log"]

SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
"""From harmless to fatal."""


def strict_number(value: float) -> float | str:
    """Return a number as strict JSON has it: NaN and Inf are `"NaN"`, `"Infinity"`, `"-Infinity"`.

    Examples:
        >>> strict_number(1.5), strict_number(float("-inf"))
        (1.5, '-Infinity')
    """
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def strict(value: Any) -> JSON:
    """Return strict JSON of mappings, lists and numbers, see `strict_number`; what JSON does not know becomes text.

    Examples:
        >>> strict({"at": (1, float("nan"))})
        {'at': [1, 'NaN']}
    """
    if isinstance(value, float):
        return strict_number(value)
    if isinstance(value, Mapping):
        return {str(key): strict(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [strict(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


class Histogram(NamedTuple):
    """Counts between edges.

    Args:
        edges: `n + 1` strictly increasing numbers. The outermost bins also hold what lies beyond them.
        counts: `n` counts of finite values.
    """

    edges: tuple[float, ...]
    counts: tuple[float, ...]


class Record(NamedTuple):
    """One thing measured.

    Args:
        name: `group/statistic`, e.g. `"activation/rms"`; a step's own tensors and logged metrics keep their names.
        value: the number; None where there is none (see `kind`). NaN and Inf are values.
        step: optimizer step, from 0. What is logged or recorded between steps carries the last closed one.
        module: name in `model.named_modules()` without DDP, FSDP or compile wrappers; the parameter's qualified name
            for `parameter/*` and `gradient/*`; `""` for the model as a whole.
        phase: `"train"`, `"val"`, or any name given to `Monitor.phase` or `Monitor.log`.
        call: which call of the module within one outermost call of the model, from 0.
        rank: process rank.
        source: `"probe"`, `"step"` (given to `Monitor.step`, learning rates, plan) or `"log"` (given to `Monitor.log`).
        kind: what was given: `float int bool none tensor tensor-grad tensor-graphs pair list str other`; `histogram` from
            probes.

    Examples:
        >>> Record("activation/rms", 1.5, step=40, module="encoder.3").value
        1.5
    """

    name: str
    value: float | Histogram | None
    step: int
    module: str = ""
    phase: str = "train"
    call: int = 0
    rank: int = 0
    source: Source = "probe"
    kind: str = "float"


@dataclass(frozen=True)
class Finding:
    """One thing concluded.

    Args:
        code: stable kebab-case name; `docs/findings/<code>.md` explains it.
        severity: `"info"`, `"warning"` or `"error"`.
        message: what happened, with numbers and units.
        advice: what to try first.
        step: optimizer step at which it was decided; None outside of training.
        module: the module concerned, `""` for none.
        phase: phase of the records it was decided on.
        rank: process rank.
        evidence: JSON values behind the decision.
        cause: code of the finding that explains this one, `""` if none does.

    Examples:
        >>> print(Finding("nonfinite-loss", "error", "The loss is NaN.", "Lower the learning rate.", step=3))
        error nonfinite-loss at step 3: The loss is NaN. Try: Lower the learning rate.
    """

    code: str
    severity: Severity
    message: str
    advice: str
    step: int | None = None
    module: str = ""
    phase: str = "train"
    rank: int = 0
    evidence: Mapping[str, JSON] = field(default_factory=dict[str, JSON])
    cause: str = ""

    def __post_init__(self) -> None:
        if self.severity not in SEVERITIES:
            raise ValueError(f"Unknown severity {self.severity!r}. Known: {list(SEVERITIES)}.")

    def __str__(self) -> str:
        where = f" in {self.module!r}" if self.module else ""
        when = f" at step {self.step}" if self.step is not None else ""
        phase = f" ({self.phase})" if self.phase != "train" else ""
        rank = f" on rank {self.rank}" if self.rank else ""
        cause = f" (explained by {self.cause})" if self.cause else ""
        advice = f" Try: {self.advice}" if self.advice else ""
        return f"{self.severity} {self.code}{where}{when}{phase}{rank}{cause}: {self.message}{advice}"


class FindingsError(RuntimeError):
    """Raised by `Report.raise_for_findings`; `.findings` holds what was found."""

    def __init__(self, message: str, findings: tuple[Finding, ...]) -> None:
        super().__init__(message)
        self.findings = findings


@dataclass(frozen=True, kw_only=True)
class Report:
    """What an audit returns; audits add their own fields in a subclass and overrule `.ok` where design says so.

    Args:
        title: what was examined, one line.
        summary: the result in plain words, may have several lines.
        findings: most severe problems first are not required; the order is the audit's.

    Examples:
        >>> Report(title="nothing examined").ok
        True
    """

    title: str = "report"
    summary: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there is no warning and no error."""
        return all(finding.severity == "info" for finding in self.findings)

    def raise_for_findings(self) -> None:
        """Raise `FindingsError` with the whole report as its message unless `.ok`."""
        if not self.ok:
            raise FindingsError(str(self), self.findings)

    def __str__(self) -> str:
        lines = [f"{self.title}: {'ok' if self.ok else 'not ok'}"]
        lines += [f"  {line}" for line in self.summary.splitlines()]
        lines += [f"  {finding}" for finding in self.findings]
        return "\n".join(lines)

    def __rich__(self) -> RenderableType:
        from rich.text import Text

        style = {"info": "cyan", "warning": "yellow", "error": "bold red"}
        text = Text(f"{self.title}: ", style="bold")
        text.append("ok" if self.ok else "not ok", style="green" if self.ok else "bold red")
        for line in self.summary.splitlines():
            text.append(f"\n  {line}", style="default not bold")
        for finding in self.findings:
            text.append(f"\n  {finding}", style=style[finding.severity])
        return text
