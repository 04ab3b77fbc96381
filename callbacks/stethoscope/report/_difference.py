"""Shows a comparison of two runs: as a page, as Markdown, as JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from stethoscope._record import SEVERITIES, strict
from stethoscope.report import _compare as rule
from stethoscope.report import _figures as figures
from stethoscope.report._causes import worst
from stethoscope.report._curve import Point
from stethoscope.report._facts import details, numbers, place
from stethoscope.report._grid import LARGEST
from stethoscope.report._html import version
from stethoscope.report._lines import lines
from stethoscope.report._page import render
from stethoscope.report._text import code, table
from stethoscope.report._words import number, plural, titled, words
from stethoscope.sinks._markdown import escape

if TYPE_CHECKING:
    from stethoscope._record import Severity
    from stethoscope.report._compare import Comparison, Parting
    from stethoscope.report._summary import Summary

MAX_PLOTS, MAX_NAMES = 6, 4


def compared_html(comparison: Comparison) -> str:
    """Write a comparison as one page that works offline."""
    first, second = comparison.first, comparison.second
    names = (_name(first), _name(second))
    curves: dict[str, Any] = {}
    losses = [summary.curves.get(("loss", "train")) for summary in (first, second)]
    if all(losses):
        both = {
            f"{letter}: {name}": loss.points() for letter, name, loss in zip("AB", names, losses, strict=True) if loss
        }
        curves["loss"] = lines(both, figures.LINES)
    shown = [part for part in comparison.partings if (part.name, part.phase) != ("loss", "train")][:MAX_PLOTS]
    for index, part in enumerate(shown):
        both = {letter: _points(summary, part) for letter, summary in zip("AB", (first, second), strict=True)}
        curves[f"metric-{index}"] = lines(both, figures.LINES, words(part.name).unit)
    facts = zip(_facts(first), _facts(second), strict=False)
    return render(
        "compare.html",
        {"figures": figures.empty(layers=False, bins=False), "curves": curves, "statistics": [], "distributions": []},
        {
            "names": names,
            "severity": severity(comparison),
            "sentence": sentence(comparison),
            "equal": _equal(comparison),
            "only": (("A", names[0], comparison.only_first), ("B", names[1], comparison.only_second)),
            "loss": "Loss" if all(losses) else "",
            "common": f"{comparison.common:,}",
            "partings": comparison.partings,
            "metrics": [
                (f"metric-{index}", f"{titled(part.name, part.phase)}: {part.module or '(model)'}")
                for index, part in enumerate(shown)
            ],
            "facts": [(name, one, other) for (name, one), (_, other) in facts],
            "lasting": rule.LASTING,
            "settled": rule.SETTLED,
            "least": "a factor of about 2.5" if comparison.equal_until is None else f"about {rule.LEAST:.0%}",
            "noise": f"{rule.NOISE:g}",
            "place": place,
            "titled": titled,
            "number": number,
            "version": version(),
        },
    )


def compared_markdown(comparison: Comparison) -> str:
    """Write a comparison as Markdown."""
    names = (_name(comparison.first), _name(comparison.second))
    out = [f"# A: {escape(names[0])}, B: {escape(names[1])}", "", f"**{escape(sentence(comparison))}**", ""]
    out += [_equal(comparison), ""]
    for letter, found in zip("AB", (comparison.only_first, comparison.only_second), strict=True):
        out += [f"## Findings only in {letter}", ""]
        out += [
            f"- {cause.severity} {code(cause.code)}, {escape(place(cause))}: {escape(cause.first.message)}"
            for cause in found
        ]
        out += ["" if found else "None.", ""]
    if comparison.partings:
        rows = [
            (
                part.step,
                titled(part.name, part.phase),
                part.module or "(model)",
                number(part.first),
                number(part.second),
            )
            for part in comparison.partings[:30]
        ]
        out += ["## Where they part", "", *table(("from step", "statistic", "layer", "A", "B"), rows)]
    return "\n".join(out)


def compared_json(comparison: Comparison) -> str:
    """Write a comparison as strict JSON."""
    whole = {
        "first": str(comparison.first.path),
        "second": str(comparison.second.path),
        "sentence": sentence(comparison),
        "equal_until": comparison.equal_until,
        "differ_first": comparison.differ_first,
        "common_steps": comparison.common,
        "partings": [vars(part) for part in comparison.partings],
        "only_first": [cause.code for cause in comparison.only_first],
        "only_second": [cause.code for cause in comparison.only_second],
    }
    return json.dumps(strict(whole), indent=2, allow_nan=False)


def sentence(comparison: Comparison) -> str:
    """Say where the runs part."""
    if not comparison.common:
        return "The runs have no observed step in common: nothing can be compared."
    if not comparison.partings:
        steps = plural(comparison.common, "common observed step")
        new = [cause for cause in comparison.only_second if cause.severity != "info"]
        if new:
            return f"Only B has {new[0].code} ({place(new[0])}); the numbers do not part beyond noise in {steps}."
        return f"The runs do not part beyond noise in {steps}."
    part = comparison.partings[0]
    where = f" of {part.module}" if part.module else ""
    others = len({each.module for each in comparison.partings} - {"", part.module})
    more = f", and {plural(others, 'other layer' if part.module else 'layer')} then or later" if others else ""
    return (
        f"The runs part at step {part.step:,}: {titled(part.name, part.phase)}{where} is {number(part.first)} in A and "
        f"{number(part.second)} in B{more}."
    )


def severity(comparison: Comparison) -> str:
    """The worst that B has and A has not; where that is nothing, `info` for runs that part and `fine` for others."""
    new = worst([cause.first for cause in comparison.only_second])
    if new is not None and new != "info":
        return new
    return "info" if comparison.partings or not comparison.common else "fine"


def new_severity(comparison: Comparison) -> Severity | None:
    """The worst severity of causes that only the second run has."""
    return max((cause.severity for cause in comparison.only_second), key=SEVERITIES.index, default=None)


def _equal(comparison: Comparison) -> str:
    names = list(dict.fromkeys(words(name).label for name in comparison.differ_first))
    first = ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")
    if comparison.equal_until is None:
        return (
            f"Their numbers differ from the first common step on{f' ({first})' if first else ''}, as with another seed, data, "
            "code or learning rate: small differences are not counted."
        )
    then = f"; the first to differ: {first}" if first else ""
    return f"Up to step {comparison.equal_until:,} all numbers are equal to 4 digits{then}."


def _points(summary: Summary, part: Parting) -> list[Point]:
    key = (part.name, part.phase)
    if not part.module:
        return summary.curves[key].points()
    table = summary.grids[key].table()
    row = table.rows.index(part.module)
    points = []
    for (first, last), low, high in zip(
        table.steps.tolist(), table.low[row].tolist(), table.high[row].tolist(), strict=True
    ):
        if high > LARGEST:
            points.append(Point(first, last, float("nan"), float("nan"), float("nan"), first))
        elif not math.isnan(high):  # it was measured
            points.append(Point(first, last, low, high, high, None))
    return points


def _facts(summary: Summary) -> list[tuple[str, str]]:
    facts = [fact for fact in numbers(summary) if fact.name in {"Findings", "Optimizer steps", "Observed", "Ranks"}]
    facts += [
        fact
        for fact in details(summary)
        if fact.name in {"Run", "Started", "Versions", "Planned steps", "Lines skipped"}
    ]
    told = [(fact.name, ", ".join(filter(None, (fact.value, fact.note)))) for fact in facts]
    rate = summary.curves.get(("lr", "train"))
    rates = [point.value for point in rate.points()] if rate else []
    return [
        *told,
        ("Learning rate", f"{number(rates[0])} at first, {number(rates[-1])} at last" if rates else "unknown"),
    ]


def _name(summary: Summary) -> str:
    return summary.path.name or str(summary.path)
