"""The findings about metric dictionaries, in words. One function per finding; nothing is decided here."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from stethoscope._record import Finding, strict_number
from stethoscope.watches import _metric_names as names
from stethoscope.watches._metric_stuck import is_result

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stethoscope._record import JSON

KINDS = {
    "pair": "a (value, weight) pair",
    "list": "a list",
    "str": "text",
    "other": "no scalar (a tensor of several elements, a tuple or another object)",
    "none": "None",
    "number": "a number",
}


class At(NamedTuple):
    """Where a dictionary was logged: what every finding about it repeats."""

    step: int | None
    phase: str
    rank: int = 0


def missing(at: At, name: str, given: Iterable[str], nearest: str | None, *, declared: bool) -> Finding:
    """Say that a key is not in a dictionary that must hold it."""
    listed = _listed(given)
    meant = f" Nearest name: {nearest!r}." if nearest else ""
    why = "is declared as required" if declared else "was in every dictionary before"
    return Finding(
        "metric-missing",
        "error" if declared else "warning",
        f"{name!r} {why} and is missing in the {at.phase} metrics ({listed}).{meant}",
        f"Rename {nearest!r} to {name!r}, or give it as an alias."
        if nearest
        else f"Add {name!r} to what the {at.phase} step returns (None where it has no value), or declare it as not "
        "required. A default of 0.0 in its place would hide this.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            nearest=nearest,
            given=sorted(given),
        ),
    )


def unexpected(at: At, name: str, nearest: str | None, phases: Iterable[str], *, cause: str = "") -> Finding:
    """Say that a key is not declared, or not for this phase."""
    elsewhere = [phase for phase in phases if phase != "*"]
    if elsewhere:
        rule = f"is declared for {' and '.join(elsewhere)} only"
    else:
        rule = f"is not among the known metrics; the nearest is {nearest!r}" if nearest else "is new"
    return Finding(
        "metric-unexpected",
        "warning" if nearest or elsewhere else "info",
        f"{name!r} in the {at.phase} metrics {rule}.",
        f"Check its spelling, or declare it{f' (or an alias of {nearest!r})' if nearest else ''}.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            nearest=nearest,
        ),
        cause=cause,
    )


def wrong_kind(
    at: At, name: str, kind: str, rule: str, *, declared: bool = False, value: float | None = None
) -> Finding:
    """Say that a value is not of the kind that it should be."""
    shown = KINDS.get(kind, kind) if value is None else f"{value:g}"
    return Finding(
        "metric-type",
        "info"
        if kind == "str" and not declared and not (names.loss(name) or is_result(name, 0.5, rate=names.rate(name)))
        else ("error" if declared else "warning"),
        f"{name!r} in the {at.phase} metrics is {shown}, but {rule}.",
        _TYPE_ADVICE.get(kind, "Return one number per key."),
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            kind=kind,
            value=value,
        ),
    )


_TYPE_ADVICE = {
    "other": "Return one number per key: a tuple in place of a loss often comes from a function that returns the loss and something else.",
    "pair": "Return the value alone, or declare pairs for every phase.",
    "str": "Keep text out of the metrics; log it elsewhere.",
    "none": "Return a number, or declare the metric as nullable.",
    "float": "Wrap it where it is made: torch.as_tensor(value). Code that calls torch.isfinite or .item() on it fails otherwise.",
}


def out_of_range(at: At, name: str, value: float, rule: str, unit: str) -> Finding:
    """Say that a value is beyond its declared limits."""
    return Finding(
        "metric-range",
        "warning",
        f"{name!r} in the {at.phase} metrics is {value:g}{' ' if unit else ''}{unit}, but {rule}.",
        "Check the unit (a fraction or a percentage, a sum or a mean) and the denominator.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            value=value,
            unit=unit,
        ),
    )


def nonfinite(at: At, name: str, value: float) -> Finding:
    """Say that a value is NaN or infinite."""
    return Finding(
        "metric-nonfinite",
        "warning",
        f"{name!r} in the {at.phase} metrics is {strict_number(value)}.",
        "Look for an empty denominator or an overflow where it is computed; a NaN batch must be left out of sum and count alike.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            value=strict_number(value),
        ),
    )


def vanished(at: At, name: str, seen: int, absent: int, *, none: bool = False) -> Finding:
    """Say that a key was there and is gone, or has become None for good."""
    how = "has been None" if none else "has been missing"
    return Finding(
        "metric-vanished",
        "warning",
        f"{name!r} was in {seen} {at.phase} dictionaries and {how} in the last {absent}.",
        "Find the branch that no longer computes it; whoever reads it gets a KeyError or a default now.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            seen=seen,
            absent=absent,
            none=none,
        ),
    )


def always_none(at: At, name: str, seen: int, *, wanted: bool = False) -> Finding:
    """Say that a key never had a value; `wanted` if the evaluation itself adds a result under this name."""
    return Finding(
        "metric-always-none",
        "warning" if wanted else "info",
        f"{name!r} was None in all of the last {seen} {at.phase} dictionaries and has had no value in any phase.",
        "Find out why it is not computed: a package that is not installed, an exception that is caught, a function without return. Leave the key out if "
        "this model has no such metric."
        if wanted
        else "Nothing is wrong if this model has no such metric. Do not read it as 0.0.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            seen=seen,
        ),
    )


def constant(at: At, name: str, seen: int) -> Finding:
    """Say that an accuracy does not leave exactly zero."""
    return Finding(
        "metric-constant",
        "warning",
        f"{name!r} in the {at.phase} metrics has been exactly 0.0 for {seen} values in a row.",
        "Make sure that it is computed at all: a default such as .get(name, 0.0) looks like this. Then check labels and padding.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            seen=seen,
        ),
    )


def stuck(at: At, name: str, value: float, seen: int) -> Finding:
    """Say that a result stays the same while the loss improves."""
    return Finding(
        "metric-constant",
        "warning",
        f"{name!r} in the {at.phase} metrics has been exactly {value:.6g} in {seen} evaluations in a row, while the loss has improved by much.",
        "Make sure that it is computed from this model's outputs: a default, an old copy of the weights, or labels that can never agree (offset, padding, "
        "another vocabulary) look like this.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(metric=name, value=value, seen=seen),
    )


def echoes(at: At, name: str, value: float, seen: int) -> Finding:
    """Say that the loss of validation is that of training."""
    return Finding(
        "metric-phase-mismatch",
        "warning",
        f"{name!r} in the {at.phase} metrics is the loss of the last training step, bit for bit, in {seen} evaluations in a row ({value:.6g} now).",
        "Log what validation has computed: a variable of the training loop has the same name, or the value is cached.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(metric=name, value=value, seen=seen),
    )


def only_in_train(at: At, name: str, given: Iterable[str], nearest: str | None, *, usual: bool = False) -> Finding:
    """Say that validation does not report what training does."""
    meant = f" Nearest name: {nearest!r}." if nearest else ""
    return Finding(
        "metric-phase-mismatch",
        "info" if usual else "warning",
        f"{name!r} is reported in train, but not in val ({_listed(given)}).{meant}",
        f"Nothing is wrong if {name!r} is followed in training only. If a checkpoint or scheduler reads it in validation, return it there."
        if usual
        else f"Code that reads {name!r} in validation raises KeyError after the first epoch: return it there as well (None if "
        "it has no value), or name it as an alias.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            nearest=nearest,
            train="number",
            val="missing",
        ),
    )


def none_in_val(at: At, *, name: str, seen: int) -> Finding:
    """Say that validation has never a value for what training reports."""
    return Finding(
        "metric-phase-mismatch",
        "warning",
        f"{name!r} is a number in train, and was None in all of {seen} evaluations in val.",
        "Find the branch that computes it: is it skipped in eval mode or without gradients? A checkpoint or scheduler that follows it has nothing to go by.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(metric=name, train="number", val="none", seen=seen),
    )


def only_in_val(at: At, name: str) -> Finding:
    """Say that training does not report what validation does."""
    return Finding(
        "metric-phase-mismatch",
        "info",
        f"{name!r} is reported in val, but not in train.",
        "Nothing is wrong if it is computed in validation only.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            train="missing",
            val="number",
        ),
    )


def made_up(at: At, name: str, train: str, zeros: int) -> Finding:
    """Say that validation shows exact zeros for what training never computes."""
    return Finding(
        "metric-phase-mismatch",
        "warning",
        f"{name!r} is {'None' if train == 'none' else 'missing'} in train, while val reports exactly 0.0 for it "
        f"({zeros} of {zeros} values): most likely a default, not a result.",
        "Return None where the model has no such metric, and let whoever reads it skip None: no .get(name, 0.0), no 0.0 in a sum.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
            train=train,
            val=0.0,
            zeros=zeros,
        ),
    )


def graph(at: At, name: str, *, usual: bool, several: bool = False) -> Finding:
    """Say that a logged tensor still has its graph; `several` if that is made of graphs of several steps."""
    which = "the graphs of several steps" if several else "its graph (requires_grad)"
    return Finding(
        "metric-grad",
        "info" if usual else "warning",
        f"{name!r} in the {at.phase} metrics still has {which}. Only a detached copy was taken here.",
        "Keep name.detach() in lists and running sums: each entry that has its graph keeps a whole step's activations in memory."
        + ("" if at.phase == "train" else " Run validation under torch.no_grad()."),
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            metric=name,
        ),
    )


def lock_differs(at: At, path: str, difference: str) -> Finding:
    """Say that the declaration and its lock file are not the same."""
    return Finding(
        "metric-lock",
        "warning",
        f"The declared metrics differ from {path}: {difference}",
        "If the change is meant, write the lock file anew (schema.write_lock()) and commit it with the change.",
        at.step,
        "",
        at.phase,
        at.rank,
        _evidence(
            lock=path,
            difference=difference.splitlines(),
        ),
    )


def _evidence(**evidence: JSON) -> dict[str, JSON]:
    """Return strict JSON without what is empty."""
    kept = {name: value for name, value in evidence.items() if value not in (None, "", [])}
    return {name: strict_number(value) if isinstance(value, float) else value for name, value in kept.items()}


def _listed(given: Iterable[str]) -> str:
    listed = sorted(given)
    return (
        "given: " + ", ".join(listed[:8]) + (f" and {len(listed) - 8} more" if len(listed) > 8 else "")
        if listed
        else "empty"
    )
