"""What is learned from logged dictionaries, one after the other, and what is judged against it.

The state is JSON: per phase the number of dictionaries, the shapes (sets of names) seen, the findings in force and one
entry per bare name, see `_fresh`. An entry that fares as usual is not touched, so that a usual dictionary is cheap.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from stethoscope.watches import _metric_findings as findings
from stethoscope.watches import _metric_names as names
from stethoscope.watches import _metric_rare as rare
from stethoscope.watches import _metric_stuck as stuck
from stethoscope.watches._metric_field import Field
from stethoscope.watches._metric_findings import At
from stethoscope.watches._metric_phases import compare, numbers, seen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stethoscope._protocols import State
    from stethoscope._record import Finding, Record
    from stethoscope.watches._metric_contract import Contract, Plan, Slot

LEARN = 2
"""Dictionaries of a phase that a key must have been in, without a gap, before its absence is worth a finding."""
STREAK = 100
"""Values in a row that must be None, or exactly 0.0 for an accuracy. A batch of 8 items of 1000 classes has none
right 99 % of the time by chance, but hardly a hundred in a row once anything is learned."""
STRANGE = 10
"""Dictionaries in a row that a key may be absent from, beyond twice its longest gap, while no key is in all of them:
then metrics are logged piece by piece, and nothing tells which piece is late."""
LOCKED = 2
"""Times that a phase must have been come back to before a new key in it is worth an info: by then what
is logged once per epoch has been seen, also in Lightning, which validates before its training epoch ends."""
OTHERS = 10
"""Times that a key must be absent for each time that it was there, while every dictionary is of another kind: one
loss per task in turn, one set of names per validation loader."""
KEYS = 1000
"""Most keys kept per phase; names that hold a step or a file name would fill the memory."""
SHAPES = 32
"""Most shapes kept per phase; a stream with more is not judged by shape any further."""

_NUMBERS = frozenset({"float", "int", "bool"})
_TENSORS = frozenset({"tensor", "tensor-grad", "tensor-graphs"})
_STICKY = ("metric-unexpected", "metric-always-none", "metric-grad")


def init() -> State:
    """Return the state before the first dictionary."""
    return {"phases": {}, "last": "", "said": [], "planned": 0, "trained": [0.0, 0, None]}


def update(contract: Contract, state: State, records: Sequence[Record]) -> tuple[State, list[Finding]]:
    """Take in the logged ones among `records`; the given state is left as it is."""
    logged = [record for record in records if record.source == "log"]
    found: list[Finding] = []
    state = stuck.stepped(state, records)
    if logged:
        for plan in contract.plans(logged[0].phase, tuple([record.name for record in logged])):
            if plan.slots:
                state, said = _Dictionary(contract, state, plan, logged).judge()
                found += said
    return state, found


def fields(state: State) -> dict[str, Field]:
    """Return declarations of the numbers that a state has learned, without counts and times."""
    declared: dict[str, Field] = {}
    phases = state["phases"]
    for of in phases.values():
        for bare, entry in of["keys"].items():
            if entry["class"] != "number" or bare in declared:
                continue
            holding = {other: phases[other]["keys"][bare] for other in phases if bare in phases[other]["keys"]}
            declared[bare] = Field(
                required=all(seen(key, phases[other]) == phases[other]["n"] for other, key in holding.items()),
                nullable=any(key["blank"] for key in holding.values()),
                phases=() if len(holding) == len(phases) else tuple(holding),
                tensor=all(key["tensor"] is True and not key["mixed"] for key in holding.values()),
            )
    return declared


def _fresh(raw: str, since: int) -> dict[str, Any]:
    return {
        "raw": raw,  # the name as given last
        "since": since,  # dictionaries of the phase before the first that held it
        "class": "",  # number, pair or list: the first that was given
        "tensor": None,  # whether the last number was a tensor
        "mixed": False,  # whether numbers came both as tensors and not
        "missed": 0,  # dictionaries without it since
        "blank": 0,  # values that were None
        "nones": 0,  # of these in a row, to the last
        "rounds": 0,  # steps at which they came
        "round": None,  # the last of them
        "blind": None,  # the first of them
        "streak": None,  # equal values in a row outside of training, see `_metric_stuck`
        "zeros": 0,  # exactly 0.0 in a row, to the last value
        "absent": 0,  # dictionaries in a row without it, to the last
        "longest": 0,  # the longest row without it or with None, after which it came back
    }


class _Dictionary:
    """One dictionary on its way through the judgement; `judge` is its only method of use."""

    def __init__(self, contract: Contract, state: State, plan: Plan, records: Sequence[Record]) -> None:
        self.contract, self.state, self.plan, self.records = contract, state, plan, records
        self.old = state["phases"].get(plan.phase) or {"n": 0, "keys": {}, "shapes": [], "active": []}
        self.keys: dict[str, dict[str, Any]] = dict(self.old["keys"])
        step = records[0].step
        self.after = {"first": step, **self.old, "n": self.old["n"] + 1, "keys": self.keys, "step": step}
        # steps at which the phase was logged: as many as dictionaries where each says all of one evaluation
        self.after["rounds"] = self.old.get("rounds", 0) + (records[0].step != self.old.get("step"))
        self.fresh = False
        self.problems: dict[str, Callable[[], Finding]] = {}
        first = records[0]
        self.at = At(first.step, plan.phase if plan.said else first.phase, first.rank)

    def judge(self) -> tuple[State, list[Finding]]:
        """Return the state after this dictionary, and what was not said already."""
        flipped: list[Slot] = []
        stayed = False
        for slot in self.plan.slots:
            record = self.records[slot.place]
            value, kind = record.value, record.kind
            entry = self.keys.get(slot.bare)
            if entry is None:
                if len(self.keys) >= KEYS:
                    continue
                if not self.contract.fields and self.old.get("returns", 0) >= LOCKED:
                    self._say("metric-unexpected", slot.raw, findings.unexpected, slot.raw, None, ())
                self.fresh = True
                entry = self.keys[slot.bare] = _fresh(slot.raw, self.old["n"])
            if entry["raw"] != slot.raw:
                entry = self._change(slot.bare, raw=slot.raw)
            of = "number" if kind in _NUMBERS or kind in _TENSORS else kind
            if entry["class"] != of or entry["nones"] or not isinstance(value, float):
                self._unusual(slot, entry, of, kind)
                entry = self.keys[slot.bare]
            if isinstance(value, float):
                self._number(slot, entry, value)
                entry = self.keys[slot.bare]
            if kind in _TENSORS:
                stayed = True
                if kind != "tensor":
                    several = kind == "tensor-graphs"
                    usual = names.own_loss(slot.bare) and self.plan.phase == "train" and not several
                    make = partial(findings.graph, usual=usual, several=several)
                    self._say("metric-grad", "" if usual else slot.bare, make, slot.raw)
            if of == "number" and entry["tensor"] is None and kind in _NUMBERS and self._tensor_in_training(slot.bare):
                flipped.append(slot)
            if of == "number" and entry["tensor"] is not (kind in _TENSORS):
                if entry["tensor"] and not entry["mixed"] and numbers(entry, self.after) > LEARN:
                    flipped.append(slot)
                self._change(slot.bare, tensor=kind in _TENSORS, mixed=entry["tensor"] is not None)
        if stayed:
            # All at once is what happens when a toolkit reads its tensors; one alone comes from another model.
            for slot in flipped:
                rule = "it was a tensor before, as the others still are"
                self._say("metric-type", slot.bare, findings.wrong_kind, slot.raw, "float", rule)
        if self.plan.phase != "train":
            self._results()
        self._names()
        return self._close()

    def _tensor_in_training(self, bare: str) -> bool:
        """Whether a loss that is a number in another phase has always been a tensor in training."""
        train = self.state["phases"].get("train", {"keys": {}})
        entry = train["keys"].get(bare)
        if self.plan.phase == "train" or entry is None or not names.loss(bare):
            return False  # an accuracy is often counted on the host in validation
        return entry["tensor"] is True and not entry["mixed"] and numbers(entry, train) >= LEARN

    def _say(self, code: str, bare: str, make: Callable[..., Finding], *args: Any, **more: Any) -> None:
        self.problems[f"{code}|{bare}"] = lambda: make(self.at, *args, **more)

    def _change(self, bare: str, **changes: Any) -> dict[str, Any]:
        entry = self.keys[bare] = {**self.keys[bare], **changes}
        return entry

    def _number(self, slot: Slot, entry: dict[str, Any], value: float) -> None:
        """Judge the value of a number or a pair."""
        if value == 0.0 and slot.rate:
            zeros = self._change(slot.bare, zeros=entry["zeros"] + 1)["zeros"]
            self.fresh = True  # what is zero in validation and never computed in training is made up
            if zeros >= STREAK:
                self._say("metric-constant", slot.bare, findings.constant, slot.raw, zeros)
        elif entry["zeros"]:
            self._change(slot.bare, zeros=0)
        if slot.field is None:
            if names.share(slot.bare) and not 0.0 <= value <= 100.0 and value - value == 0.0:
                rule = "a share lies between 0 and 1, or 0 and 100 %"
                self._say("metric-range", slot.bare, findings.out_of_range, slot.raw, value, rule, "")
            if value - value != 0.0:
                self._say("metric-nonfinite", slot.bare, findings.nonfinite, slot.raw, value)
            return
        if fault := slot.field.check(value):
            if fault.code == "metric-nonfinite":
                self._say(fault.code, slot.bare, findings.nonfinite, slot.raw, value)
            elif fault.code == "metric-range":
                self._say(fault.code, slot.bare, findings.out_of_range, slot.raw, value, fault.rule, slot.field.unit)
            else:
                self._type(slot, "number", fault.rule, value=value)
        if slot.field.tensor and self.records[slot.place].kind in _NUMBERS:
            self._type(slot, "float", "it is declared as a tensor")

    def _results(self) -> None:
        """Look for results of validation that stay the same while the loss improves."""
        total, count, level = self.state.get("trained", (0.0, 0, None))
        if count:
            level = total / count
            self.state = {**self.state, "trained": [0.0, 0, level]}
        values = {slot.bare: self.records[slot.place].value for slot in self.plan.slots}
        finite = {bare: value for bare, value in values.items() if isinstance(value, float) and value - value == 0.0}
        loss = next((value for bare, value in finite.items() if names.loss(bare)), None)
        self._echoes(finite)
        for slot in self.plan.slots:
            value = finite.get(slot.bare)
            if value is None or slot.bare not in self.keys or not stuck.is_result(slot.bare, value, rate=slot.rate):
                continue
            before = self.keys[slot.bare].get("streak")
            streak = stuck.follow(before and stuck.Streak(*before), value, self.at.step or 0, loss, level)
            self._change(slot.bare, streak=list(streak))
            if stuck.is_stuck(streak, loss, level, self.state.get("planned", 0), rate=slot.rate):
                self._say("metric-constant", slot.bare, findings.stuck, slot.raw, value, streak.seen)

    def _echoes(self, finite: dict[str, float]) -> None:
        """Look for a loss of validation that is the one of the last training step."""
        for slot in self.plan.slots:
            if slot.bare not in finite or slot.bare not in self.keys or not names.loss(slot.bare):
                continue
            echo = stuck.echo(self.keys[slot.bare].get("echo", []), finite[slot.bare], self.state.get("latest"))
            self._change(slot.bare, echo=echo)
            if len(echo) >= stuck.ECHOES:
                self._say("metric-phase-mismatch", slot.bare, findings.echoes, slot.raw, echo[-1], len(echo))

    def _type(self, slot: Slot, kind: str, rule: str, value: float | None = None) -> None:
        declared = slot.field is not None
        self._say("metric-type", slot.bare, findings.wrong_kind, slot.raw, kind, rule, declared=declared, value=value)

    def _unusual(self, slot: Slot, entry: dict[str, Any], of: str, kind: str) -> None:
        """Take in what is no number, or not what it was before."""
        if kind == "none":
            rounds = (entry.get("rounds", 0) if entry["nones"] else 0) + (entry.get("round") != self.at.step)
            entry = self._change(
                slot.bare,
                nones=entry["nones"] + 1,
                blank=entry["blank"] + 1,
                rounds=rounds,
                round=self.at.step,
                blind=entry.get("blind") if entry["nones"] else self.at.step,
                zeros=0,
            )
            self._none(slot, entry)
            return
        if entry["nones"]:
            entry = self._change(slot.bare, nones=0, longest=max(entry["longest"], entry["nones"]))
            self.fresh = True
        if of == "list" and self.plan.phase != "train" and names.share(slot.bare):
            self._type(slot, of, "a share is one number; give each class a name of its own")  # no logger draws a list
        elif of not in {"number", "pair", "list"}:
            self._type(slot, kind, "a metric is one number")
        elif not entry["class"]:
            self._change(slot.bare, **{"class": of})
        elif of != entry["class"]:
            self._type(slot, of, f"was {findings.KINDS[entry['class']]} before")
        if of == "list" and slot.field is not None:
            self._type(slot, of, "it is declared as a number")

    def _none(self, slot: Slot, entry: dict[str, Any]) -> None:
        count = numbers(entry, self.after)
        if slot.field is not None and not slot.field.nullable:
            self._type(slot, "none", "it is declared as a number")
        elif count >= LEARN and entry["nones"] > 2 * entry["longest"] + 1:
            self._say("metric-vanished", slot.bare, findings.vanished, slot.raw, count, entry["nones"], none=True)
        # a metric of validation alone is None in training until the first validation
        validated, planned = self.plan.phase != "train", self.state.get("planned", 0)
        often = validated and rare.lasts(entry["rounds"], entry.get("blind"), self.at.step, planned)
        often = often or entry["nones"] >= STREAK
        if often and not any(numbers(phase["keys"].get(slot.bare), phase) for phase in self.state["phases"].values()):
            wanted = validated and rare.wanted(slot.bare, self.state["phases"].get("train"), rate=slot.rate)
            self._say("metric-always-none", slot.bare, findings.always_none, slot.raw, entry["nones"], wanted=wanted)

    def _names(self) -> None:
        """Judge which names are there and which are not."""
        plan, shapes = self.plan, self.old["shapes"]
        novel: list[str] = []
        changed = plan.shape not in shapes
        if changed:
            known = set("\n".join(shapes).split("\n"))
            novel = [raw for raw in plan.given if raw not in known]
            if len(shapes) < SHAPES:
                self.after["shapes"] = [*shapes, plan.shape]
            self.fresh = True
        if self.contract.fields and not plan.empty:
            self._declared(undeclared=changed)
        if len(plan.bares) < len(self.keys) or self.old.get("gaps"):
            self._absences(novel, subset=changed and not novel)

    def _declared(self, *, undeclared: bool) -> None:
        given, phase = self.plan.given, self.plan.phase
        others = [slot.raw for slot in self.plan.slots if slot.name is None]
        for name in self.contract.expected(phase):
            if name not in self.plan.held:
                self._say("metric-missing", name, _missing, name, given, others)
        if undeclared:
            absent = [name for name in self.contract.expected(phase, required=False) if name not in self.plan.held]
            for raw in others:
                self._say("metric-unexpected", raw, _unexpected, raw, absent, self.contract.elsewhere(raw))

    def _absences(self, novel: list[str], *, subset: bool) -> None:
        gaps = False
        usual = _companions(tuple(self.old["shapes"]), frozenset(self.plan.bares))
        companion = any(
            not self.keys[bare]["missed"] and not self.keys[bare]["since"]
            for bare in self.plan.bares
            if bare in self.keys
        )
        for bare in self.keys:
            entry = self.keys[bare]
            if bare in self.plan.bares:
                if entry["absent"]:
                    self._change(bare, longest=max(entry["longest"], entry["absent"]), absent=0)
                continue
            gaps = True
            entry = self._change(bare, absent=entry["absent"] + 1, missed=entry["missed"] + 1)
            count = seen(entry, self.after)
            if self.contract.find(entry["raw"], self.plan.phase) is not None:
                continue
            if count < LEARN:
                planned = self.state.get("planned", 0) if companion and self.plan.phase != "train" else None
                if planned is not None and rare.only_first(bare, entry, self.after, count, self.at.step, planned):
                    self._say("metric-vanished", bare, findings.vanished, entry["raw"], count, entry["absent"])
                continue
            if (
                f"metric-missing|{bare}" in self.old["active"]
                or f"metric-unexpected|{entry['raw']}" in self.old["active"]
            ):
                continue  # renamed or not declared, and said so
            # A companion that has always been there tells that this dictionary is one of the usual kind. With it, a key
            # that was always there too is missed at once if nothing else changed; else the gap must be longer than any
            # that was healthy so far.
            steady = not entry["longest"]
            patience = 2 * entry["longest"] + (2 if companion else STRANGE)
            if bare not in usual:
                patience = max(patience, OTHERS * count)
            # among dictionaries in a row, one may lack what has no value; training may have gone on without one
            later = self.plan.phase != "train" and self.at.step != self.old.get("step", self.at.step)
            alone = later or self.state["last"] != self.plan.phase
            if (subset and companion and steady and alone and count == self.old["n"]) or entry["absent"] > patience:
                self._say("metric-vanished", bare, findings.vanished, entry["raw"], count, entry["absent"])
            elif steady and novel and (renamed := names.nearest(entry["raw"], novel)):
                given = self.plan.given
                self._say("metric-missing", bare, findings.missing, entry["raw"], given, renamed, declared=False)
                again = partial(findings.unexpected, cause="metric-missing")
                self._say("metric-unexpected", renamed, again, renamed, entry["raw"], ())
        if gaps != self.old.get("gaps", False):
            self.after["gaps"] = gaps

    def _close(self) -> tuple[State, list[Finding]]:
        phase, active, said = self.plan.phase, self.old["active"], self.state["said"]
        phases = {**self.state["phases"], phase: self.after}
        if self.state["last"] not in {"", phase} and self.old["n"]:
            self.after["returns"] = self.old.get("returns", 0) + 1
        compared: dict[str, Callable[[At], Finding]] = {}
        if self.fresh or self.state["last"] != phase:
            compared = {
                tag: make for tag, make in compare(self.contract, phases, phase, self.plan.bares) if tag not in said
            }
        found = [make() for tag, make in self.problems.items() if tag not in active]
        found += [make(self.at) for make in compared.values()]
        if self.problems or active:
            # What was said about a key that is not here now still holds; what is said once is not said again.
            keep = [
                tag
                for tag in active
                if tag not in self.problems
                and (tag.startswith(_STICKY) or tag.rpartition("|")[2] not in {*self.plan.bares, *self.plan.held})
            ]
            self.after["active"] = keep + list(self.problems)
        return {**self.state, "phases": phases, "last": phase, "said": [*said, *compared] if compared else said}, found


@lru_cache(maxsize=1024)
def _companions(shapes: tuple[str, ...], present: frozenset[str]) -> frozenset[str]:
    """Return the bare names in those shapes that hold all that is present: what a dictionary of its kind may hold."""
    kinds = [frozenset(names.split(raw).bare for raw in shape.split("\n")) for shape in shapes]
    return frozenset().union(*(kind for kind in kinds if present <= kind))


def _missing(at: At, name: str, given: Sequence[str], others: Sequence[str]) -> Finding:
    return findings.missing(at, name, given, names.nearest(name, others), declared=True)


def _unexpected(at: At, raw: str, absent: Sequence[str], phases: Sequence[str]) -> Finding:
    return findings.unexpected(at, raw, names.nearest(raw, absent), phases)
