"""Findings as a Markdown table, with text that may come from anywhere."""

from __future__ import annotations

import html
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._record import Finding

MAX_ROWS = 200
"""Rows of a table; TensorBoard shows the whole table at every step that has one."""

_PUNCTUATION = re.compile(r"([\\`*_{}\[\]()#+!~])")


def escape(text: str) -> str:
    r"""Make text that Markdown shows as it is, in one line, also inside a table.

    Examples:
        >>> escape("<b>a|b</b> *c*")
        '&lt;b&gt;a&#124;b&lt;/b&gt; \\*c\\*'
    """
    line = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return _PUNCTUATION.sub(r"\\\1", html.escape(line, quote=False)).replace("|", "&#124;")


def table(findings: Sequence[Finding]) -> str:
    """Make a Markdown table, newest finding first, of at most `MAX_ROWS` rows."""
    # three columns: TensorBoard breaks words in narrow ones
    lines = ["| finding | what happened | try first |", "|---|---|---|"]
    for finding in reversed(findings[-MAX_ROWS:]):
        where = [] if finding.step is None else [f"step {finding.step}"]
        where += [finding.module] if finding.module else []
        where += [finding.phase] if finding.phase != "train" else []
        where += [f"rank {finding.rank}"] if finding.rank else []
        cause = f" Explained by {finding.cause}." if finding.cause else ""
        what = ", ".join([f"{finding.severity} {finding.code}", *where])
        cells = (what, finding.message + cause, finding.advice)
        lines.append(f"| {' | '.join(escape(cell) for cell in cells)} |")
    if len(findings) > MAX_ROWS:
        lines += ["", f"{len(findings) - MAX_ROWS} earlier findings are not shown."]
    return "\n".join(lines)
