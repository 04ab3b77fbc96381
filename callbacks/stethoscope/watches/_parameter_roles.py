"""Which parameters an optimizer should move, and whether it does so, in train mode: part of `ParameterHealth`."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, TypeAlias

from stethoscope._record import Finding
from stethoscope.watches._streaks import listing, owner

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from stethoscope.watches._streaks import Judging

FROZEN, UNHELD, RESTING, IDLE, TRAINED = range(5)
"""What `parameter/role` says, see `probes.Optimizers`."""

FAINT = 1e-5
"""Gradient over the weights of its module of which a rate of 0.01 leaves 1e-7, what float32 rounds away; LBFGS stops there by itself."""

ASIDE = 0.25
"""Share of the parameters that learn: an auxiliary head whose loss is off is less."""

RESTING_SHARE = 0.5
"""Share of a weight's values that rest: most of it."""

LOOKS = 5
"""Observed steps in a row."""

Values: TypeAlias = "dict[str, float]"
"""One number per parameter or module."""


def unchanged(
    judging: Judging,
    found: Mapping[str, Values],
    ran: Sequence[str],
    untrained: Sequence[str],
    matrices: Container[str],
    *,
    moving: bool,
    waiting: bool,
    late: bool,
) -> None:
    """Judge what the step should have moved and has not.

    `matrices` are weights that multiply features; `moving` says that a learning rate is above zero, `waiting` that an optimizer of the plan has not stepped yet,
    `late` that a model that grows would have grown.
    """
    roles, still = found["parameter/role"], found["parameter/unchanged"]
    gradients, norms = found["gradient/norm"], found["parameter/norm"]
    if not still:
        return
    sizes: dict[str, float] = {}
    for name, norm in norms.items():
        sizes[owner(name)] = math.hypot(sizes.get(owner(name), 0.0), norm)
    same = [name for name in roles if still.get(name) == 1.0]
    # a bias before a BatchNorm has no gradient but rounding, and a norm's weight near one rounds away in bfloat16, while what is beside them moves
    alive = {owner(name) for name, role in roles.items() if role == TRAINED and still.get(name) == 0.0}
    stuck = [
        name
        for name in same
        if moving
        and roles[name] == TRAINED
        and gradients.get(name, math.inf) > FAINT * sizes.get(owner(name), 0.0)
        and (owner(name) not in alive or name in matrices)
    ]
    unheld = [name for name in same if roles[name] == UNHELD]
    # copies in float32 that are stepped and written back by hand: what rests has been rounded away
    by_hand = bool(found["parameter/resting"]) and sum(role == UNHELD for role in roles.values()) > 2 * len(unheld)
    # what is left out at random, or is an expert, has had a gradient before and will have one again
    never = set(untrained)
    idle = [name for name in same if roles[name] == IDLE and name in never]
    news = judging.hold("parameter-unchanged", stuck, roles)
    if news:
        judging.tell(
            Finding(
                "parameter-unchanged",
                "warning",
                f"{len(news)} of {len(roles)} parameters are stepped with gradients that are not zero, but not one bit changes "
                f"({listing(news)}).",
                "Look at the learning rate of their parameter group; weights in bfloat16 or float16 need float32 "
                "copies to take small steps; see whether something writes them back.",
                module=owner(news[0]),
            ),
            news,
        )
    _unheld(judging, unheld, gradients, roles, waiting=waiting or by_hand)
    _unused(judging, idle, roles, ran, late=late)


def _unheld(judging: Judging, names: Sequence[str], gradients: Values, roles: Values, *, waiting: bool) -> None:
    """Judge what no optimizer holds: a gradient that is worked out and thrown away tells what was forgotten from what rests."""
    wasted = [name for name in names if gradients.get(name, 0.0) > 0 and not waiting]
    quiet = [name for name in names if not gradients.get(name, 0.0) > 0 or waiting]
    for code, hits in (("parameter-unchanged-unheld", wasted), ("parameter-unchanged-resting", quiet)):
        news = judging.hold(code, hits, roles)
        if news:
            judging.tell(
                Finding(
                    "parameter-unchanged",
                    "warning" if hits is wasted else "info",
                    f"{len(news)} of {len(roles)} parameters require gradients{', get them' if hits is wasted else ''} and never change "
                    f"({listing(news)}): no optimizer {'that has stepped ' if waiting else ''}holds them.",
                    "Build the optimizer from this model's parameters(), after the last module was added, replaced or thawed "
                    "(add_param_group takes what came later); if it is meant, requires_grad_(False) says so and saves their gradients.",
                    module=owner(news[0]),
                ),
                news,
            )


def rounded_away(judging: Judging, found: Mapping[str, Values], matrices: Container[str], *, rising: bool) -> None:
    """Judge weights of half precision of which most values have not moved since the first look, though their gradients are not zero.

    A rate that is rising may yet reach what the rounding keeps.
    """
    roles, gradients = found["parameter/role"], found["gradient/norm"]
    share = {
        name: value
        for name, value in found["parameter/resting"].items()
        if name in matrices and roles.get(name) == TRAINED and gradients.get(name, 0.0) > 0
    }
    hits = [name for name, value in share.items() if value >= RESTING_SHARE]
    few = rising or 2 * len(hits) < len(share)
    news = judging.hold("parameter-unchanged-rounded", [] if few else hits, share, times=LOOKS)
    if news:
        middle = sorted(share[name] for name in news)[len(news) // 2]
        judging.tell(
            Finding(
                "parameter-unchanged",
                "warning",
                f"{middle:.0%} of the values of {listing(news)} have not moved by one bit since the first look, although their gradients are not "
                "zero: steps are smaller than half of the last digit of these half-precision weights, and are rounded away.",
                "Keep weights in float32 and use autocast for the arithmetic, or let the optimizer keep float32 copies (or round "
                "stochastically); a higher rate moves more of them, not all.",
                module=owner(news[0]),
            ),
            news,
            share,
        )


def duplicates(judging: Judging, twice: Values, roles: Values) -> None:
    """Judge parameters that are stepped several times with one and the same gradient."""
    news = judging.hold("optimizer-duplicate-parameters", twice, roles)
    if news:
        judging.tell(
            Finding(
                "optimizer-duplicate-parameters",
                "warning",
                f"{len(news)} parameters ({listing(news)}) are stepped {twice[news[0]]:.0f} times in each step with one and the same gradient, by several optimizers or by one "
                "that lists them several times: they move as many times as far as the learning rate says.",
                "Split the parameters by name into disjoint lists, one per optimizer, and assert that together they are all.",
                module=owner(news[0]),
            ),
            news,
            twice,
        )


def _unused(judging: Judging, idle: Sequence[str], roles: Values, ran: Sequence[str], *, late: bool) -> None:
    whole = len(idle) > 1 and len(idle) == sum(role in (IDLE, TRAINED) for role in roles.values())
    if judging.model("gradient-zero-whole", whole):
        judging.tell(
            Finding(
                "gradient-zero",
                "error",
                f"The optimizer steps, but not one of its {len(idle)} parameters gets a gradient: the loss is cut off from the model.",
                "Look at how the loss is made: torch.tensor(loss), .item(), .detach(), .data, NumPy, argmax or no_grad() between model and loss.",
            )
        )
    if whole:
        return
    alive = {_kind(name) for name, role in roles.items() if role == TRAINED}
    trained = {owner(name) for name, role in roles.items() if role == TRAINED}
    running = [name for name in idle if owner(name) in ran]
    dropped = set(_dropped([name for name in running if _kind(name) in alive], trained, ran))
    dropped |= set(_detached([name for name in running if _kind(name) not in alive], trained, roles, ran))
    absent = [name for name in idle if owner(name) not in ran]
    # a model that grows begins with its first block
    missing = {*_missing(absent, roles), *(_behind_the_first(absent, trained, ran) if late else ())}
    # of heads beside each other, some may wait for their task; encoders come with a pooler, whatever their task
    waiting = {
        name
        for name in idle
        if _kind(name) in alive or (owner(name) in ran and (not late or "pooler" in name.split(".")))
    }
    quiet = waiting - dropped - missing
    for code, hits in (("module-unused", [n for n in idle if n not in quiet]), ("module-unused-quiet", quiet)):
        news = judging.hold(code, [name for name in idle if name in hits], roles)
        if not news:
            continue
        modules = list(dict.fromkeys(owner(name) for name in news))
        why = "they run, but what they return is not used" if owner(news[0]) in ran else "they never run"
        judging.tell(
            Finding(
                "module-unused",
                "warning" if code == "module-unused" else "info",
                f"{len(news)} parameters of {listing(modules)} are in the optimizer, but never get a gradient and never change: {why}.",
                "Use what the module returns, or remove it; DistributedDataParallel would stop here (find_unused_parameters)."
                if owner(news[0]) in ran
                else "Call the module in forward(), or remove it; DistributedDataParallel would stop here (find_unused_parameters).",
                module=modules[0],
            ),
            news,
        )


def _dropped(names: Sequence[str], trained: set[str], ran: Sequence[str]) -> list[str]:
    """Those that lie in the middle of a stack, others of their kind being trained: what follows cannot have got their results.

    Heads beside each other, of which only some are used, have nothing of another stack after them. The last layer of a stack may have a
    part of which nothing is left to use (the residual convolution of a TCN), while the rest of it is trained.
    """
    alive = {_element(each) for each in trained}
    found = []
    for name in names:
        module = owner(name)
        later = [each for each in ran[ran.index(module) + 1 :] if each in trained]
        used_after = any(_kind(_element(each)) != _kind(_element(module)) for each in later)
        middle = any(_kind(each) == _kind(module) for each in later)
        if used_after and (middle or _element(module) not in alive):
            found.append(name)
    return found


def _detached(names: Sequence[str], trained: set[str], roles: Values, ran: Sequence[str]) -> list[str]:
    """Those that run before something that is trained, and are too much of the model to be a head beside the others: cut off by `detach`."""
    last = max((i for i, module in enumerate(ran) if module in trained), default=-1)
    before = set(ran[:last])
    found = [name for name in names if owner(name) in before]
    learning = sum(role in (IDLE, TRAINED) for role in roles.values())
    return found if len(found) >= ASIDE * learning else []


def _missing(names: Sequence[str], roles: Values) -> list[str]:
    """Those that are left out in each of several layers: `norm2` of all blocks, where `norm1` is trained. An expert is used somewhere."""
    trained = {_place(name) for name, role in roles.items() if role == TRAINED}
    places = [_place(name) for name in names]
    return [name for name, place in zip(names, places, strict=True) if places.count(place) > 1 and place not in trained]


def _behind_the_first(names: Sequence[str], trained: set[str], ran: Sequence[str]) -> list[str]:
    """All but the first of a list, where something that is trained follows: a `return` inside of the loop, or a router that knows one expert.

    A list of heads, of which the first is in use, has nothing behind it.
    """
    if not names:  # nearly always
        return []
    elements = [_element(each) for each in ran]
    used: dict[str, set[str]] = {}
    for each in trained:
        used.setdefault(_kind(_element(each)), set()).add(_element(each))
    behind = set()
    for kind in {_kind(_element(owner(name))) for name in names}:
        first, *others = used.get(kind, {""})
        if others or not first.endswith(".0"):
            continue
        last = max((i for i, element in enumerate(elements) if element == first), default=len(ran))
        if any(each in trained and _kind(_element(each)) != kind for each in ran[last + 1 :]):
            behind.add(kind)
    return [
        name for name in names if _kind(_element(owner(name))) in behind and re.search(r"\.\d+$", _element(owner(name)))
    ]


def _place(name: str) -> str:
    """The name without the numbers of layers; other than `_kind`, it tells `norm1` from `norm2`."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)


def _element(module: str) -> str:
    """The layer of a stack, or head of a list, that a module belongs to: its name up to the first part with a number."""
    found = re.match(r"(?:.*?\.)??[^.]*\d[^.]*", module)
    return found.group() if found else module


def unstepped(judging: Judging, found: Mapping[str, Values]) -> None:
    """Judge a step in which no optimizer has stepped: gradients arrive, and nothing changes."""
    still, gradients = found["parameter/unchanged"], found["gradient/norm"]
    # a scaler leaves out steps with gradients that are not finite
    arrive = bool(gradients) and all(math.isfinite(norm) for norm in gradients.values()) and any(gradients.values())
    never = set(found["parameter/role"].values()) <= {FROZEN, UNHELD}
    if judging.model("parameter-unchanged-unstepped", arrive and never and bool(still) and all(still.values())):
        judging.tell(
            Finding(
                "parameter-unchanged",
                "error",
                f"Gradients arrive (norm {gradients.get('', math.nan):.3g}), but no optimizer has ever stepped, and none of {len(still)} parameters changes.",
                "Call optimizer.step() after backward(), and monitor.step() once per optimizer step.",
            ),
            values={"norm": gradients.get("", 0.0)},
        )


def changed(judging: Judging, found: Mapping[str, Values]) -> None:
    """Judge what is frozen and moves."""
    roles, still, held = (
        found["parameter/role"],
        found["parameter/unchanged"],
        found["parameter/held"],
    )
    frozen = [name for name, role in roles.items() if role == FROZEN and still.get(name) == 0.0]
    # a moving average has the names of what it follows, but for where it lives
    followed = {tail for name, role in roles.items() if role != FROZEN for tail in (name, _tail(name))}
    quiet = [name for name in frozen if not held.get(name) and "." in _tail(name) and _tail(name) in followed]
    for code, hits in (
        ("parameter-changed", [name for name in frozen if name not in set(quiet)]),
        ("parameter-changed-quiet", quiet),
    ):
        news = judging.hold(code, hits, roles)
        if not news:
            continue
        by = "an optimizer that still holds them" if held.get(news[0]) else "something other than an optimizer"
        judging.tell(
            Finding(
                "parameter-changed",
                "warning" if code == "parameter-changed" else "info",
                f"{len(news)} frozen parameters (requires_grad off) change with the steps ({listing(news)}): {by} writes them.",
                "Set their gradient to None when freezing, or take them out of the optimizer: momentum and weight decay go "
                "on. A moving average that is meant is fine.",
                module=owner(news[0]),
            ),
            news,
        )


def in_eval(judging: Judging, count: int) -> None:
    """Judge that `count` modules, all that there are, act as in validation while the optimizer steps."""
    if judging.model("model-in-eval", count > 0):
        judging.tell(
            Finding(
                "model-in-eval",
                "warning",
                f"The model is in eval mode while the optimizer steps: {count} BatchNorm and dropout modules act as in validation, and "
                "activations are not observed.",
                "Call model.train() before the first batch (from_pretrained() returns a model in eval mode) and after each validation; "
                "if it is meant, put these modules in eval mode by themselves and leave the model in train mode.",
            ),
            values={"count": count},
        )


def _tail(name: str) -> str:
    return name.partition(".")[2]
