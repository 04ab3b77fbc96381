"""The same report as Markdown, for a terminal or a pull request, and as JSON, for a program."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from stethoscope._record import strict
from stethoscope.report._causes import Cause, causes, worst
from stethoscope.report._facts import details, numbers, place, state, verdict
from stethoscope.report._words import number, titled
from stethoscope.sinks._markdown import escape

if TYPE_CHECKING:
    from stethoscope.report._summary import Summary

MAX_SERIES = 40
_SHAPES = {"error": "✖ error", "warning": "▲ warning", "info": "● info", "fine": "✔ fine"}


def to_markdown(summary: Summary) -> str:
    """Write what is wrong, the numbers at a glance and the facts as Markdown. Text from the run is escaped."""
    found = causes(summary.findings)
    said = verdict(summary, found)
    lines = [f"# {escape(summary.path.name)}", "", f"**{_SHAPES[said.severity]}: {escape(said.sentence)}**", ""]
    if said.place:
        lines += [escape(said.place), ""]
    lines += [f"Try first: {escape(said.advice)}", ""] if said.advice else []
    lines += table(("", "", ""), [(fact.name, fact.value, fact.note) for fact in numbers(summary)])
    lines += ["## What is wrong", ""] if found else []
    for index, cause in enumerate(found, 1):
        lines += _cause(index, cause)
    rows = [(titled(*key), *cells) for key, cells in _series(summary)]
    if rows:
        lines += ["## Series", "", *table(("series", "first", "lowest", "highest", "last"), rows)]
    lines += ["## Facts about the run", ""]
    lines += table(("", "", ""), [(fact.name, fact.value, fact.note) for fact in details(summary)])
    return "\n".join(lines)


def to_json(summary: Summary) -> str:
    """Write the same as strict JSON; NaN and Inf are the strings `"NaN"`, `"Infinity"`, `"-Infinity"`."""
    found = causes(summary.findings)
    said = verdict(summary, found)
    whole = {
        "path": str(summary.path),
        "worst": worst(summary.findings),
        "verdict": said._asdict(),
        "state": state(summary),
        "last_step": summary.last_step,
        "run": asdict(summary.run) | {"versions": dict(summary.run.versions), "modules": len(summary.run.modules)},
        "ranks": summary.ranks,
        "skipped_lines": summary.skipped,
        "values_left_out": summary.left_out,
        "causes": [
            {
                "code": cause.code,
                "severity": cause.severity,
                "message": cause.first.message,
                "advice": cause.first.advice,
                "steps": cause.steps,
                "modules": cause.modules,
                "phases": cause.phases,
                "ranks": cause.ranks,
                "count": len(cause.findings),
                "evidence": dict(cause.first.evidence),
                "explains": [asdict(other) for other in cause.explains],
            }
            for cause in found
        ],
        "series": [
            {"name": key[0], "phase": key[1]} | dict(zip(("first", "lowest", "highest", "last"), cells, strict=True))
            for key, cells in _series(summary)
        ],
    }
    return json.dumps(strict(whole), indent=2, allow_nan=False)


def _cause(index: int, cause: Cause) -> list[str]:
    lines = [f"### {index}. {_SHAPES[cause.severity]} {code(cause.code)}", "", escape(place(cause)), ""]
    lines += [escape(cause.first.message), ""]
    lines += [f"Try: {escape(cause.first.advice)}", ""] if cause.first.advice else []
    if cause.explains:
        told = ", ".join(
            code(other.code) + (f" ({other.count} times)" if other.count > 1 else "") for other in cause.explains
        )
        lines += [f"It explains {told}.", ""]
    return [*lines, f"More: {code(f'stethoscope explain {cause.code}')}", ""]


def _series(summary: Summary) -> list[tuple[tuple[str, str], tuple[float, float, float, float]]]:
    found = []
    front = sorted(summary.curves.items(), key=lambda item: (item[0][0] != "loss", "/" in item[0][0]))
    for key, curve in front[:MAX_SERIES]:
        points = curve.points()
        low = min((point.low for point in points if math.isfinite(point.low)), default=float("nan"))
        high = max((point.high for point in points if math.isfinite(point.high)), default=float("nan"))
        found.append((key, (points[0].value, low, high, points[-1].value)))
    return found


def code(text: str) -> str:
    """Write as code what is harmless there, and anything else as text."""
    return f"`{text}`" if re.fullmatch(r"[\w. -]+", text) else escape(text)


def table(heads: tuple[str, ...], rows: list[tuple[Any, ...]]) -> list[str]:
    """Write rows as a Markdown table."""
    cells = [[number(cell) if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    body = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in cells]
    return [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", *body, ""]
