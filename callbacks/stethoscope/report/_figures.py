"""The figures of a page, as Bokeh documents without data: the page's script fills them, those of curves many times."""

from __future__ import annotations

from typing import Any

from bokeh import __version__
from bokeh.document import Document
from bokeh.models import ColumnDataSource, FixedTicker, HoverTool, LinearColorMapper, Range1d
from bokeh.palettes import Cividis256
from bokeh.plotting import figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""After Okabe and Ito, told apart by colour-blind readers; lines differ in their dashes as well."""
DASHES = ("solid", "dashed", "dotted", "dashdot")
LINES = 4
"""In one figure: phases, or runs."""
_EMPTY, _ZERO, _NOT_MEASURED, _NON_FINITE = "#00000000", "#000000", "#c9ccd1", "#e5007d"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"


def empty(*, layers: bool, bins: bool) -> dict[str, dict[str, Any]]:
    """Return the figures that a page needs, by name; each is what `Bokeh.embed.embed_item` takes."""
    plots = {f"curve-{kind}": _curve(kind) for kind in ("linear", "log")}
    if layers:
        plots |= {"heat": _heat_map(), "depth": _depth_profile()}
    return plots | {"bins": _distribution()} if bins else plots


def _curve(kind: str) -> dict[str, Any]:
    """Draw numbers over steps: up to `LINES` lines with their ranges, crosses for NaN and Inf, findings at the top."""
    plot = _figure("Numbers over steps", 230, x_range=Range1d(0, 1), y_range=Range1d(0, 1), y_axis_type=kind)
    plot.xaxis.axis_label = "step"
    lines = []
    for index in range(LINES):
        source = _source(f"line-{index}", "x", "y", "low", "high", "steps", "text")
        colour = COLOURS[index]
        plot.varea("x", "low", "high", source=source, fill_color=colour, fill_alpha=0.2)
        lines.append(plot.line("x", "y", source=source, color=colour, line_width=2, line_dash=DASHES[index]))
        # a line needs two points, and few of them are better seen
        plot.scatter("x", "y", source=_source(f"dots-{index}", "x", "y"), color=colour, size=5)
    plot.add_tools(HoverTool(renderers=lines, tooltips=[("step", "@steps"), ("value", "@text")], mode="vline"))
    plot.scatter("x", "y", source=_source("bad", "x", "y"), marker="x", size=10, color=_NON_FINITE, line_width=3)
    marks = _source("marks", "x", "y", "bottom", "label", "what", "colour")
    plot.segment("x", "bottom", "x", "y", source=marks, color="colour", line_dash="dashed", line_width=2)
    heads = plot.scatter("x", "y", source=marks, size=24, fill_color="white", line_color="colour", line_width=3)
    _labels(plot, marks)
    plot.add_tools(HoverTool(renderers=[heads], tooltips=[("finding", "@what")]))
    return _item(plot)


def _heat_map() -> dict[str, Any]:
    """Draw layers by steps; cells are sent as places on the colour scale, 0 to 1, with -1 for zero and 2 for non-finite."""
    plot = _empty("Heat map of a statistic: layers from top to bottom, steps from left to right", 420)
    _image(plot, "heat", _ZERO)
    plot.scatter("x", "y", source=_source("heat-nonfinite", "x", "y"), marker="x", size=5, color="white")
    _cursor(plot, "heat")
    found = _source("heat-findings", "x", "y", "label", "colour")
    plot.scatter("x", "y", source=found, size=20, fill_color="white", line_color="colour", line_width=3)
    _labels(plot, found)
    plot.xaxis.axis_label = "step"
    return _item(plot)


def _depth_profile() -> dict[str, Any]:
    """Draw a statistic along the depth of the model at one step, over the range that it has in the run."""
    plot = _empty("Depth profile: the statistic of each layer at the chosen step", 420)
    whole = _source("depth-range", "y", "low", "high")
    plot.hbar(
        y="y",
        height=0.8,
        left="low",
        right="high",
        source=whole,
        fill_color="#8d99ae",
        fill_alpha=0.35,
        line_color=None,
    )
    for name, colour, dash, marker in (
        ("first", "#b58900", "dashed", "square"),
        ("chosen", COLOURS[0], "solid", "circle"),
    ):
        source = _source(f"depth-{name}", "x", "y")
        plot.line("x", "y", source=source, color=colour, line_dash=dash, line_width=2)
        plot.scatter("x", "y", source=source, color=colour, marker=marker, size=6)
    plot.hspan("y", source=_source("depth-cursor", "y"), line_color=COLOURS[1], line_width=2, line_dash="dotted")
    return _item(plot)


def _distribution() -> dict[str, Any]:
    """Draw the histogram of one layer over the steps."""
    plot = _empty("Distribution of the values of the chosen layer over the steps", 360)
    _image(plot, "bins", _EMPTY)
    _cursor(plot, "bins")
    plot.xaxis.axis_label, plot.yaxis.axis_label = "step", "value"
    return _item(plot)


def _source(name: str, *columns: str) -> ColumnDataSource:
    return ColumnDataSource({column: [] for column in columns}, name=name)


def _labels(plot: figure, source: ColumnDataSource) -> None:
    plot.text(
        "x",
        "y",
        "label",
        source=source,
        text_align="center",
        text_baseline="middle",
        text_font_size="14px",
        text_font_style="bold",
        text_color="#1b1f24",
    )


def _image(plot: figure, name: str, low: str) -> None:
    mapper = LinearColorMapper(
        palette=Cividis256, low=0, high=1, low_color=low, high_color=_NON_FINITE, nan_color=_NOT_MEASURED
    )
    source = _source(f"{name}-cells", "image", "x", "y", "dw", "dh")
    plot.image("image", "x", "y", "dw", "dh", source=source, color_mapper=mapper)


def _cursor(plot: figure, name: str) -> None:
    source = _source(f"{name}-cursor", "left", "right", "bottom", "top")
    for colour, width in (("black", 4), ("white", 2)):
        plot.quad("left", "right", "top", "bottom", source=source, fill_color=None, line_color=colour, line_width=width)


def _empty(name: str, height: int) -> figure:
    plot = _figure(name, height, x_range=Range1d(0, 1), y_range=Range1d(1, 0))
    plot.xaxis.ticker, plot.yaxis.ticker = FixedTicker(ticks=[]), FixedTicker(ticks=[])
    plot.grid.visible = False
    return plot


def _figure(name: str, height: int, **options: Any) -> figure:
    plot = figure(height=height, sizing_mode="stretch_width", tools="box_zoom,reset", toolbar_location=None, **options)
    plot.toolbar.active_drag = None  # dragging a finger scrolls the page
    plot.name = name
    plot.output_backend = "canvas"
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.axis.axis_label_text_font_style = "normal"
    for part in (plot.axis,):
        part.axis_label_text_font = part.major_label_text_font = _FONT
        part.axis_label_text_font_size = part.major_label_text_font_size = "14px"
        part.minor_tick_line_color = None
    plot.grid.grid_line_alpha = 0.35
    plot.min_border_right = 16
    return plot


def _item(plot: figure) -> dict[str, Any]:
    # what bokeh.embed.json_item returns, in half of its time
    document = Document()
    document.add_root(plot)
    return {"target_id": None, "root_id": plot.id, "doc": document.to_json(deferred=False), "version": __version__}
