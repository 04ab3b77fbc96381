"""How weights begin, and what the signal and the first answers make of it: part of `ParameterHealth`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from stethoscope._record import Finding
from stethoscope.watches._streaks import listing, owner

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stethoscope.watches._parameter_roles import Values
    from stethoscope.watches._streaks import Judging

WILD = 100.0  # gain of a single weight that no scheme of initialisation has: a deviation of 1 at 10,000 inputs
OUTLYING = (
    40.0  # the same, and its factor over the median; a table of deviation 1 that is tied to an output has 32 at 1024
)
DEEP = 2.0  # gain that compounds: ten ReLU layers of it multiply by 30, of Kaiming's 1.41 by 1
FEWEST = 2  # weights that a verdict on an initialisation needs
FAINT = 1e-4  # rms, of the model's input: what is left of a signal is below the biases of the layers behind it
SURPRISE = 5.0  # nats above ln(classes): right answers have e^-5, or 0.7 %, of the probability that guessing gives them
GROWN = 0.1  # rms that an embedding has at least when it has learnt something; recommenders begin theirs at 0.01
LAYER = 1.0  # as probes.LossInputs says that a loss is given a layer's own output


def small_tables(found: Mapping[str, Values]) -> Values:
    """Return the norm that each embedding would have whose values are below `GROWN`, if they were as large."""
    sizes = found["parameter/table_size"]
    return {name: GROWN * sizes[name] ** 0.5 for name, rms in found["parameter/table_rms"].items() if rms < GROWN}


def gains(judging: Judging, found: Mapping[str, Values], *, high: float, low: float, compound: float) -> None:
    """Judge the gains that weights begin with: `high` and `low` for half of them, more for one; `compound` is a factor over the whole model."""
    gains, constant = found["parameter/gain"], found["parameter/constant"]
    # the units of the last layer part at the first step: each has a target of its own
    alike = [name for name, flag in constant.items() if flag and name != list(gains)[-1]]
    if alike:
        judging.tell(
            Finding(
                "poor-initialisation",
                "warning",
                f"All values of {listing(alike)} are equal: the units begin as copies of one another, and compute one feature.",
                "Initialise with random weights: kaiming_normal_, xavier_uniform_ (constant_ is for biases).",
                module=owner(alike[0]),
            ),
            alike,
        )
    if len(gains) < FEWEST:
        return
    usual, weights = sorted(gains.values())[len(gains) // 2], gains
    # what an embedding returns is as large as its entries: its gain
    gains = {**gains, **found["parameter/table_rms"]}
    wild = [name for name, gain in gains.items() if gain > WILD or gain > OUTLYING * max(1.0, usual)]
    bar = DEEP if _compounds(found, compound) else high
    for what, hit in (
        ("large", [name for name, gain in weights.items() if gain > bar]),
        ("small", [name for name, gain in weights.items() if 0 < gain < low]),
        ("zero", [name for name, gain in weights.items() if gain == 0]),
    ):
        if 2 * len(hit) <= len(weights) - (what != "zero"):
            hit = wild if what == "large" else _fading(weights, found, low) if what == "small" else []  # noqa: PLW2901  # what is told is what was found
        if not hit:
            continue
        middle = sorted(gains[name] for name in hit)[len(hit) // 2]
        judging.tell(
            Finding(
                "poor-initialisation",
                "warning",
                f"{len(hit)} of {len(gains)} weights begin too {what if what != 'zero' else 'small: exactly zero'} "
                f"({listing(hit)}): their gain is {middle:.2g} (median), where 0.5 to 2 keeps the signal's scale.",
                "Initialise with kaiming_normal_ or xavier_normal_ (a standard deviation of about 1 / sqrt(inputs)); keep "
                "zeros for the last layer of residual branches.",
                module=owner(hit[0]),
            ),
            hit,
            gains,
        )


def _compounds(found: Mapping[str, Values], factor: float) -> bool:
    """Whether the signal that the model begins with grows layer by layer beyond all use."""
    sizes = list(found["activation/rms"].values())
    return bool(sizes) and math.isfinite(max(sizes)) and max(sizes) > factor * max(1.0, sizes[0])


def _fading(gains: Values, found: Mapping[str, Values], low: float) -> list[str]:
    """Weights of gains below `low`, some of which follow one another so that next to nothing of the input is left behind them.

    Single ones end residual branches, flows and heads, which may begin near zero.
    """
    small = [name for name, gain in gains.items() if 0 < gain < low]
    sizes, given = found["activation/rms"], found["activation/input_rms"]
    ran = [each for each in sizes if any(owner(name) == each for name in gains)]
    faint = [
        name
        for name in small
        if owner(name) in ran[:-1]
        and 0 < sizes[owner(name)] < FAINT * min(1.0, next(iter(given.values()), 1.0))
        and given.get(owner(name), 1.0) < low
    ]
    return small if faint and len(small) >= FEWEST else []


def sure_of_nothing(judging: Judging, found: Mapping[str, Values]) -> None:
    """Judge a classifier that begins far from chance: scores so large that it is sure of answers it has not learnt.

    A fresh one has a cross entropy of about ln(classes). Judged where most weights are as an initialisation has drawn them, and the loss is
    given what a layer returns: cosines times a scale, with a margin, begin far above.
    """
    excess = max([0.0, *found["classes/surprise"].values(), *found["tokens/surprise"].values()])
    fresh = 2 * len(found["parameter/drawn"]) >= len(found["parameter/gain"])
    plain = LAYER in found["loss/cross_entropy_input"].values()
    if not (excess > SURPRISE and fresh and plain):
        return
    sizes = found["activation/rms"]
    head = next(
        (name for name in reversed(list(sizes)) if name and not any(each.startswith(f"{name}.") for each in sizes)), ""
    )
    judging.tell(
        Finding(
            "poor-initialisation",
            "warning",
            f"The cross entropy begins {excess:.3g} nats above chance, though nothing is learnt yet: the scores that {head!r} returns have an rms of "
            f"{sizes.get(head, math.nan):.3g}, and the model is sure of answers by their size alone.",
            "Draw the last layer's weights with a deviation of about 1 / sqrt(inputs) (0.02 for a table of tokens that is tied to it), and let its "
            "biases begin at zero, or at the logarithms of the classes' shares.",
            module=head,
        ),
        values={"excess": excess},
    )


def copies(judging: Judging, copies: Values) -> None:
    """Judge units that begin as copies of one another and stay so."""
    hit = [name for name, share in copies.items() if share >= 0.5]
    # copies in a last layer part at the first step; in hidden layers they get one gradient and stay
    news = judging.hold("units-symmetric", hit, copies, times=5)
    if news:
        judging.tell(
            Finding(
                "units-symmetric",
                "warning",
                f"{copies[news[0]]:.0%} of the units of {listing(news)} are copies of one another and stay so: they "
                "compute one feature many times.",
                "Initialise with random weights (constant_ and ones_ give all units the same gradient).",
                module=owner(news[0]),
            ),
            news,
            copies,
        )
