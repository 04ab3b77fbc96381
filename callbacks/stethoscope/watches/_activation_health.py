"""`ActivationHealth`: units that are dead, saturated or constant, and signals that explode or vanish on their way."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope.probes import Activations, Parameters, Units
from stethoscope.watches import _levelling as levelling
from stethoscope.watches._compounding import compounding
from stethoscope.watches._streaks import Judging, listing, owner, train_values

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record, Severity

LEVELS = 3  # observed steps whose median is a module's own level
GROSS = 10.0  # times `large`: then one look is enough
PARTLY, NARROW = 0.5, 0.75  # shares of dead units that are an info; of a layer of up to 16 units
SOON = 3  # observed steps that count as the start of a run


@dataclass(frozen=True)
class ActivationHealth:
    """Reports dead, saturated and constant units, signals that explode or vanish, and numbers near the end of their dtype.

    **What it decides**, on observed steps, of innermost modules, in call order:

    - `dead-units`: `dead_share` of a layer's units are exactly zero for all items of a batch; half of them (of up to 16 units three quarters)
      are an info. Sparse activations on purpose are zero for some items, not for all.
    - `activation-saturated`: `saturated_share` of a tanh's units lie in its flat ends; of a sigmoid's or softmax', from the start of the run
      on, since later they may be sure of something. The last module that runs is not looked at, as sure answers are flat, but for a sigmoid that
      is open everywhere.
    - `feature-constant`: from some module to the end of the model, all items of a batch get the same (their difference is below `same` of the
      largest value); or a layer makes the same of items that
      differ; or `constant_share` of the units of a tanh, GELU or the like do not vary at all.
    - `activation-exploding`: a module's rms is `growth` times its own level of the first observations and above `large`, or above `huge`; both
      relative to the model's input where that is larger than 1. Or a module with parameters returns more than `large` times what it is
      given, and times the model's input or 1; more than ten times as much is told at the first look. The last module is not looked at: targets may be large.
      Or the blocks of a stack multiply the signal, one after the other.
    - `activation-vanishing`: what the last module is given has an rms below `faint` of the model's input, or of 1 where that is larger.
    - `dropout-high`: a dropout module drops `dropped` or more of what it is given.
    - `norm-input-variance`: half of the groups that a normalisation gets vary less than its eps.
    - `attention-head-dead`: a head that contributes less than a thousandth of the strongest one.
    - `dtype-headroom`, of float16: fewer than `headroom_bits` octaves to overflow, or all values below the smallest normal number.

    States must hold for `observations` observed steps that span `steps` steps. Many modules make one finding.
    **Cost:** host only, one pass over the records of observed steps. **Needs:** rms of activations, `probes.Units`, and norms of parameters.

    Args:
        observations: observed steps in a row before anything is said.
        steps: steps that they must span at least.
        dead_share: of a layer's units, in (0, 1]. Classifiers with up to 0.84 in their last hidden layer solve their task.
        saturated_share: of a layer's units, in (0, 1].
        constant_share: of a layer's units, in (0, 1].
        same: difference between items over the largest value; 1e-5 is a hundred roundings of float32.
        growth: a factor.
        large: rms, in units of the input's rms or of 1.
        huge: the same; squares of it leave float16, and ten layers of gain 3 stay below.
        faint: the same.
        dropped: share of the units, in (0, 1]. A tenth to a half is usual; at 0.9 what is kept is multiplied by ten.
        headroom_bits: octaves. Two are a factor of four.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> replay(ActivationHealth(), [Record("unit/dead_fraction", 1.0, 100, "encoder.1")])[0].code
        'dead-units'

    References: Lu et al. 2019 (dying ReLU); Glorot and Bengio 2010 (saturation); Ioffe and Szegedy 2015 (eps).
    """

    _: KW_ONLY
    observations: int = 3
    steps: int = 10
    dead_share: float = 0.9
    saturated_share: float = 0.5
    constant_share: float = 0.2
    same: float = 1e-5
    growth: float = 100.0
    large: float = 1e3
    huge: float = 1e5
    faint: float = 1e-4
    dropped: float = 0.9
    headroom_bits: float = 2.0

    @property
    def needs(self) -> tuple[Probe, ...]:
        """The scale of activations, what becomes of units, and which modules have parameters."""
        return Activations(statistics=("rms",)), Units(), Parameters(statistics=("norm",))

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "levels": {}, "looks": 0, "flat": [], "flat inputs": []}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        found = train_values(
            records, "activation/rms", "activation/input_rms", "parameter/norm", *(f"unit/{name}" for name in UNITS)
        )
        unit = {name: found[f"unit/{name}"] for name in UNITS}
        if not found["activation/rms"] and not any(unit.values()):
            return state, ()
        judging = Judging(state["held"], records[0].step, self.observations, self.steps)
        look = _Look(self, {**state, "looks": state["looks"] + 1}, judging)
        look.dead(unit["dead_fraction"], unit["width"], "of")
        look.dead(unit["input_dead_fraction"], unit["input_width"], "that are given to")
        levelling.opened(judging, unit["open_fraction"])
        levelling.levelled(judging, unit["levelled"], unit["batch_spread"])
        look.saturated(unit["saturated_fraction"], unit["certain_fraction"])
        look.saturated(unit["input_saturated_fraction"], unit["input_certain_fraction"], before=True)
        look.constant(unit["batch_spread"], unit["constant_fraction"])
        owners = {owner(name) for name in found["parameter/norm"]}
        compounding(judging, found["activation/rms"], self.large)
        look.scale(_leaves(found["activation/rms"]), _leaves(found["activation/input_rms"]), owners)
        look.starved(unit["starved_fraction"])
        look.dropout(unit["dropped_fraction"])
        look.heads(unit["dead_heads"])
        look.headroom(unit["headroom_bits"], unit["floor_bits"])
        return {**look.state, "held": judging.held}, judging.findings


UNITS = (
    "dead_fraction",
    "input_dead_fraction",
    "saturated_fraction",
    "certain_fraction",
    "input_saturated_fraction",
    "input_certain_fraction",
    "batch_spread",
    "constant_fraction",
    "starved_fraction",
    "dropped_fraction",
    "dead_heads",
    "headroom_bits",
    "floor_bits",
    "width",
    "input_width",
    "open_fraction",
    "levelled",
)


class _Look:
    """One observed step of one run."""

    def __init__(self, watch: ActivationHealth, state: dict[str, Any], judging: Judging) -> None:
        self.watch, self.state, self.judging = watch, state, judging

    def _share(self, code: str, shares: Mapping[str, float], least: float) -> list[str]:
        return self.judging.hold(code, [name for name, share in shares.items() if share >= least], shares)

    def dead(self, shares: Mapping[str, float], widths: Mapping[str, float], where: str) -> None:
        for severity in ("warning", "info"):
            hits = [name for name, share in shares.items() if self._death(share, narrow=name in widths) == severity]
            # the probe has seen them dead three times in a row
            news = self.judging.hold(f"dead-units {where} {severity}", hits, shares, times=1)
            if news:
                first = news[0]
                self.judging.tell(
                    Finding(
                        "dead-units",
                        severity,
                        f"{shares[first]:.0%} of the units {where} {listing(news)} are exactly zero for every item of the batch: they "
                        f"learn nothing {'any more' if severity == 'warning' else 'now'}.",
                        "Lower the learning rate or warm up; look at the biases in front (or a BatchNorm's shift); LeakyReLU or GELU "
                        "keep a slope.",
                        module=first,
                    ),
                    news,
                    shares,
                )

    def _death(self, share: float, *, narrow: bool) -> Severity | None:
        if share >= self.watch.dead_share:
            return "warning"
        # of the eight units of a gate half may be dead by chance
        return "info" if share >= (NARROW if narrow else PARTLY) else None

    def saturated(self, flat: Mapping[str, float], certain: Mapping[str, float], *, before: bool = False) -> None:
        memory = "flat inputs" if before else "flat"
        if self.state["looks"] <= SOON:
            # what is flat before it has learnt anything is not certain, but stuck
            self.state[memory] = [name for name, share in certain.items() if share >= self.watch.saturated_share]
        stuck = self.state.get(memory, [])
        shares = {**flat, **{name: share for name, share in certain.items() if name in stuck}}
        what = "what is given to " if before else ""
        news = self._share(f"activation-saturated {what}".strip(), shares, self.watch.saturated_share)
        if news:
            first = news[0]
            self.judging.tell(
                Finding(
                    "activation-saturated",
                    "warning",
                    f"{shares[first]:.0%} of {what}{listing(news)} is saturated: in its flat ends hardly any gradient comes through.",
                    "Look at the scale of weights and inputs in front of it (a gain near 1; scores over sqrt(size)), normalise, lower "
                    "the learning rate.",
                    module=first,
                ),
                news,
                shares,
            )

    def constant(self, spreads: Mapping[str, float], shares: Mapping[str, float]) -> None:
        run: list[str] = []
        for name, spread in reversed(list(spreads.items())):
            if not spread <= self.watch.same:
                break
            run.insert(0, name)
        if self.judging.model("feature-constant", bool(run)):
            self.judging.tell(
                Finding(
                    "feature-constant",
                    "warning",
                    f"From {run[0]!r} to the end of the model, every item of the batch gets the same (difference "
                    f"{max(spreads[name] for name in run):.1g} of the largest value).",
                    "Look at what is in front of it: dead units, an input that is constant, weights that have decayed to zero, a "
                    "normalisation over the wrong axis; in a generator, mode collapse.",
                    module=run[0],
                ),
                run,
                spreads,
            )
        shares = {name: share for name, share in shares.items() if name not in run}
        news = self._share("feature-constant units", shares, self.watch.constant_share)
        if news:
            first = news[0]
            self.judging.tell(
                Finding(
                    "feature-constant",
                    "warning",
                    f"{shares[first]:.0%} of the units of {listing(news)} never vary, neither over items nor over positions.",
                    "Look for a mask that is left over, weights of zero, and inputs so large that the unit is stuck at one end.",
                    module=first,
                ),
                news,
                shares,
            )

    def scale(self, outputs: Mapping[str, float], inputs: Mapping[str, float], owners: Container[str]) -> None:
        if not inputs or not outputs:
            return
        given = next(iter(inputs.values()))
        unit = max(1.0, given) if math.isfinite(given) else 1.0
        inner = dict(list(outputs.items())[:-1])
        levels: dict[str, list[float]] = self.state["levels"]
        if self.state["looks"] <= LEVELS:
            levels = {name: [*levels.get(name, []), value] for name, value in inner.items() if math.isfinite(value)}
            self.state["levels"] = levels
        watch = self.watch
        high = {
            name: value / unit
            for name, value in inner.items()
            # what is not finite is NonFinite's, and says nothing of a scale
            if math.isfinite(value)
            and (
                value > watch.huge * unit
                or (name in levels and value > max(watch.large * unit, watch.growth * median(levels[name])))
                # what has no parameters is as large as it is meant to be: a mask of -1e9, an exponential
                or (name in owners and name in inputs and value > watch.large * max(unit, inputs[name]))
            )
        }
        # by that much nothing is meant, and what heals in a few steps has thrown the weights about
        bar = GROSS * watch.large
        gross = any(name in owners and inner[name] > bar * max(unit, inputs.get(name, unit)) for name in high)
        news = self.judging.hold("activation-exploding", high, inner, times=1 if gross else 2)
        if news:
            self.judging.tell(
                Finding(
                    "activation-exploding",
                    "warning",
                    f"Activations explode: {listing(news)} has an rms of {inner[news[0]]:.3g}, the model's input one of {given:.3g}.",
                    "Lower the learning rate or the gain of the initialisation, add normalisation; if targets are that large, normalise "
                    "them.",
                    module=news[0],
                ),
                news,
                high,
            )
        last = list(inputs)[-1]
        bar = watch.faint * min(1.0, given)
        low = 0 < inputs[last] < bar and len(inner) > 1
        if self.judging.model("activation-vanishing", low):
            faint = next((name for name, value in inner.items() if value < bar), last)
            self.judging.tell(
                Finding(
                    "activation-vanishing",
                    "warning",
                    f"The signal vanishes: the model's input has an rms of {given:.3g}, {faint!r} returns {outputs[faint]:.2g}, and {last!r} is given "
                    f"{inputs[last]:.2g}.",
                    "Initialise with a gain near 1 (kaiming_normal_, xavier_normal_), add normalisation or residual connections; look at "
                    "weight decay.",
                    module=faint,
                ),
                values={"input": given, "given": inputs[last]},
            )

    def starved(self, shares: Mapping[str, float]) -> None:
        news = self._share("norm-input-variance", shares, 0.5)
        if news:
            self.judging.tell(
                Finding(
                    "norm-input-variance",
                    "warning",
                    f"{shares[news[0]]:.0%} of what {listing(news)} normalises varies less than its eps: it passes on the noise of "
                    "rounding, or next to nothing.",
                    "Look at the layer in front (weights near zero? all units alike?) and at the axes that are normalised; a smaller eps "
                    "only helps where the signal is meant to be that small.",
                    module=news[0],
                ),
                news,
                shares,
            )

    def dropout(self, shares: Mapping[str, float]) -> None:
        hits = [name for name, share in shares.items() if share >= self.watch.dropped]
        # it is a setting, and no measurement that may be chance
        news = self.judging.hold("dropout-high", hits, shares, times=1)
        if news:
            kept = 1 - shares[news[0]]
            self.judging.tell(
                Finding(
                    "dropout-high",
                    "warning",
                    f"{shares[news[0]]:.0%} of what is given to {listing(news)} is dropped in each step"
                    f"{f', and what is left multiplied by {1 / kept:.3g}' if kept > 0 else ''}.",
                    "torch.nn.Dropout(p) takes the share that is dropped: write 1 - p where p was the share to keep (keep_prob).",
                    module=news[0],
                ),
                news,
                shares,
            )

    def heads(self, shares: Mapping[str, float]) -> None:
        news = self._share("attention-head-dead", shares, 1e-9)
        if news:
            self.judging.tell(
                Finding(
                    "attention-head-dead",
                    "warning",
                    f"{shares[news[0]]:.0%} of the attention heads of {listing(news)} contribute nothing (less than a thousandth of the "
                    "strongest one).",
                    "Look for a head mask, weights of zero or a wrong reshape in the attention; prune it if it is meant.",
                    module=news[0],
                ),
                news,
                shares,
            )

    def headroom(self, above: Mapping[str, float], below: Mapping[str, float]) -> None:
        near = [name for name, bits in above.items() if bits < self.watch.headroom_bits]
        news = self.judging.hold("dtype-headroom", near, above, times=2)
        if news:
            self.judging.tell(
                Finding(
                    "dtype-headroom",
                    "warning",
                    f"{listing(news)} is {above[news[0]]:.1f} octaves below the overflow of float16 (65504).",
                    "Use bfloat16, or run this module in float32 (torch.autocast(enabled=False)); lower the scale of what it is given.",
                    module=news[0],
                ),
                news,
                above,
            )
        lost = [name for name, bits in below.items() if math.isfinite(bits) and bits < 0]
        news = self.judging.hold("dtype-headroom floor", lost, below)
        if news:
            self.judging.tell(
                Finding(
                    "dtype-headroom",
                    "warning",
                    f"All values of {listing(news)} lie below the smallest normal number of float16 (6e-5): digits are lost.",
                    "Use bfloat16, or raise the scale of what this module is given.",
                    module=news[0],
                ),
                news,
                below,
            )


def _leaves(values: Mapping[str, float]) -> dict[str, float]:
    """The innermost modules among those that were read, in call order."""
    above = {name[:i] for name in values for i, letter in enumerate(name) if letter == "."} | {""}
    return {name: value for name, value in values.items() if name not in above} or dict(values)
