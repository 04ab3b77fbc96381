"""What training reports and validation does not, and the other way round."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from stethoscope.watches import _metric_findings as findings
from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    from stethoscope._record import Finding
    from stethoscope.watches._metric_contract import Contract
    from stethoscope.watches._metric_findings import At

ZEROS = 3
"""Exact zeros that validation must report for an accuracy that training does not know, before it counts as made up."""

BLANKS = 3
"""Evaluations in which a metric must be None that training computes: one may have had nothing to count."""


def seen(entry: Mapping[str, Any], phase: Mapping[str, Any]) -> int:
    """Return how many dictionaries of a phase held a key."""
    return int(phase["n"] - entry["since"] - entry["missed"])


def numbers(entry: Mapping[str, Any] | None, phase: Mapping[str, Any]) -> int:
    """Return how many of its values were not None."""
    return max(0, seen(entry, phase) - entry["blank"]) if entry else 0


def compare(
    contract: Contract, phases: Mapping[str, Any], phase: str, present: Collection[str]
) -> Iterator[tuple[str, Callable[[At], Finding]]]:
    """Yield what differs between train and val, each with the tag under which it is remembered.

    Args:
        contract: declared metrics; what is declared for a phase is judged there, not here.
        phases: the state of every phase, the dictionary at hand included.
        phase: phase of the dictionary at hand.
        present: its bare names.
    """
    train, val = phases.get("train"), phases.get("val")
    if train is None or val is None or phase not in {"train", "val"}:
        return
    # A toolkit may log in pieces. While validation is under way, only what training logs together with what is here is
    # expected here; once training goes on, validation has said all it has to say.
    expected = _together(train["shapes"], present, contract) if phase == "val" else train["keys"].keys()
    yield from _only_in_train(contract, train, val, expected)
    yield from _only_in_val(contract, train, val)


def _only_in_train(
    contract: Contract, train: Mapping[str, Any], val: Mapping[str, Any], expected: Iterable[str]
) -> Iterator[tuple[str, Callable[[At], Finding]]]:
    given = [other["raw"] for other in val["keys"].values()]
    parts = {names.split(raw).bare for shape in val["shapes"] for raw in shape.split("\n")}
    for bare in expected:
        entry = train["keys"].get(bare)
        if not numbers(entry, train) or names.bookkeeping(bare) or names.running(bare):
            continue
        if contract.find(entry["raw"], "train") is not None:
            continue
        blank = val["keys"].get(bare)
        if blank is not None and not numbers(blank, val) and blank["rounds"] >= BLANKS:
            yield (
                f"metric-phase-mismatch|none|{bare}",
                partial(findings.none_in_val, name=entry["raw"], seen=blank["rounds"]),
            )
        # A numerator and a denominator, wer_num and wer_denom, are the metric too: it is their quotient.
        if _in(contract, bare, val["keys"]) is None and not any(part.startswith(f"{bare}_") for part in parts):
            yield (
                f"metric-phase-mismatch|train|{bare}",
                partial(_named, name=entry["raw"], given=given, known=frozenset(train["keys"])),
            )


def _named(at: At, *, name: str, given: list[str], known: frozenset[str]) -> Finding:
    # Terms of a loss are often followed in training only. One that validation spells otherwise was meant to be there; a
    # name that training has as well is another term, however alike.
    nearest = names.nearest(name, given)
    renamed = nearest is not None and names.split(nearest).bare not in known
    usual = names.term(names.split(name).bare) and not renamed
    return findings.only_in_train(at, name, given, nearest, usual=usual)


def _only_in_val(
    contract: Contract, train: Mapping[str, Any], val: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[At], Finding]]]:
    for bare, entry in val["keys"].items():
        raw, count = entry["raw"], numbers(entry, val)
        if not count or names.bookkeeping(bare):
            continue
        there = _in(contract, bare, train["keys"])
        zero = names.rate(bare) and entry["zeros"] == count
        if there is not None:
            if zero and not numbers(train["keys"][there], train):
                make = partial(findings.made_up, name=raw, train="none", zeros=count)
                yield f"metric-phase-mismatch|zero|{bare}", make
        elif not names.split(raw).phase and contract.find(raw, "val") is None:  # val_wer is meant for val
            if zero and count >= ZEROS:
                make = partial(findings.made_up, name=raw, train="missing", zeros=count)
                yield f"metric-phase-mismatch|zero|{bare}", make
            yield f"metric-phase-mismatch|val|{bare}", partial(findings.only_in_val, name=raw)


def _in(contract: Contract, bare: str, keys: Mapping[str, Any]) -> str | None:
    """Return the key under which a metric is given, if it is."""
    if bare in keys:
        return bare
    return next((other for other in keys if contract.same(bare, other)), None)


def _together(shapes: list[str], present: Collection[str], contract: Contract) -> set[str]:
    found: set[str] = set()
    for shape in shapes:
        bares = {names.split(raw).bare for raw in shape.split("\n")}
        if not bares.isdisjoint(present) or any(_in(contract, bare, dict.fromkeys(bares)) for bare in present):
            found |= bares
    return found
