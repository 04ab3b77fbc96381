"""What the comparison of a checkpoint with a model means: renamed keys, gaps, another configuration, as findings."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from stethoscope._record import Finding
from stethoscope.audits import _keys

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from stethoscope.audits._checkpoint import CheckpointReport
    from stethoscope.audits._effect import Effect

_SHOWN = 5
_NO_EFFECT = 1e-3  # -60 dB: below what a listener or a metric notices


def listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(f"'{key}'" for key in keys[:_SHOWN]) + more


def renaming(report: CheckpointReport, number: int) -> list[Finding]:
    if (
        not report.suggested_prefix
        and not report.suggested_addition
        and report.fraction_with_prefix <= report.loaded_fraction
    ):
        return []
    strip, add = report.suggested_prefix, report.suggested_addition
    what = f"stripped of '{strip}'" if strip else f"put behind '{add}'"
    how = f"{{k.removeprefix('{strip}'): v" if strip else f"{{'{add}' + k: v"
    return [
        Finding(
            "checkpoint-prefix",
            "error",
            f"As it is, the checkpoint fills {len(report.loaded)} of {number} tensors ({report.loaded_fraction:.1%} of the elements); "
            f"with its keys {what} it fills {report.fraction_with_prefix:.1%}.",
            f"Call report.load(), or load {how} for k, v in state.items()}}. strict=False hides this.",
            evidence={
                "strip": strip,
                "add": add,
                "loaded_fraction": report.loaded_fraction,
                "fraction": report.fraction_with_prefix,
            },
        )
    ]


def gaps(
    report: CheckpointReport,
    pairs: Mapping[str, str],
    ours: _keys.Shapes,
    theirs: _keys.Shapes,
    state: Mapping[str, Tensor],
    partial: Sequence[str],
) -> list[Finding]:
    """What stays open after the best renaming: missing and mismatched tensors of the model, unused ones of the file."""
    missing = [key for key in ours if key not in pairs and not _keys.declared(key, partial)]
    used = set(pairs.values())
    unused = [key for key in theirs if key not in used and key not in ours and not _keys.declared(key, partial)]
    found = []
    if missing:
        elements = sum(_keys.elements(ours[key]) for key in missing)
        total = sum(map(_keys.elements, ours.values()))
        learned = any(isinstance(state[key], torch.nn.Parameter) for key in missing)
        measured = learned or any(state[key].is_floating_point() for key in missing)  # running statistics, codebooks
        reaches = report.effect is None or report.effect.missing > _NO_EFFECT
        shapes = [f"'{key}' {list(theirs[key])} against {list(ours[key])}" for key in missing if key in theirs][:_SHOWN]
        found.append(
            Finding(
                "checkpoint-partial",
                "info" if not (measured and reaches) else "error" if learned else "warning",
                f"{len(missing)} of {len(ours)} tensors ({elements / total:.1%} of the elements) keep their initial value: {listed(missing)}."
                + (f" Shapes differ (file against model): {'; '.join(shapes)}." if shapes else "")
                + _effect_in_words(report.effect),
                _advice(missing, unused, ours, theirs),
                module=missing[0].rpartition(".")[0],
                evidence={
                    "missing": missing[:100],
                    "elements": elements,
                    "effect": report.effect.missing if report.effect else None,
                },
            )
        )
    if unused:
        found.append(
            Finding(
                "checkpoint-unexpected",
                "warning" if missing else "info",
                f"{len(unused)} tensors of the checkpoint are not used: {listed(unused)}.",
                "Check that the model is built with the configuration of the checkpoint; list what is left out on purpose in partial=.",
                evidence={"unexpected": unused[:100]},
            )
        )
    return found


def _effect_in_words(result: Effect | None) -> str:
    if result is None:
        return ""
    return (
        f" On the example, other untrained values for them move the output by {result.missing:.3g} of its norm; "
        f"what was loaded moves it by {result.loaded:.3g} from that of the untrained model."
    )


def _advice(missing: Sequence[str], unused: Sequence[str], ours: _keys.Shapes, theirs: _keys.Shapes) -> str:
    """Name a likely renaming: same shape, all but one part of the name equal, and no rival on either side."""
    for key in missing:
        alike = [name for name in unused if theirs[name] == ours[key] and _one_part_differs(name, key)]
        rivals = [name for name in missing if alike and ours[name] == ours[key] and _one_part_differs(alike[0], name)]
        if len(alike) == len(rivals) == 1:
            return f"'{alike[0]}' in the file may be '{key}' under another name: rename it. If these are left out on purpose, list them in partial=."
    return "Build the model with the configuration of the checkpoint or get the complete file. If these are left out on purpose, list them in partial=."


def _one_part_differs(first: str, second: str) -> bool:
    ones, others = first.split("."), second.split(".")
    return len(ones) == len(others) and sum(a != b for a, b in zip(ones, others, strict=True)) == 1


def configuration(report: CheckpointReport, *, certain: bool) -> list[Finding]:
    if not report.differences:
        return []
    shown = "; ".join(
        f"{item.where}: {item.recorded!r} in the checkpoint, {item.actual!r} here"
        for item in report.differences[:_SHOWN]
    )
    more = f"; {len(report.differences) - _SHOWN} more" if len(report.differences) > _SHOWN else ""
    return [
        Finding(
            "checkpoint-config",
            "error" if certain else "warning",
            f"The model is configured differently from the one that was saved: {shown}{more}.",
            "Build the model with the recorded values. Shapes do not show this difference, and strict=True passes.",
            evidence={"differences": [list(item) for item in report.differences[:100]]},
        )
    ]
