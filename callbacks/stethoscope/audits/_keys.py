"""Finds out which name in a file belongs to which name in a model: prefixes, wrappers, tied tensors."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]

# What torch.compile, FSDP and activation checkpointing put into names, anywhere in them.
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


class Match(NamedTuple):
    """How the file's names become the model's.

    Args:
        strip: text to take off the file's keys.
        add: text to put in front of them afterwards.
        pairs: model key to file key, shapes equal.
    """

    strip: str
    add: str
    pairs: dict[str, str]


def plain(model: Shapes, file: Shapes) -> Match:
    """What `load_state_dict` matches: equal names with equal shapes."""
    return Match("", "", {key: key for key, shape in model.items() if file.get(key) == shape})


def best(model: Shapes, file: Shapes) -> Match:
    """The renaming that fills most elements of the model, or `plain` where none fills more.

    A renaming must account for at least half of the model's or half of the file's elements: a few equal endings
    (`"0.weight"`) are no evidence.
    """
    asis = plain(model, file)
    candidates = [*_prefixed(model, file, unchanged), *_prefixed(model, file, unwrapped)]
    match = max(candidates, key=lambda candidate: _filled(candidate, model), default=asis)
    filled = _filled(match, model)
    convincing = 2 * filled >= min(_total(model.values()), _total(file.values())) > 0
    return match if convincing and filled > _filled(asis, model) else asis


def unchanged(key: str) -> str:
    """The key itself."""
    return key


def unwrapped(key: str) -> str:
    """The key without what compile, FSDP and checkpointing put into it."""
    for wrapper in _WRAPPERS:
        key = key.replace(wrapper, "")
    return key


def _prefixed(model: Shapes, file: Shapes, rename: Callable[[str], str]) -> list[Match]:
    """The best stripping and the best adding of one prefix, after `rename` on both sides."""
    ours = {rename(key): key for key in model}
    theirs = {rename(key): key for key in file}
    matches = []
    for strip in _likely(ours, theirs):
        pairs = {
            ours[name.removeprefix(strip)]: key
            for name, key in theirs.items()
            if name.startswith(strip) and model.get(ours.get(name.removeprefix(strip), "")) == file[key]
        }
        matches.append(Match(_common(pairs, strip), "", pairs))
    for add in _likely(theirs, ours):
        pairs = {
            key: theirs[name.removeprefix(add)]
            for name, key in ours.items()
            if name.startswith(add) and file.get(theirs.get(name.removeprefix(add), "")) == model[key]
        }
        matches.append(Match("", add, pairs))
    return matches


def _likely(short: Iterable[str], long: Iterable[str], most: int = 5) -> list[str]:
    """The prefixes that turn most of the long names into one of the short ones."""
    known = set(short)
    counts: Counter[str] = Counter()
    for name in long:
        parts = name.split(".")
        for cut in range(len(parts)):
            if ".".join(parts[cut:]) in known:
                counts["".join(f"{part}." for part in parts[:cut])] += 1
    return [prefix for prefix, _ in counts.most_common(most)]


def _common(pairs: Mapping[str, str], strip: str) -> str:
    """The prefix as it stands in the file, where all pairs share it; else the wrapper that is inside."""
    fronts = {theirs.removesuffix(ours) for ours, theirs in pairs.items() if theirs.endswith(ours)}
    if len(fronts) == 1 and all(theirs.endswith(ours) for ours, theirs in pairs.items()):
        return fronts.pop()
    return next((wrapper for wrapper in _WRAPPERS if any(wrapper in key for key in pairs.values())), strip)


def _filled(match: Match, model: Shapes) -> int:
    return _total(model[key] for key in match.pairs)


def _total(shapes: Iterable[tuple[int, ...]]) -> int:
    return sum(elements(shape) for shape in shapes)


def elements(shape: tuple[int, ...]) -> int:
    """Number of elements of a tensor of this shape."""
    number = 1
    for length in shape:
        number *= length
    return number


def modern(key: str) -> str:
    """The name that `load_state_dict` gives a weight-normalised tensor of old (`weight_g`, `weight_v`)."""
    for old, new in (("_g", "original0"), ("_v", "original1")):
        head, _, last = key.rpartition(".")
        if last.endswith(old):
            return f"{head}{'.' if head else ''}parametrizations.{last.removesuffix(old)}.{new}"
    return key


def declared(key: str, partial: Iterable[str]) -> bool:
    """Whether a key is, lies in, or matches something that is left out on purpose."""
    names = (partial,) if isinstance(partial, str) else partial
    return any(key == name or key.startswith(f"{name}.") or fnmatchcase(key, name) for name in names)


def tied(state: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    """Every key with all keys of the same tensor, itself included (`state_dict(keep_vars=True)` keeps identity)."""
    together: dict[int, list[str]] = {}
    for key, tensor in state.items():
        together.setdefault(id(tensor), []).append(key)
    return {key: tuple(keys) for keys in together.values() for key in keys}
