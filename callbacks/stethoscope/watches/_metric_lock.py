"""Declared metrics as text: the lock file that goes into git, the difference between two, a table for documentation."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from stethoscope.watches._metric_field import Field

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

VERSION = 1
_TYPES = {"number": float, "integer": int, "boolean": bool}
_LIMITS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt"}
_PLAIN = ("required", "nullable", "finite", "unit", "phases", "aliases", "better", "mean_of", "weight", "tensor")
_DEFAULTS = {each.name: each.default for each in dataclasses.fields(Field)}


def dumps(fields: Mapping[str, Field]) -> str:
    """Return the text of a lock file: JSON, sorted, one metric per line, so that a diff in git shows what changed."""
    lines = [f"    {json.dumps(name)}: {json.dumps(_entry(fields[name]))}" for name in sorted(fields)]
    return f'{{\n  "version": {VERSION},\n  "metrics": {{\n' + ",\n".join(lines) + "\n  }\n}\n"


def load(path: Path) -> dict[str, Field]:
    """Read a lock file.

    Raises:
        ValueError: the file is corrupt, or was written by a newer version.
    """
    way_out = "Restore it from git, or delete it and write it anew with schema.write_lock()."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content["version"]
        if isinstance(version, int) and version > VERSION:
            raise ValueError(
                f"{path} has version {version}, this stethoscope reads versions up to {VERSION}. Upgrade stethoscope."
            )
        if version != VERSION:
            raise ValueError(f"{path} is no lock file of metrics: version {version!r}. {way_out}")
        entries = content["metrics"].items()
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no lock file of metrics: it is not JSON ({error}). {way_out}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no lock file of metrics: {error!r}. {way_out}") from error
    fields = {}
    for name, entry in entries:
        try:
            fields[name] = _field(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path} is no lock file of metrics: {name!r} cannot be read ({error}). {way_out}"
            ) from error
    return fields


def difference(old: Mapping[str, Field], new: Mapping[str, Field]) -> str:
    """Return what changed, one metric per line: `+` added, `-` removed, `~` changed. Empty where nothing did.

    Examples:
        >>> print(difference({"acc": Field(float, le=1.0)}, {"acc": Field(float, le=100.0), "loss": Field()}))
        ~ acc: maximum 1.0 -> 100.0
        + loss: number, required
    """
    lines = []
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            lines.append(f"- {name}: {_words(old[name])}")
        elif name not in old:
            lines.append(f"+ {name}: {_words(new[name])}")
        else:
            before, after = _entry(old[name]), _entry(new[name])
            changes = [
                f"{key} {_shown(before, key)} -> {_shown(after, key)}"
                for key in sorted(before.keys() | after.keys())
                if before.get(key) != after.get(key)
            ]
            lines += [f"~ {name}: {', '.join(changes)}"] if changes else []
    return "\n".join(lines)


def markdown(fields: Mapping[str, Field]) -> str:
    """Return a Markdown table with one row per metric."""
    rows = [
        ("Metric", "Type", "Unit", "Range", "Required", "May be None", "Phases", "Better", "Aliases", "Description"),
        ("---",) * 10,
    ]
    for name, field in fields.items():
        rows.append(
            (
                f"`{name}`" if "`" not in name else name,
                "tensor" if field.tensor else str(field.schema["type"]),
                field.unit,
                _range(field),
                "yes" if field.required and not field.mean_of else "no",
                "yes" if field.nullable else "no",
                ", ".join(field.phases) or "all",
                field.better,
                ", ".join(field.aliases),
                field.description or (f"mean of {field.mean_of} over an epoch" if field.mean_of else ""),
            )
        )
    return "\n".join("| " + " | ".join(map(_escaped, row)) + " |" for row in rows) + "\n"


def _entry(field: Field) -> dict[str, Any]:
    schema = field.schema
    entry: dict[str, Any] = {"type": schema["type"], **{limit: schema[limit] for limit in _LIMITS if limit in schema}}
    for name in _PLAIN:
        value = getattr(field, name)
        if name == "required" or value != _DEFAULTS[name]:
            entry[name] = list(value) if isinstance(value, tuple) else value
    return entry


def _field(entry: Mapping[str, Any]) -> Field:
    unknown = entry.keys() - {"type", *_LIMITS, *_PLAIN}
    if unknown:
        raise TypeError(f"unknown properties {sorted(unknown)}")
    for key in ("required", "nullable", "finite", "tensor"):
        if not isinstance(entry.get(key, True), bool):
            raise TypeError(f"{key} must be true or false, got {entry[key]!r}")
    limits: dict[str, Any] = {_LIMITS[key]: entry[key] for key in _LIMITS if key in entry}
    plain: dict[str, Any] = {
        key: tuple(entry[key]) if isinstance(entry[key], list) else entry[key] for key in _PLAIN if key in entry
    }
    return Field(_TYPES[entry["type"]], **limits, **plain)


def _shown(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key, _DEFAULTS.get(key))
    if isinstance(value, list | tuple):
        return ", ".join(value) or "none"
    return {"True": "yes", "False": "no", "None": "none"}.get(str(value), str(value))


def _words(field: Field) -> str:
    words = [str(field.schema["type"]), _range(field), field.unit, "required" if field.required else "optional"]
    return ", ".join(word for word in words if word)


def _range(field: Field) -> str:
    schema = field.schema
    low = f"[{schema['minimum']:g}" if "minimum" in schema else f"({schema.get('exclusiveMinimum', '-inf')}"
    high = f"{schema['maximum']:g}]" if "maximum" in schema else f"{schema.get('exclusiveMaximum', 'inf')})"
    return "" if (low, high) == ("(-inf", "inf)") else f"{low}, {high}"


def _escaped(text: str) -> str:
    for given, safe in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("\r", " "), ("\n", " ")):
        text = text.replace(given, safe)
    return text
