"""What is learned from logged dictionaries, one after the other, and what is judged against it.

The state is JSON: per phase the number of dictionaries, the shapes (sets of names) seen, the findings in force and per
bare name the counters made by `_fresh`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stethoscope.watches import _metric_findings as findings
from stethoscope.watches import _metric_names as names
from stethoscope.watches._metric_field import Field
from stethoscope.watches._metric_findings import At
from stethoscope.watches._metric_phases import compare

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Finding, Record
    from stethoscope.watches._metric_contract import Contract

LEARN = 2
"""Dictionaries of a phase that a key must have been in, without a gap, before its absence is worth a finding."""
STREAK = 100
"""Values in a row that must be None, or exactly 0.0 for an accuracy. A batch of 8 items of 1000 classes has none
right 99 % of the time by chance, but hardly a hundred in a row once anything is learned."""
SHAPES = 32
"""Most shapes kept per phase; a stream with more is not judged by shape any further."""

_CLASS = {
    "float": "number",
    "int": "number",
    "bool": "number",
    "tensor": "number",
    "tensor-grad": "number",
    "pair": "pair",
    "list": "list",
}
_STICKY = ("metric-unexpected", "metric-always-none", "metric-grad")


def init() -> State:
    """Return the state before the first dictionary."""
    return {"phases": {}, "last": "", "said": []}


def update(contract: Contract, state: State, records: Sequence[Record]) -> tuple[State, list[Finding]]:
    """Take in the logged ones among `records`; the given state is left as it is."""
    found: list[Finding] = []
    for phase, entries in _deliveries(records):
        state, said = _Dictionary(contract, state, phase, entries).judge()
        found += said
    return state, found


def _deliveries(records: Sequence[Record]) -> Iterator[tuple[str, list[Record]]]:
    """Yield dictionaries by the phase that the names say, else that of the call; a repeated name begins a new one."""
    by_phase: dict[str, list[Record]] = {}
    seen: set[tuple[str, str]] = set()
    for record in records:
        if record.source != "log":
            continue
        phase = names.split(record.name).phase or _usual(record.phase)
        if (phase, record.name) in seen:
            yield from by_phase.items()
            by_phase, seen = {}, set()
        seen.add((phase, record.name))
        by_phase.setdefault(phase, []).append(record)
    yield from by_phase.items()


_usual = lru_cache(maxsize=256)(names.phase)


def _fresh(raw: str) -> dict[str, Any]:
    return {
        "raw": raw,  # the name as given last
        "class": "",  # number, pair or list: the first that was given
        "seen": 0,  # dictionaries that held the key
        "numbers": 0,  # values that were not None
        "nones": 0,  # None in a row, to the last value
        "zeros": 0,  # exactly 0.0 in a row, to the last value
        "tensors": 0,  # tensors in a row, to the last value
        "absent": 0,  # dictionaries in a row without the key, to the last
        "longest": 0,  # the longest such row after which the key came back
    }


class _Dictionary:
    """One dictionary on its way through the judgement; `judge` is its only method of use."""

    def __init__(self, contract: Contract, state: State, phase: str, entries: list[Record]) -> None:
        self.contract, self.state, self.phase, self.entries = contract, state, phase, entries
        self.old = state["phases"].get(phase) or {"n": 0, "keys": {}, "shapes": [], "active": []}
        self.keys: dict[str, dict[str, Any]] = dict(self.old["keys"])
        self.present: dict[str, str] = {}
        self.held: set[str] = set()
        self.fresh: set[str] = set()
        self.problems: dict[str, Callable[[], Finding]] = {}
        first = entries[0]
        self.at = At(first.step, first.phase if _usual(first.phase) == phase else phase, first.rank)

    def judge(self) -> tuple[State, list[Finding]]:
        flipped, stayed = [], 0
        for record in self.entries:
            name = self.contract.find(record.name, self.phase)
            bare = names.split(record.name).bare
            if name is not None:
                self.held.add(name)
                if self.contract.fields[name].mean_of:
                    continue
            elif names.bookkeeping(bare):
                continue
            tensors = self._value(record, bare, name)
            stayed += tensors > 0
            if tensors < 0:
                flipped.append((bare, record.name))
        if not self.present:
            return self.state, []
        if stayed:
            # All at once is what happens when a toolkit reads its tensors; one alone comes from another model.
            for bare, raw in flipped:
                self._say(
                    "metric-type",
                    bare,
                    findings.wrong_kind,
                    raw,
                    "float",
                    "it was a tensor before, as the others still are",
                )
        self._structure()
        return self._close()

    def _say(self, code: str, bare: str, make: Callable[..., Finding], *args: Any, **more: Any) -> None:
        self.problems[f"{code}|{bare}"] = lambda: make(self.at, *args, **more)

    def _value(self, record: Record, bare: str, name: str | None) -> int:
        """Count and judge one value. Returns 1 for a tensor, -1 where a number has replaced one, else 0."""
        raw, value, kind = record.name, record.value, record.kind
        before = self.keys.get(bare)
        entry = self.keys[bare] = {**before} if before else _fresh(raw)
        field = self.contract.fields[name] if name is not None else None
        if bare not in self.present:
            entry["seen"] += 1
        self.present[bare] = entry["raw"] = raw
        if kind == "none":
            entry["nones"] += 1
            entry["zeros"] = entry["tensors"] = 0
            self._none(bare, entry, nullable=field is None or field.nullable)
            return 0
        if not entry["numbers"]:
            self.fresh.add(bare)
        entry["numbers"] += 1
        entry["longest"] = max(entry["longest"], entry["nones"])
        entry["nones"] = 0
        of = _CLASS.get(kind)
        if of is None:
            self._say(
                "metric-type",
                bare,
                findings.wrong_kind,
                raw,
                kind,
                "a metric is one number",
                declared=field is not None,
            )
            return 0
        if of != entry["class"]:
            if not entry["class"]:
                entry["class"] = of
            else:
                rule = f"was {findings.KINDS[entry['class']]} before"
                self._say("metric-type", bare, findings.wrong_kind, raw, kind if of != "number" else "number", rule)
        if of == "list" or not isinstance(value, float):
            if field is not None:
                self._say(
                    "metric-type", bare, findings.wrong_kind, raw, "list", "it is declared as a number", declared=True
                )
            return 0
        if value == 0.0:
            entry["zeros"] += 1
            self.fresh.add(bare)  # what is zero in validation and never computed in training is made up
            if entry["zeros"] >= STREAK and (names.rate(bare) or (field is not None and field.better == "higher")):
                self._say("metric-constant", bare, findings.constant, raw, entry["zeros"])
        else:
            entry["zeros"] = 0
        if field is not None:
            if fault := field.check(value):
                self._fault(fault.code, bare, raw, value, fault.rule, field.unit)
            if field.tensor and kind in {"float", "int", "bool"}:
                self._say(
                    "metric-type", bare, findings.wrong_kind, raw, "float", "it is declared as a tensor", declared=True
                )
        elif value - value != 0.0:
            self._say("metric-nonfinite", bare, findings.nonfinite, raw, value)
        if kind == "tensor-grad":
            self._say("metric-grad", bare, findings.graph, raw, loss=names.loss(bare))
        if kind in {"tensor", "tensor-grad"}:
            entry["tensors"] += 1
            return 1
        was = entry["tensors"]
        entry["tensors"] = 0
        return -1 if was >= LEARN and was == entry["numbers"] - 1 else 0

    def _fault(self, code: str, bare: str, raw: str, value: float, rule: str, unit: str) -> None:
        if code == "metric-nonfinite":
            self._say(code, bare, findings.nonfinite, raw, value)
        elif code == "metric-range":
            self._say(code, bare, findings.out_of_range, raw, value, rule, unit)
        else:
            self._say(code, bare, findings.wrong_kind, raw, "number", rule, declared=True, value=value)

    def _none(self, bare: str, entry: dict[str, Any], *, nullable: bool) -> None:
        raw = entry["raw"]
        if not nullable:
            self._say(
                "metric-type", bare, findings.wrong_kind, raw, "none", "it is declared as a number", declared=True
            )
        if entry["numbers"] >= LEARN and entry["nones"] > 2 * entry["longest"] + 1:
            self._say("metric-vanished", bare, findings.vanished, raw, entry["numbers"], entry["nones"], none=True)
        if entry["nones"] >= STREAK and not any(
            phase["keys"].get(bare, {}).get("numbers") for phase in self.state["phases"].values()
        ):
            self._say("metric-always-none", bare, findings.always_none, raw, entry["nones"])

    def _structure(self) -> None:
        """Judge which names are there and which are not."""
        given = [record.name for record in self.entries]
        known = set("\n".join(self.old["shapes"]).split("\n"))
        self.shape = "\n".join(given)
        new_shape = self.shape not in self.old["shapes"]
        if self.contract.fields and not all(map(names.bookkeeping, self.present)):
            self._declared(given, new_shape=new_shape)
        novel = [raw for raw in given if raw not in known] if new_shape and self.old["n"] else []
        absent = [bare for bare in self.keys if bare not in self.present] if len(self.present) < len(self.keys) else []
        for bare in absent:
            entry = self.keys[bare] = {**self.keys[bare]}
            entry["absent"] += 1
            if self.contract.find(entry["raw"], self.phase) is None and entry["seen"] >= LEARN:
                self._absent(bare, entry, given, novel, subset=new_shape and not novel)
        for bare in self.present:
            entry = self.keys[bare]
            if entry["absent"]:
                entry["longest"] = max(entry["longest"], entry["absent"])
                entry["absent"] = 0

    def _declared(self, given: list[str], *, new_shape: bool) -> None:
        undeclared = [raw for raw in given if self.contract.find(raw, self.phase) is None]
        for name in self.contract.expected(self.phase):
            if name not in self.held:
                self._say(
                    "metric-missing",
                    name,
                    lambda at, name=name: findings.missing(
                        at, name, given, names.nearest(name, undeclared), declared=True
                    ),
                )
        for raw in undeclared if new_shape else ():
            if not names.bookkeeping(names.split(raw).bare):
                self._say("metric-unexpected", raw, self._unexpected, raw)

    def _unexpected(self, at: At, raw: str) -> Finding:
        absent = [name for name in self.contract.expected(self.phase, required=False) if name not in self.held]
        return findings.unexpected(at, raw, names.nearest(raw, absent), self.contract.elsewhere(raw))

    def _absent(self, bare: str, entry: dict[str, Any], given: list[str], novel: list[str], *, subset: bool) -> None:
        raw, steady = entry["raw"], not entry["longest"]
        # Right away where nothing but this changed; else the gap must be longer than any that was healthy so far.
        if (subset and steady and entry["seen"] == self.old["n"]) or entry["absent"] > 2 * entry["longest"] + 1:
            self._say("metric-vanished", bare, findings.vanished, raw, entry["seen"], entry["absent"])
        elif steady and (renamed := names.nearest(raw, novel)):
            self._say("metric-missing", bare, findings.missing, raw, given, renamed, declared=False)
            self._say("metric-unexpected", renamed, findings.unexpected, renamed, raw, (), cause="metric-missing")

    def _close(self) -> tuple[State, list[Finding]]:
        """Return the state after this dictionary, and what was not said already."""
        shapes, active = self.old["shapes"], self.old["active"]
        new_shape = self.shape not in shapes
        if new_shape and len(shapes) < SHAPES:
            shapes = [*shapes, self.shape]
        after = {"n": self.old["n"] + 1, "keys": self.keys, "shapes": shapes, "active": active}
        phases = {**self.state["phases"], self.phase: after}
        said, compared = self.state["said"], {}
        if self.fresh or new_shape or self.state["last"] != self.phase:
            compared = dict(compare(self.contract, phases, self.phase, self.present))
        if self.problems or active:
            keep = [
                tag
                for tag in active
                if tag not in self.problems and (tag.startswith(_STICKY) or tag.rpartition("|")[2] not in self.present)
            ]
            after["active"] = keep + list(self.problems)
        found = [make() for tag, make in self.problems.items() if tag not in active]
        found += [make(self.at) for tag, make in compared.items() if tag not in said]
        said = [*said, *(tag for tag in compared if tag not in said)] if compared else said
        return {"phases": phases, "last": self.phase, "said": said}, found


def fields(state: State) -> dict[str, Field]:
    """Return declarations of the numbers that a state has learned. Counts, times and what never had a value are left out."""
    declared: dict[str, Field] = {}
    phases = state["phases"]
    for of in phases.values():
        for bare, entry in of["keys"].items():
            if entry["class"] != "number" or bare in declared:
                continue
            holding = {other: phases[other]["keys"][bare] for other in phases if bare in phases[other]["keys"]}
            declared[bare] = Field(
                required=all(key["seen"] == phases[other]["n"] for other, key in holding.items()),
                nullable=any(key["numbers"] < key["seen"] for key in holding.values()),
                phases=() if len(holding) == len(phases) else tuple(holding),
                tensor=all(key["tensors"] == key["numbers"] for key in holding.values()),
            )
    return declared
