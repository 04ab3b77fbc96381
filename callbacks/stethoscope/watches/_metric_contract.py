"""The declared metrics, compiled: which declaration an entry falls under, and what a phase must hold."""

from __future__ import annotations

from itertools import repeat
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stethoscope.watches._metric_field import Field

ANY = "*"
PLANS = 256
"""Most sets of names whose plan is kept; beyond it they are worked out anew."""


class Slot(NamedTuple):
    """What the name of one entry says.

    Args:
        place: position in the dictionary.
        raw: the name as given.
        bare: the name without affixes, see `_metric_names.split`.
        name: the declared metric that it is, None if it is none.
        field: its declaration.
        rate: whether an everlasting 0.0 is suspicious.
    """

    place: int
    raw: str
    bare: str
    name: str | None
    field: Field | None
    rate: bool


class Plan(NamedTuple):
    """What the names of one dictionary say, worked out once per set of names.

    Args:
        phase: its usual spelling.
        said: whether the phase comes from the names and not from the call.
        slots: what is to be judged: neither bookkeeping that is not declared, nor means over an epoch.
        given: all names.
        bares: bare name to name as given, of the slots.
        held: the declared metrics that are there.
        shape: all names in one text, whatever their order.
        empty: whether there is bookkeeping only.
    """

    phase: str
    said: bool
    slots: tuple[Slot, ...]
    given: tuple[str, ...]
    bares: Mapping[str, str]
    held: frozenset[str]
    shape: str
    empty: bool


class Contract:
    """Looks up declarations by given name and phase. Immutable once made.

    Args:
        fields: declared name to declaration. A name may say its phase (`val_loss`).
        aliases: name to one other name, or several, for the same metric; the direction does not matter.

    Raises:
        ValueError: two declarations claim the same name in the same phase, a name says another phase than its
            declaration, or an alias belongs to nothing declared.
    """

    def __init__(self, fields: Mapping[str, Field], aliases: Mapping[str, str | Sequence[str]]) -> None:
        self.fields = dict(fields)
        self.means = tuple(name for name, field in self.fields.items() if field.mean_of)
        self._table: dict[tuple[str, str], str] = {}
        self._same = _groups(aliases)
        self._plans: dict[tuple[str, tuple[str, ...]], tuple[Plan, ...]] = {}
        for name, field in self.fields.items():
            said = names.split(name).phase
            if said and field.phases and field.phases != (said,):
                raise ValueError(
                    f"Metric {name!r} is declared for phases {list(field.phases)}, but its name says {said!r}. "
                    "Rename it, or leave phases out."
                )
            if field.mean_of == name:
                raise ValueError(f"Metric {name!r} is declared as the mean of itself. Name the metric of a batch.")
            if field.mean_of:
                continue  # a mean over an epoch is looked up by its full name: its bare name is that of its batches
            for spelling in (name, *field.aliases, *self._same.get(name, ())):
                for phase in self.phases(name):
                    self._claim(names.split(spelling).bare, phase, name)
        known = {name for name, _ in self._table} | self.fields.keys()
        for group in self._same.values():
            if fields and not any(name in known or names.split(name).bare in known for name in group):
                raise ValueError(
                    f"Aliases {sorted(group)} belong to no declared metric. Declared: {list(self.fields)}."
                )
        for bare, phase in list(self._table):
            for other in names.synonyms(bare):
                self._table.setdefault((other, phase), self._table[bare, phase])

    def _claim(self, bare: str, phase: str, name: str) -> None:
        holder = self._table.setdefault((bare, phase), name)
        if holder != name:
            where = "every phase" if phase == ANY else f"phase {phase!r}"
            raise ValueError(
                f"Metrics {holder!r} and {name!r} both claim the name {bare!r} in {where}. Keep one of them."
            )

    def phases(self, name: str) -> tuple[str, ...]:
        """Return the phases that a declared metric belongs to; `("*",)` is every phase."""
        said = names.split(name).phase
        return self.fields[name].phases or ((said,) if said else (ANY,))

    def find(self, given: str, phase: str) -> str | None:
        """Return the declared name that an entry `given`, in the usual spelling of its phase, falls under."""
        bare = names.split(given).bare
        found = self._table.get((bare, phase)) or self._table.get((bare, ANY))
        if given in self.fields and (self.fields[given].mean_of or self.fields[given].covers(phase)):
            return given
        return found

    def plans(self, phase: str, given: tuple[str, ...]) -> tuple[Plan, ...]:
        """Return what a dictionary logged under `phase` holds: one plan per phase that its names say.

        A name that is repeated begins another dictionary.
        """
        plans = self._plans.get((phase, given))
        if plans is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plans = self._plans[phase, given] = tuple(self._planned(phase, given))
        return plans

    def _planned(self, phase: str, given: tuple[str, ...]) -> Iterator[Plan]:
        parts: dict[str, dict[str, int]] = {}
        for index, raw in enumerate(given):
            part = parts.setdefault(names.split(raw).phase or names.phase(phase), {})
            if raw in part:
                yield from map(self._plan, parts, parts.values(), repeat(phase))
                parts = {}
                part = parts.setdefault(names.split(raw).phase or names.phase(phase), {})
            part[raw] = index
        yield from map(self._plan, parts, parts.values(), repeat(phase))

    def _plan(self, phase: str, part: Mapping[str, int], called: str) -> Plan:
        slots, held = [], set()
        for raw, index in part.items():
            name, bare = self.find(raw, phase), names.split(raw).bare
            field = self.fields[name] if name is not None else None
            if name is not None:
                held.add(name)
            if (field is None and names.bookkeeping(bare)) or (field is not None and field.mean_of):
                continue
            rate = names.rate(bare) or (field is not None and field.better == "higher")
            slots.append(Slot(index, raw, bare, name, field, rate))
        return Plan(
            phase,
            names.phase(called) != phase,
            tuple(slots),
            tuple(part),
            {slot.bare: slot.raw for slot in slots},
            frozenset(held),
            "\n".join(sorted(part)),
            all(names.bookkeeping(slot.bare) for slot in slots),
        )

    def elsewhere(self, given: str) -> tuple[str, ...]:
        """Return the phases for which an entry's bare name is declared."""
        bare = names.split(given).bare
        return tuple(sorted({phase for name, phase in self._table if name == bare}))

    def expected(self, phase: str, *, required: bool = True) -> Iterator[str]:
        """Yield the declared names that every dictionary of a phase must hold, or with `required=False` may hold.

        A name for one phase takes precedence over the same bare name for all.
        """
        for name, field in self.fields.items():
            if field.mean_of or (required and not field.required):
                continue
            bare = names.split(name).bare
            if (self._table.get((bare, phase)) or self._table.get((bare, ANY))) == name:
                yield name

    def same(self, one: str, other: str) -> bool:
        """Whether two bare names stand for one metric."""
        return one == other or other in self._same.get(one, ()) or other in names.synonyms(one)


def _groups(aliases: Mapping[str, str | Sequence[str]]) -> dict[str, frozenset[str]]:
    groups: dict[str, frozenset[str]] = {}
    for name, others in aliases.items():
        members = {name, *((others,) if isinstance(others, str) else others)}
        for member in tuple(members):
            members |= groups.get(member, frozenset())
        for member in members:
            groups[member] = frozenset(members)
    return groups
