"""The page: one HTML file that needs nothing from outside and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from stethoscope._pages import pages

if TYPE_CHECKING:
    from collections.abc import Mapping

_ASSETS = Path(__file__).parent / "assets"
_LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")


def render(template: str, data: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Fill a template.

    Args:
        template: name of a file beside the style and the script.
        data: JSON for the page's script; NaN and Inf become None.
        facts: what the template names; all of it is escaped.

    Returns:
        The whole page. Its content policy lets run the plotting library and the page's script, known by their hashes,
        and nothing else, and lets load nothing.
    """
    library, script = _library(), (_ASSETS / "page.js").read_text(encoding="utf-8")
    # The library sets styles of its own, so styles may be inline; they cannot load anything either.
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    environment = Environment(
        loader=FileSystemLoader(_ASSETS),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        policy=policy,
        # ours and the library's: not escaped, since scripts and styles are no HTML
        library=Markup(library),  # noqa: S704
        script=Markup(script),  # noqa: S704
        style=Markup((_ASSETS / "page.css").read_text(encoding="utf-8")),  # noqa: S704
        data=Markup(embedded(data)),  # noqa: S704  # escaped for this place
        **facts,
    )


def embedded(data: object) -> str:
    r"""Write JSON that may stand inside of a script element.

    Example:
        >>> embedded({"module": "</script><b>", "value": float("nan")})
        '{"module":"\\u003c/script\\u003e\\u003cb\\u003e","value":null}'
    """
    text = json.dumps(_strict(data), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@cache
def explained(code: str) -> Markup | None:
    """Return the page of a finding as HTML without its title; None where there is no such page."""
    page = pages().get(code)
    if page is None:
        return None
    text = page.read_text(encoding="utf-8").partition("\n")[2]
    # the pages that they link to are not here
    html = MarkdownIt("commonmark", {"html": False}).enable("table").render(_LINK.sub(r"\1", text))
    return Markup(re.sub(r"<(/?)h2>", r"<\1h4>", html))  # noqa: S704  # ours, and without HTML


def _library() -> str:
    return "\n".join(Resources(mode="inline", components=["bokeh"], log_level="warn").js_raw)


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    return [_strict(inner) for inner in value] if isinstance(value, (list, tuple)) else value
