"""Which modules or parameters a probe looks at."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVar

from stethoscope._record import Finding
from stethoscope._tree import plain
from stethoscope.probes._compiled import original
from stethoscope.probes._hook import takes_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import nn

Pattern: TypeAlias = "str | type[nn.Module] | Callable[[str, nn.Module], bool]"
"""A name pattern such as `"encoder.*"` (as in `fnmatch`), a module type, or a predicate of name and module."""

T = TypeVar("T")


def as_patterns(given: Pattern | Iterable[Pattern]) -> tuple[Pattern, ...]:
    """Return one pattern or several as a tuple.

    Raises:
        TypeError: something is neither a name pattern, a module type nor a predicate.
    """
    patterns = (given,) if isinstance(given, str) or callable(given) else tuple(given)
    for pattern in patterns:
        if not (isinstance(pattern, str) or callable(pattern)):
            raise TypeError(
                f"Cannot select modules by {pattern!r}. Give a name pattern such as 'encoder.*', a module type or a "
                "predicate of name and module."
            )
    return patterns


def named_modules(model: nn.Module, probe: str) -> tuple[list[tuple[str, nn.Module, nn.Module]], list[Finding]]:
    """Return the modules that can be hooked, as candidates for `select`, and a finding about those that cannot.

    Of a compiled submodule the wrapper is taken, whose hooks fire in compiled steps as well.
    """
    modules = [
        (plain(name), original(module), module)
        for name, module in model.named_modules()
        if not name.endswith("._orig_mod")
    ]
    able = [each for each in modules if takes_hooks(each[1])]
    if len(able) == len(modules):
        return able, []
    first = next(name for name, module, _ in modules if not takes_hooks(module))
    note = Finding(
        "probe-read-nothing",
        "info",
        f"{probe}: {f'the module {first!r}' if first else 'the model'} is a ScriptModule (scripted, or inside of a traced one), which calls no hooks.",
        "Observe the module that it was made from, or a module before or after it.",
        module=first,
        evidence={"probe": probe, "modules": len(modules) - len(able)},
    )
    return able, [note]


class Choice(Protocol):
    """What a specification says about what to measure where, and how often."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of what to record."""
        ...

    @property
    def include(self) -> Pattern | Iterable[Pattern]:
        """What to look at; empty for all."""
        ...

    @property
    def exclude(self) -> Pattern | Iterable[Pattern]:
        """What to leave out."""
        ...

    @property
    def every(self) -> int | None:
        """In steps."""
        ...


def settle(probe: Choice, known: Iterable[str], kind: str) -> None:
    """Make tuples of what a frozen specification was given, and refuse statistics that it does not know.

    Raises:
        ValueError: an unknown statistic, or none.
        TypeError: see `as_patterns`.
    """
    object.__setattr__(probe, "statistics", tuple(probe.statistics))
    object.__setattr__(probe, "include", as_patterns(probe.include))
    object.__setattr__(probe, "exclude", as_patterns(probe.exclude))
    unknown = sorted(set(probe.statistics) - set(known))
    if unknown or not probe.statistics:
        raise ValueError(f"Unknown {kind} statistics {unknown}. Known: {list(known)}.")


def includes(probe: Choice, other: Choice) -> bool:
    """Whether `other` chooses nothing that `probe`, a specification of its class, does not record as often."""
    return (
        set(other.statistics) <= set(probe.statistics)
        and (not (probe.include or probe.exclude) or (probe.include, probe.exclude) == (other.include, other.exclude))
        and (probe.every == other.every or probe.every == 1)
    )


def matches(pattern: Pattern, name: str, owner: nn.Module) -> bool:
    """Whether a module, or the owner of a parameter, is meant by the pattern."""
    if isinstance(pattern, str):
        return fnmatchcase(name, pattern)
    if isinstance(pattern, type):
        return isinstance(owner, pattern)
    return pattern(name, owner)


def named_parameters(model: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """Return name, owning module and parameter of all parameters; shared ones once, under their first name."""
    owners = dict(model.named_modules(remove_duplicate=False))
    return [(plain(name), owners[name.rpartition(".")[0]], each) for name, each in model.named_parameters()]


def select(
    candidates: Iterable[tuple[str, nn.Module, T]],
    include: tuple[Pattern, ...],
    exclude: tuple[Pattern, ...],
    probe: str,
) -> tuple[list[tuple[str, T]], list[Finding]]:
    """Choose candidates, and say which patterns chose nothing.

    Args:
        candidates: name, module that decides by type, and what is chosen.
        include: at least one must match; empty for all.
        exclude: none may match.
        probe: name of the probe, for the message.

    Returns:
        The chosen names and things in their order, and one finding per pattern that matched nothing.
    """
    used: set[int] = set()
    chosen: list[tuple[str, T]] = []
    names: list[str] = []
    for name, owner, thing in candidates:
        names.append(name)
        wanted = [i for i, pattern in enumerate(include) if matches(pattern, name, owner)]
        unwanted = [len(include) + i for i, pattern in enumerate(exclude) if matches(pattern, name, owner)]
        used.update(wanted, unwanted)
        if (wanted or not include) and not unwanted:
            chosen.append((name, thing))
    some = ", ".join(repr(name) for name in names if name)
    notes = [
        Finding(
            "probe-read-nothing",
            "warning",
            f"{probe}: the pattern {pattern!r} matches nothing in this model.",
            f"Compare with the names of the model: {some[:300]}{' ...' if len(some) > 300 else ''}.",
            evidence={"pattern": str(pattern), "probe": probe},
        )
        for i, pattern in enumerate((*include, *exclude))
        if i not in used
    ]
    return chosen, notes
