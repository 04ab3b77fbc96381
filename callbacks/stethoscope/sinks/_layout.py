"""Which charts TensorBoard's "Custom Scalars" shows: for each group a few, with few enough curves to be told apart."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from stethoscope.sinks._tag import tag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._record import Record

MAX_CURVES = 8
"""Per chart. All curves of a run have one colour there, and seven markers tell them apart."""

_FIRST = ("step",)  # the loss is what everybody looks for
_TELLING = ("rms", "norm", "update_ratio")


def layout(records: Sequence[Record]) -> dict[str, dict[str, list[Any]]]:
    """Return categories of charts for the tags of these records, and of the same in other phases.

    A statistic of many layers becomes one chart of `MAX_CURVES` layers, evenly spaced over the depth: read from top to bottom
    it is a depth profile over time. All layers are in the picture under "Images". Names with a parenthesis are left to
    the other tabs: TensorBoard takes what follows it for the name of the run, and draws nothing of the chart.
    """
    layers: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for record in records:
        if isinstance(record.value, float | int) and record.source != "log" and not record.call:
            group, _, statistic = tag(record._replace(module="", phase="train")).partition("/")
            if statistic and "(" not in statistic + record.module:
                layers[group, statistic].append(record.module)
    found: defaultdict[str, dict[str, list[Any]]] = defaultdict(dict)
    for (group, statistic), modules in sorted(layers.items(), key=_rank):
        shown = [modules[i * (len(modules) - 1) // max(MAX_CURVES - 1, 1)] for i in range(MAX_CURVES)]
        shown = list(dict.fromkeys(shown if len(modules) > MAX_CURVES else modules))
        title = f"{statistic}, {len(shown)} of {len(modules)} layers" if len(modules) > len(shown) else statistic
        ends = "|".join(f"/{re.escape(module)}" if module else "" for module in shown)
        found[group][title] = ["Multiline", [rf"^{re.escape(group)}(_[^/]+)?/{re.escape(statistic)}({ends})$"]]
    return dict(found)


def _rank(item: tuple[tuple[str, str], list[str]]) -> tuple[bool, str, bool, str]:
    (group, statistic), _ = item
    return group not in _FIRST, group, statistic not in _TELLING, statistic
