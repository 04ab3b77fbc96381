"""One delivery as one line of strict JSON, and back."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any, NamedTuple

from stethoscope._protocols import Run
from stethoscope._record import Finding, Histogram, Record, strict_number

FORMAT = 1
"""Raised when an old reader could no longer understand a new file."""

_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":"), default=float).encode
"""`default`: NumPy numbers count as numbers."""
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_LOOKS_NON_FINITE = re.compile(r"\\*(NaN|-?Infinity)\Z")
_GROUP_DEFAULTS = {"phase": "train", "source": "probe", "kind": "float", "rank": 0}
_FINDING_DEFAULTS: dict[str, Any] = {
    "step": None,
    "module": "",
    "phase": "train",
    "rank": 0,
    "evidence": {},
    "cause": "",
}
_FINDING: dict[str, Any] = {
    **dict.fromkeys(("code", "severity", "message", "advice", "module", "phase", "cause"), str),
    "step": int | None,
    "rank": int,
    "evidence": Mapping,
}
_RUN: dict[str, Any] = {
    "id": str,
    "started": str,
    "modules": list | tuple,
    "planned_steps": int | None,
    "every": int,
    "versions": Mapping,
    "rank": int,
    "world_size": int,
    "resumed_from": int | None,
    "shards": Mapping,
}


class Delivery(NamedTuple):
    """What one step or one log call brought.

    Args:
        step: the optimizer step it is stamped with.
        records: in the order of their delivery.
        findings: in the order of their delivery.
    """

    step: int
    records: tuple[Record, ...]
    findings: tuple[Finding, ...]


def encode_run(run: Run, part: int = 0) -> str:
    """Make the first line of a file; `part` above 0 says that the file goes on where another one ended."""
    facts = asdict(run)
    facts["versions"] = dict(run.versions)
    if not facts["shards"]:
        del facts["shards"]
    head: dict[str, Any] = {"run": facts, "format": FORMAT}
    return _ENCODE(head | {"part": part} if part else head)


def decode_run(line: Mapping[str, Any]) -> Run:
    """Undo `encode_run`. Fields that this version does not know are left out.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: the line has another form.
    """
    facts = {key: value for key, value in line["run"].items() if key in _RUN}
    _check(facts, _RUN)
    facts["modules"] = tuple((str(name), str(kind)) for name, kind in facts.get("modules", ()))
    return Run(**facts)


def encode(step: int, records: Sequence[Record], findings: Sequence[Finding]) -> str:
    """Make one line. Records that differ in module, call and value alone share one group, so that nothing is repeated."""
    groups: dict[tuple[Any, ...], tuple[list[list[Any]], list[int]]] = {}
    for index, (name, value, at, module, phase, call, rank, source, kind) in enumerate(records):
        if isinstance(value, Histogram):
            key: tuple[Any, ...] = (name, phase, source, kind, rank, at, value.edges)
            cell: Any = [strict_number(count) for count in value.counts]
        else:
            key = (name, phase, source, kind, rank, at, None)
            cell = value if value is None else strict_number(value)
        group = groups.get(key)
        if group is None:
            group = groups[key] = ([], [])
        group[0].append([module, cell, call] if call else [module, cell])
        group[1].append(index)
    line: dict[str, Any] = {"step": step}
    if groups:
        line["records"] = _groups_to_json(step, groups)
    if findings:
        line["findings"] = [encode_finding(finding) for finding in findings]
    return _ENCODE(line)


def decode(line: Mapping[str, Any]) -> Delivery:
    """Undo `encode`.

    Raises:
        LookupError, TypeError, ValueError, AttributeError: the line has another form.
    """
    step = line["step"]
    placed: list[tuple[int, Record]] = []
    for group in line.get("records", ()):
        start = len(placed)
        places = group.get("at") or range(start, start + len(group["values"]))
        edges = tuple(_from_number(edge) for edge in group["edges"]) if "edges" in group else None
        same = {key: group.get(key, default) for key, default in _GROUP_DEFAULTS.items()}
        for place, (module, cell, *call) in zip(places, group["values"], strict=True):
            value = _from_number(cell) if edges is None else Histogram(edges, tuple(_from_number(x) for x in cell))
            where = {"step": group.get("step", step), "module": module, "call": call[0] if call else 0}
            placed.append((place, Record(group["name"], value, **where, **same)))
    placed.sort(key=lambda pair: pair[0])
    findings = tuple(decode_finding(finding) for finding in line.get("findings", ()))
    return Delivery(step, tuple(record for _, record in placed), findings)


def _groups_to_json(step: int, groups: Mapping[tuple[Any, ...], tuple[list[list[Any]], list[int]]]) -> list[Any]:
    out: list[Any] = []
    seen = 0
    for (name, phase, source, kind, rank, at, edges), (values, places) in groups.items():
        group: dict[str, Any] = {"name": name}
        given = {"phase": phase, "source": source, "kind": kind, "rank": rank}
        group |= {key: value for key, value in given.items() if value != _GROUP_DEFAULTS[key]}
        if at != step:
            group["step"] = at
        if edges is not None:
            group["edges"] = [strict_number(edge) for edge in edges]
        # Watches read records in call order, so a replay needs the order in which groups were interleaved.
        if places[0] != seen or places[-1] != seen + len(places) - 1:
            group["at"] = places
        group["values"] = values
        out.append(group)
        seen += len(places)
    return out


def _from_number(cell: Any) -> Any:
    return _NON_FINITE[cell] if isinstance(cell, str) else cell


def encode_finding(finding: Finding) -> dict[str, Any]:
    """Make JSON of a finding; fields at their defaults are left out."""
    line = {key: getattr(finding, key) for key in ("code", "severity", "message", "advice")}
    for key, default in _FINDING_DEFAULTS.items():
        value = getattr(finding, key)
        if value != default:
            line[key] = _evidence_to_json(value) if key == "evidence" else value
    return line


def decode_finding(line: Mapping[str, Any]) -> Finding:
    """Undo `encode_finding`.

    Raises:
        LookupError, TypeError, ValueError: the line has another form.
    """
    facts = {key: line[key] for key in ("code", "severity", "message", "advice")}
    facts |= {key: line[key] for key in _FINDING_DEFAULTS if key in line}
    _check(facts, _FINDING)
    facts["evidence"] = _evidence_from_json(facts.get("evidence", {}))
    return Finding(**facts)


def _check(facts: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    wrong = [key for key, value in facts.items() if not isinstance(value, kinds[key]) or isinstance(value, bool)]
    if wrong:
        raise TypeError(f"{wrong} are not of the types that they must be.")


def _evidence_to_json(value: Any) -> Any:
    # A finding is never lost for its evidence: what JSON cannot hold becomes text.
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return strict_number(value)
    if isinstance(value, str):
        return "\\" + value if _LOOKS_NON_FINITE.match(value) else value
    if isinstance(value, Mapping):
        return {str(key): _evidence_to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_evidence_to_json(item) for item in value]
    with suppress(Exception):  # whatever a tensor of many numbers says to that
        return strict_number(float(value))
    with suppress(Exception):
        return str(value)[:200]
    return type(value).__qualname__


def _evidence_from_json(value: Any) -> Any:
    if isinstance(value, str) and _LOOKS_NON_FINITE.match(value):
        return value[1:] if value.startswith("\\") else _NON_FINITE[value]
    if isinstance(value, dict):
        return {key: _evidence_from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_evidence_from_json(item) for item in value]
    return value
