"""What is known about a run, in words: for the top of a page, and for its end."""

from __future__ import annotations

import math
import re
import time
from typing import TYPE_CHECKING, NamedTuple

from stethoscope._written import age, state_of
from stethoscope.report._causes import Cause, worst
from stethoscope.report._words import number, plural
from stethoscope.sinks._jsonl import file_of, parts_of

if TYPE_CHECKING:
    from stethoscope.report._summary import Summary

_SENTENCE = re.compile(r".+?[.!?](?=\s|\Z)", re.DOTALL)


class Fact(NamedTuple):
    """One fact.

    Args:
        name: what it is about.
        value: with its unit.
        note: smaller print; may be empty.
    """

    name: str
    value: str
    note: str = ""


class Verdict(NamedTuple):
    """The run in one sentence.

    Args:
        severity: `"error"`, `"warning"`, `"info"` or `"fine"`.
        sentence: what is wrong.
        place: step, module, phase and rank; may be empty.
        advice: what to try first; may be empty.
    """

    severity: str
    sentence: str
    place: str
    advice: str


def verdict(summary: Summary, causes: list[Cause]) -> Verdict:
    """Say what is wrong, from the first and most severe cause."""
    severity = worst(summary.findings)
    if severity in {"error", "warning"}:
        first = causes[0].first
        match = _SENTENCE.match(first.message)
        return Verdict(severity or "", match[0] if match else first.message, place(causes[0]), first.advice)
    if summary.last_step is None:
        return Verdict(
            "info", "Nothing was recorded yet.", "", "Is the training running, and does it call monitor.step()?"
        )
    told = f", and {plural(len(summary.findings), 'remark')} below" if severity else ""
    return Verdict(
        "fine", f"Nothing of severity warning or above was found up to step {summary.last_step:,}{told}.", "", ""
    )


def place(cause: Cause) -> str:
    """Tell where and when a cause was found, in one line.

    Examples:
        >>> from stethoscope._record import Finding
        >>> found = Finding("loss-spike", "warning", "Spike.", "", step=7)
        >>> place(Cause("loss-spike", "warning", found, (found,)))
        'step 7'
    """
    parts = []
    steps = cause.steps
    if steps is None:
        parts.append("before or beside the training")
    else:
        parts.append(f"step {steps[0]:,}" if steps[0] == steps[1] else f"steps {steps[0]:,} to {steps[1]:,}")
    if cause.modules:
        others = len(cause.modules) - 1
        parts.append(cause.modules[0] + (f" and {plural(others, 'more module')}" if others else ""))
    if cause.phases != ("train",):
        parts.append(f"phase {', '.join(cause.phases)}")
    if cause.ranks != (0,):
        parts.append(f"rank {', '.join(str(rank) for rank in cause.ranks[:8])}{' ...' if len(cause.ranks) > 8 else ''}")
    if len(cause.findings) > 1:
        parts.append(f"found {len(cause.findings):,} times")
    return " · ".join(parts)


def numbers(summary: Summary) -> list[Fact]:
    """Return what a reader wants to know at a glance."""
    run, counts = summary.run, {"error": 0, "warning": 0, "info": 0}
    for finding in summary.findings:
        counts[finding.severity] += 1
    made = 0 if summary.last_step is None else summary.last_step + 1
    planned = (
        f"of {run.planned_steps:,} planned ({made / run.planned_steps:.0%})" if run.planned_steps else "no plan known"
    )
    loss = summary.curves.get(("loss", "train"))
    points = loss.points() if loss else []
    facts = [
        Fact(
            "Findings",
            plural(counts["error"], "error"),
            f"{plural(counts['warning'], 'warning')}, {counts['info']} info",
        ),
        Fact("Optimizer steps", f"{made:,}", planned),
    ]
    if points:
        finite = [point.low for point in points if math.isfinite(point.low)]
        facts.append(Fact("Last loss", number(points[-1].value), f"lowest {number(min(finite))}" if finite else ""))
    facts.append(
        Fact(
            "Observed",
            f"every {run.every:,} steps" if run.every > 1 else "every step",
            plural(len(run.modules), "module"),
        )
    )
    facts.append(Fact("Ranks", f"{len(summary.ranks)} of {run.world_size}", _ends(summary)))
    facts.append(Fact("State", state(summary), f"last written {age(time.time() - summary.written)} ago"))
    return facts


def _ends(summary: Summary) -> str:
    """Say which ranks' files end before the others, and how much is missing there: a rank that is killed cannot say so itself."""
    early = {rank: step for rank, step in summary.ends.items() if step < max(summary.ends.values())}
    if not early or state(summary) == "writing":
        return "read together" if len(summary.ranks) > 1 else ""
    last = max(summary.ends.values())
    shown = [
        f"rank {rank} ends {plural(last - step, 'step')} early, after step {step:,}" for rank, step in early.items()
    ]
    return "; ".join(shown[:3]) + (f"; {len(shown) - 3} more" if shown[3:] else "")


def details(summary: Summary) -> list[Fact]:
    """Return what belongs at the end: where it was read from, versions, what was lost."""
    run = summary.run
    size = sum(
        file.stat().st_size
        for rank in summary.ranks
        for file in parts_of(file_of(summary.path, rank))
        if file.is_file()
    )
    lost = [finding for finding in summary.findings if finding.code == "part-disabled"]
    facts = [
        Fact("Run", run.id),
        Fact("Started", run.started or "unknown"),
        Fact("Read from", str(summary.path), f"{size / 1e6:,.1f} MB"),
        Fact("Versions", ", ".join(f"{name} {version}" for name, version in run.versions.items()) or "unknown"),
        Fact("Planned steps", f"{run.planned_steps:,}" if run.planned_steps else "unknown"),
        Fact("Ranks read", ", ".join(str(rank) for rank in summary.ranks), f"of a world of {run.world_size}"),
        Fact("Parts switched off", str(len(lost)), "; ".join(finding.message for finding in lost[:3])),
        Fact(
            "Lines skipped", f"{summary.skipped:,}", "cut short or damaged" if summary.skipped else "all could be read"
        ),
    ]
    if run.resumed_from is not None:
        facts.append(Fact("Resumed", f"after step {run.resumed_from:,}"))
    if summary.left_out:
        facts.append(
            Fact("Not shown", plural(summary.left_out, "value"), "of series beyond those that a page has room for")
        )
    facts += [
        Fact(name, number(curve.points()[-1].value), "as recorded by the monitor, last value")
        for (name, phase), curve in summary.curves.items()
        if name.startswith(("monitor/", "overhead")) and phase == "train" and curve.points()
    ]
    return facts


def state(summary: Summary) -> str:
    """Tell whether the run goes on: see `state_of`."""
    files = [file for rank in summary.ranks for file in parts_of(file_of(summary.path, rank)) if file.is_file()]
    finished = summary.run.planned_steps is not None and (summary.last_step or 0) + 1 >= summary.run.planned_steps
    return state_of(files, finished=finished)
