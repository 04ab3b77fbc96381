"""Gradients of modules, in the order of the forward pass: which are cut off, which rest, how they change over depth. Part of `GradientHealth`."""

from __future__ import annotations

import math
import re
from itertools import chain
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

from stethoscope.watches._streaks import owner

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FEWEST = 4  # modules that a trend or a median needs
UNHELD, IDLE, TRAINED = 1, 3, 4  # as probes.Optimizers numbers roles


class Module(NamedTuple):
    """What is known of one module in one step."""

    gradient: float  # 2-norm over its parameters
    relative: float  # that over the norm of its weights; 0 where those are zero


def by_module(gradients: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, Module]:
    """Gradients of modules in the order of the forward pass, which is that of their arrival turned round."""
    names: dict[str, list[str]] = {}
    for name in reversed([name for name in gradients if name]):
        names.setdefault(owner(name), []).append(name)
    found = {}
    for module, own in names.items():
        gradient = math.hypot(*(gradients[name] for name in own))
        weight = math.hypot(*chain([0.0], (weights[name] for name in own if name in weights)))
        found[module] = Module(gradient, gradient / weight if weight > 0 and math.isfinite(weight) else 0.0)
    return found


def trend(
    alive: Sequence[tuple[str, float]],
) -> tuple[float, Sequence[tuple[str, float]], Sequence[tuple[str, float]]]:
    """The first quarter's median over that of the last quarter, and both quarters."""
    quarter = max(1, len(alive) // 4)
    early, late = alive[:quarter], alive[-quarter:]
    return max(median(value for _, value in early) / median(value for _, value in late), 1e-300), early, late


def cut_off(roles: Mapping[str, float], ran: Mapping[str, float]) -> list[str]:
    """Modules that ran and got no gradient, up to the first that got one: what comes after it may be a branch without use."""
    found: list[str] = []
    for name, role in roles.items():
        if role == TRAINED:
            break
        if role == IDLE and owner(name) in ran:
            found.append(owner(name))
    return found


def reached(name: str, found: Mapping[str, Mapping[str, float]]) -> bool:
    """Whether an optimizer has written with a gradient that holds NaN or Inf, unless it was taken away or mended before."""
    # of shards and sparse gradients it is not known how large they were at the write
    used = found["gradient/applied_norm"].get(name, math.inf)
    return found["parameter/role"].get(name, TRAINED) == TRAINED and not math.isfinite(used)


def norm_of(norms: Mapping[str, float]) -> float:
    return math.hypot(*(value for name, value in norms.items() if name and math.isfinite(value)), 0.0)


def looks_unchosen(name: str, order: Sequence[str], zero: Mapping[str, float], given: Mapping[str, float]) -> bool:
    """Whether it belongs to an expert that no token is sent to: others of its kind, beside it, get gradients, and so does a module before it.

    Experts are parallel: they are all given the same, or those that are not chosen nothing. Blocks that follow one another are not.
    """
    part = name
    while "." in part and all(each in zero for each in order if each.startswith(f"{owner(part)}.")):
        part = owner(part)
    kind = re.compile(re.sub(r"\d+", r"\\d+", re.escape(part.rpartition(".")[2])))
    base = part[: part.rfind(".") + 1]
    beside = {each[len(base) :].partition(".")[0] for each in order if each not in zero and each.startswith(base)}
    others = [base + each for each in beside if kind.fullmatch(each)]
    if not others or not any(each not in zero for each in order[: order.index(name)]):
        return False
    size = given.get(part, 0.0)
    return not size > 0 or all(given.get(other, size) == size for other in others)
