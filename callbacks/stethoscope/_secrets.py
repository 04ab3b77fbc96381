"""What looks like a secret is replaced by `***` before a text leaves the process. Standard library only.

The rule, also in docs/sinks.md: values by which this process was given a secret (environment, command line), and texts
that have the form of one.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stethoscope._record import Finding

SHORTEST = 8
"""Characters; a shorter value of a variable would be found in words that have nothing to do with it."""

_DEEPEST = 20
"""Containers in the evidence of a finding; what lies deeper is left out."""

_GIVEN = re.compile(
    r"(?<![a-z])(?:[a-z]*key|token|secret|passw(?:or)?d|passphrase|credentials?)(?![a-z])", re.IGNORECASE
)
"""Names of variables and options. `num_tokens` and `tokenizer` are none."""

_NAMES = (
    r"(?:api|access|secret|private|signing|account)[_-]?key|(?:api|auth|access|refresh|session|bearer|hf)[_-]?token"
    r"|(?:client[_-]?)?secret|passw(?:or)?d|passphrase|credentials?"
)
_COUNT = r"(?!\d{1,7}(?![\w.%+/=-]))"
"""Not a small number: `--pad-token 0`, `?num_tokens=12`."""
_SWITCH = r"(?!(?:on|off|yes|no|true|false|none|null)\s*(?:[\r\n\"',;)\]}]|\Z))"
"""Not the position of a switch, and nothing after it: `authorization: off`, `password=None`."""
_SNAKE = r"(?!(?:[a-z]+\d{0,3}|\d{1,3})(?:_(?:[a-z]+\d{0,3}|\d{1,3}))+(?!\w))"
"""Not a name of a module or metric: `layers_12_attention_dense`."""
_FORMS = (
    re.compile(r"(?<=://)()[^/\s@]+(?=@)"),
    re.compile(
        rf"([?&][\w.-]{{0,40}}(?:token|key|secret|sig|passw|credential)[\w.-]{{0,40}}=){_COUNT}[^&\s\"'#]+",
        re.IGNORECASE,
    ),
    re.compile(rf"(\bauthorization[\"']?\s*[:=]\s*[\"']?{_SWITCH}(?:\w+\s+)?){_SWITCH}[^\s\"',]+", re.IGNORECASE),
    re.compile(r"(\bbearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
    re.compile(rf"((?<![a-z])(?:{_NAMES})(?![a-z])[\"']?\s*[:=]\s*[\"']?){_SWITCH}[^\s\"',;&]+", re.IGNORECASE),
    re.compile(rf"((?<![\w-])--?[\w-]{{0,40}}(?:{_NAMES}|token)\s+){_COUNT}[^\s\"',;-][^\s\"',;]*", re.IGNORECASE),
    # words of the trade: only what is long, holds a digit and is no path of a module is taken for a secret
    re.compile(
        rf"((?<![a-z])(?:token|key)[\"']?\s*[:=]\s*[\"']?){_SNAKE}(?=[^\s\"',;&.]{{0,40}}\d)[^\s\"',;&.]{{16,}}",
        re.IGNORECASE,
    ),
    re.compile(r"()-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(
        r"()(?<![\w-])(?:sk-[\w-]{16,}|gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{20,}"
        r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    ),
)


def without_secrets(text: str) -> str:
    """Replace what looks like a secret by `***`.

    Examples:
        >>> without_secrets("cannot reach https://me:hunter2@host/api?token=abc with api_key='xyz'")
        "cannot reach https://***@host/api?token=*** with api_key='***'"
        >>> without_secrets("size mismatch for decoder.token=4, KeyError: 'encoder.weight'")
        "size mismatch for decoder.token=4, KeyError: 'encoder.weight'"
    """
    return _without(_given(), text)


def _without(given: Sequence[str], text: str) -> str:
    for value in given:
        text = text.replace(value, "***")
    for form in _FORMS:
        text = form.sub(r"\1***", text)
    return text


def trace_of(error: BaseException) -> str:
    """Return an error's traceback, without secrets, for the log: with `exc_info` it would go there as it is."""
    return without_secrets("".join(traceback.format_exception(error)))


def redacted(finding: Finding) -> Finding:
    """Return the finding without secrets in its message, advice and evidence; itself if there are none."""
    given = _given()
    told = {
        "message": _without(given, finding.message),
        "advice": _without(given, finding.advice),
        "evidence": _plain(given, finding.evidence, _DEEPEST),
    }
    return finding if all(getattr(finding, name) == told[name] for name in told) else replace(finding, **told)


def _plain(given: Sequence[str], value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return _without(given, value)
    if isinstance(value, Mapping | list | tuple) and not depth:
        return "nested too deep"
    if isinstance(value, Mapping):
        return {key: _plain(given, each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple):
        kept = [_plain(given, each, depth - 1) for each in value]
        return kept if isinstance(value, list) else tuple(kept)
    return value


def _given() -> list[str]:
    """The values of variables and options whose name says what they are, the longest first: one may hold another."""
    given = [value for name, value in os.environ.items() if _GIVEN.search(name)]
    for option, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        if name.startswith("-") and _GIVEN.search(name):
            given.append(value if equals else following)
    kept = {value for value in given if len(value) >= SHORTEST and not value.startswith("--")}
    return sorted(kept, key=len, reverse=True)
