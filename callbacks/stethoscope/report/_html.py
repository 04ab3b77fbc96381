"""Makes the page of one run."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from typing import TYPE_CHECKING, Any

from stethoscope.report import _figures as figures
from stethoscope.report._causes import Cause, causes
from stethoscope.report._facts import details, numbers, place, verdict
from stethoscope.report._layers import distributions, layers
from stethoscope.report._lines import Mark, lines
from stethoscope.report._page import explained, render
from stethoscope.report._words import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope.report._curve import Point
    from stethoscope.report._summary import Summary

MAX_METRICS, MAX_MARKS = 24, 30


def to_html(summary: Summary) -> str:
    """Write a run as one page that works offline.

    Returns:
        HTML, 2 to 8 MB, of which 1.3 MB are the plotting library. Text from the run is escaped.
    """
    found = causes(summary.findings)
    statistics = layers(summary)
    # histograms are there for modules, so names of parameters are of no use
    names = next((table["rows"] for table in statistics if table["title"].startswith("Activation")), ())
    shares = distributions(summary, names)
    marks = _marks(found)
    plots = figures.empty(layers=bool(statistics), bins=bool(shares))
    curves: dict[str, Any] = {}
    series = metrics(summary)
    loss = next((name for name in ("loss", "train/loss", "train_loss") if name in series), next(iter(series), ""))
    if loss:
        curves["loss"] = lines(series.pop(loss), figures.LINES, words(loss).unit, marks)
    shown = list(series.items())[:MAX_METRICS]
    for index, (name, phases) in enumerate(shown):
        curves[f"metric-{index}"] = lines(phases, figures.LINES, words(name).unit)
    data = {
        "figures": plots,
        "curves": curves,
        "statistics": statistics,
        "distributions": shares[:1],
        "marks": _on_layers(found),
    }
    return render(
        "report.html",
        data,
        {
            "name": summary.path.name or str(summary.path),
            "verdict": verdict(summary, found),
            "numbers": numbers(summary),
            "details": details(summary),
            "causes": found[:100],
            "statistics": [table["title"] for table in statistics],
            "layers": shares[0]["layers"] if shares else (),
            "loss": words(loss).label if loss else "",
            "metrics": [(f"metric-{index}", _title(name), list(phases)) for index, (name, phases) in enumerate(shown)],
            "metrics_left_out": len(series) - len(shown),
            "loss_phases": [line["label"] for line in curves["loss"]["lines"]] if loss else (),
            "place": place,
            "explained": explained,
            "evidence": _evidence,
            "version": version(),
        },
    )


def metrics(summary: Summary) -> dict[str, dict[str, list[Point]]]:
    """Gather curves by name, each with its phases: what was logged or given to `step`, then what probes say of the model."""
    found: dict[str, dict[str, list[Point]]] = {}
    train_first = sorted(summary.curves.items(), key=lambda item: item[0][1] != "train")
    for (name, phase), curve in train_first:
        if points := curve.points():
            found.setdefault(name, {})[phase] = points
    order = {"step": 0, "gradient": 2, "separation": 2, "activation": 4, "parameter": 4, "plan": 5}
    kept = {name: phases for name, phases in found.items() if not name.startswith(("plan/", "monitor/"))}
    return dict(sorted(kept.items(), key=lambda item: order.get(item[0].partition("/")[0], 1)))


def _marks(found: Sequence[Cause]) -> list[Mark]:
    return [
        Mark(str(index), cause.steps[0], cause.severity, f"{cause.code}: {cause.first.message}"[:300])
        for index, cause in enumerate(found[:MAX_MARKS], 1)
        if cause.steps is not None
    ]


def _on_layers(found: Sequence[Cause]) -> list[dict[str, Any]]:
    """Findings that name a layer, each layer once per cause."""
    return [
        {"label": str(index), "module": finding.module, "step": finding.step, "severity": cause.severity}
        for index, cause in enumerate(found[:MAX_MARKS], 1)
        for finding in list({finding.module: finding for finding in reversed(cause.findings)}.values())[:50]
        if finding.module and finding.step is not None
    ]


def _title(name: str) -> str:
    label, unit, _ = words(name)
    return f"{label} ({unit})" if unit else label


def _evidence(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 2000 else f"{text[:2000]} ..."


def version() -> str:
    """Return the version that writes the page; empty in a bare checkout."""
    try:
        return installed("stethoscope")
    except PackageNotFoundError:
        return ""
