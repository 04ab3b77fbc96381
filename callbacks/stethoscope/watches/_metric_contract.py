"""The declared metrics, compiled: which declaration an entry of a dictionary falls under, and what a phase must hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stethoscope.watches import _metric_names as names

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from stethoscope.watches._metric_field import Field

ANY = "*"


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
        self._table: dict[tuple[str, str], str] = {}
        self._same = _groups(aliases)
        self._found: dict[tuple[str, str], str | None] = {}
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
        try:
            return self._found[given, phase]
        except KeyError:
            pass
        bare = names.split(given).bare
        found = self._table.get((bare, phase)) or self._table.get((bare, ANY))
        if given in self.fields and (self.fields[given].mean_of or self.fields[given].covers(phase)):
            found = given
        self._found[given, phase] = found
        return found

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
