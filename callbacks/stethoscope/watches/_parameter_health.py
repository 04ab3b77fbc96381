"""`ParameterHealth`: weights that move too far, too little or not at all, that should not move, or that began badly."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope.probes import Activations, Gradients, Initialisation, Optimizers, Parameters
from stethoscope.watches import _beginning as beginning
from stethoscope.watches import _parameter_roles as roles
from stethoscope.watches import _weight_size as weight_size
from stethoscope.watches._never_trained import is_late, never_trained
from stethoscope.watches._parameter_roles import TRAINED, Values
from stethoscope.watches._rates_apart import rates_apart
from stethoscope.watches._streaks import Judging, listing, owner, told, train_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record

ROUNDING = 1e-5
SETTLED = 1e-3  # share of the largest learning rate so far
TURNED = (
    0.1  # update ratio of the first step of a model that was trained before: ten such steps replace what it has learnt
)
SLOW = 5  # observed steps in a row: as many as clipping takes, which is often the cause
RESTS = 100  # steps that one of several optimizers may wait for its first: a critic or generator that goes every few


@dataclass(frozen=True)
class ParameterHealth:
    """Reports weights that a step moves too far, too little, not at all or by mistake, and weights that began badly.

    **What it decides**, on observed steps; update ratios are those of modules, sqrt(sum(change^2)) / sqrt(sum(weight^2)) over
    a module's own parameters, since a bias near zero moves by its own size and means no harm:

    - `update-ratio-high`: above `highest` in half of the modules or in the model as a whole; once is enough above `sudden`, or above 0.1 in
      the first step of a model that was trained before, as the weights of its normalisations tell, and of which most is trained now; or the
      weights come back near those of the first look, twice.
    - `update-ratio-low`: the model as a whole, from its start on, below `lowest`, at a learning rate that is not rising, in five
      observed steps; or fresh groups whose rates are a thousand times apart, in the first third of the run.
    - `parameter-unchanged`: not one bit changes, although the optimizer stepped with a gradient that is not zero, or although gradients
      arrive, since no optimizer has ever stepped; or the parameter gets a gradient that is not zero, and no optimizer holds it: info where it
      requires one and gets none, or in the first 100 steps, while an optimizer that the monitor knows has not stepped yet.
      Or most values of most half-precision weights rest, as their steps are rounded away.
    - `optimizer-frozen-parameters`: a layer that an optimizer holds is frozen and still as it was drawn, after 30 % of the planned steps.
    - `optimizer-duplicate-parameters`: several optimizers step with one and the same gradient.
    - `parameter-changed`: a frozen parameter changes. A warning, but info where it looks like a moving average of a trained one.
    - `poor-initialisation`: at first sight, gains above `gain_high`, below `gain_low` or exactly zero in half of the weights,
      or above 100 in one (40, where that is 40 times the median); gains above 2 in half of the weights, where some module returns more than
      `compound` times what the first one does; the rms of an embedding above 40 times the median of gains, or 40; a layer's weight of two outputs or more, not the last one, of
      which all values are equal; small weights in a row that leave nothing of the input; a cross entropy that begins 5 nats above chance (where
      `probes.Classes` and `probes.LossInputs` are observed, as in `presets.full()`).
    - `units-symmetric`: half of a weight's units or more are copies of one another, and stay so.
    - `weight-norm-drift`: the norm of all weights is `drift` times what it was first, or that much less (half of it where weight decay takes
      more than 0.1 % per step); or weight decay by itself takes more than 1 % per step; or the norm has doubled, and steps point along the
      weights themselves (cosine above 0.4, mean over parameters) in five observed steps, while it grows as fast as it did so far: something
      rewards size.
    - `module-unused`: the optimizer steps, but no gradient ever comes and nothing changes; info where the module looks like an expert
      that is not chosen, or runs, unless others of its stack are trained and something of another kind after it is, too, or 30 % of the plan is
      over. A part that several layers have and none of them calls is a warning.
    - `model-in-eval`: the optimizer steps while the model, with all of its BatchNorm and dropout, is in eval mode.
    - `nonfinite-optimizer`: what the optimizer keeps for a parameter holds NaN or Inf.

    The norm of an embedding that begins near zero counts as if its values were 0.1: they are meant to grow to that.
    States must hold for `observations` observed steps that span `steps` steps. Many modules make one finding.
    **Cost:** host only, one pass over the records of observed steps. **Needs:** norms, changes and roles of parameters,
    gradients, and which modules run.

    Args:
        observations: observed steps in a row before anything is said.
        steps: steps that they must span at least.
        highest: update ratio, per step. About 1e-3 is usual; at 0.3 three steps replace the weights.
        sudden: update ratio, per step: what the weights were hardly matters any more.
        lowest: update ratio, per step. 1e-6 moves a weight by 10 % in 100,000 steps; below 6e-8 float32 rounds it away.
        gain_high: factor of rms per layer. Kaiming has 1.4; four layers of 5 make 600.
        gain_low: factor of rms per layer. Four layers of 0.02 make 1.6e-7.
        compound: a factor of rms, from one end of the model to the other.
        drift: a factor.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> def step(at):
        ...     yield Record("parameter/role", 4.0, at, "head.weight")
        ...     yield Record("parameter/unchanged", 1.0, at, "head.weight")
        ...     yield Record("gradient/norm", 0.3, at, "head.weight")
        >>> replay(ParameterHealth(), [record for at in (0, 50, 100) for record in step(at)])[0].code
        'parameter-unchanged'

    References: Bottou, Curtis and Nocedal 2018 (size of steps); He et al. 2015 and Glorot and Bengio 2010 (gains).
    """

    _: KW_ONLY
    observations: int = 3
    steps: int = 10
    highest: float = 0.3
    sudden: float = 0.7
    lowest: float = 1e-6
    gain_high: float = 5.0
    gain_low: float = 0.02
    compound: float = 1e3
    drift: float = 10.0

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Norms, changes and roles of parameters; gradients; gains; which modules run."""
        return (
            Parameters(statistics=("norm", "update_ratio", "unchanged")),
            Gradients(statistics=("norm",)),
            Optimizers(),
            Initialisation(every=1),
            Activations(statistics=("rms",)),
        )

    def init(self) -> State:
        """Nothing seen."""
        return {
            "held": {},
            "sizes": None,
            "moved": False,
            "rates": {},
            "ran": [],
            "gains": False,
            "matrices": [],
            "untrained": None,
            "planned": 0.0,
            "length": 0.0,
            "fresh": None,
            "new": False,
            "inner": False,
            "small": {},
        }

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        rates = {
            r.name: r.value
            for r in records
            if r.source == "step" and (r.name == "lr" or r.name.startswith("lr/")) and isinstance(r.value, float)
        }
        found = train_values(
            records,
            "parameter/norm",
            "parameter/update_ratio",
            "parameter/unchanged",
            "parameter/resting",
            "parameter/drawn",
            "parameter/listed",
            "parameter/role",
            "parameter/held",
            "parameter/outward",
            "parameter/gain",
            "parameter/table_rms",
            "parameter/table_size",
            "parameter/copies",
            "parameter/constant",
            "parameter/optimizers",
            "gradient/norm",
            "optimizer/steps",
            "optimizer/known",
            "optimizer/decay",
            "optimizer/nonfinite",
            "optimizer/in_eval",
            "activation/rms",
            "activation/input_rms",
            "classes/surprise",
            "tokens/surprise",
            "loss/cross_entropy_input",
        )
        planned = max(state["planned"], told(records, "plan/optimizers", 0.0))
        length = max(state["length"], told(records, "plan/steps", 0.0))
        inner = state["inner"] or any(record.name == "plan/inner_steps" for record in records)
        known = {"planned": planned, "length": length, "inner": inner}
        if not any(found[name] for name in found if name.startswith("parameter/")):
            return (state if known.items() <= state.items() else {**state, **known}), ()
        ran = [*state["ran"], *(name for name in found["activation/rms"] if name not in set(state["ran"]))]
        judging = Judging(state["held"], records[0].step, self.observations, self.steps)
        worn = any(record.name == "plan/pretrained" and record.value == 1.0 for record in records)
        look = _Look(self, {**state, **known, "ran": ran}, judging, found, worn=worn)
        if found["parameter/gain"]:
            look.state["matrices"] = list(found["parameter/gain"])
            if not state["gains"]:
                beginning.gains(judging, found, high=self.gain_high, low=self.gain_low, compound=self.compound)
                beginning.sure_of_nothing(judging, found)
                look.state["new"] = 2 * len(found["parameter/drawn"]) >= len(found["parameter/gain"])
            look.state["gains"] = True
        if found["parameter/table_rms"]:
            look.state["small"] = beginning.small_tables(found)
        if found["parameter/copies"]:
            beginning.copies(judging, found["parameter/copies"])
        if found["optimizer/steps"].get("", 1.0) > 0:
            look.optimizer(found["optimizer/nonfinite"])
            roles.in_eval(judging, int(found["optimizer/in_eval"].get("", 0.0)))
            top = max([state["rates"].get("top", 0.0), *rates.values()])
            # a schedule that is through, or has been cut off, is another story
            moving = not rates or max(rates.values()) > SETTLED * top
            rising = bool(rates) and not max(rates.values()) <= (state["rates"].get("last") or math.inf)
            waiting = found["optimizer/known"].get("", math.inf) < planned and judging.step < RESTS
            late = is_late(judging.step, length)
            # one step of LBFGS is up to twenty, and none where it has converged
            moving &= not inner
            share = 0.0 if inner else look.ratios(rates)
            # single weights that rest where all hardly move are the same thing, told by its cause
            moving &= share == 0 or share >= self.lowest
            roles.unchanged(
                judging,
                found,
                ran,
                look.untrained(),
                look.state.get("matrices", []),
                moving=moving,
                waiting=waiting,
                late=late,
            )
            roles.rounded_away(judging, found, look.state.get("matrices", []), rising=rising)
            rates_apart(judging, rates, fresh=look.state.get("new", False) and not late)
            roles.duplicates(judging, found["parameter/optimizers"], found["parameter/role"])
        else:
            roles.unstepped(judging, found)
        roles.changed(judging, found)
        look.state["fresh"] = never_trained(judging, found, state.get("fresh"), length)
        look.state["sizes"] = weight_size.drift(judging, found, state.get("sizes"), self.drift)
        return {**look.state, "held": judging.held}, judging.findings


class _Look:
    """One observed step of one run."""

    def __init__(
        self,
        watch: ParameterHealth,
        state: dict[str, Any],
        judging: Judging,
        found: Mapping[str, Values],
        *,
        worn: bool,
    ) -> None:
        self.watch, self.state, self.judging, self.found = watch, state, judging, found
        self.worn = worn  # trained before this run, whose first step this is

    def untrained(self) -> list[str]:
        """Parameters that have not had a gradient in any observed step so far, and have not moved in between either.

        Tasks that take turns may do so in step with the looks, which then see one of them alone.
        """
        before, now, norms = self.state.get("untrained"), self.found["parameter/role"], self.found["parameter/norm"]
        names = {name: norms.get(name) for name in now} if before is None else before
        rest = {
            name: norm for name, norm in names.items() if now.get(name) != TRAINED and norms.get(name, norm) == norm
        }
        self.state["untrained"] = rest
        return list(rest)

    def optimizer(self, flags: Values) -> None:
        if self.judging.model("nonfinite-optimizer", bool(flags), times=1):
            news = list(flags)
            self.judging.tell(
                Finding(
                    "nonfinite-optimizer",
                    "error",
                    f"What the optimizer keeps for {listing(news)} holds NaN or Inf: these weights are lost or do not move any more.",
                    "Look at the gradients of the steps before (Monitor(guard='raise') stops before the write), keep state in "
                    "float32, and go back to a checkpoint: the state does not heal.",
                    module=owner(news[0]),
                ),
                news,
            )

    def ratios(self, rates: Mapping[str, float]) -> float:
        """Judge how far this step has gone; return it for the model as a whole, 0 where nothing can be told."""
        role = self.found["parameter/role"]
        ratios, norms = dict(self.found["parameter/update_ratio"]), dict(self.found["parameter/norm"])
        for name, size in self.state["small"].items():
            if name in ratios and 0 < norms.get(name, 0.0) < size:
                ratios[name], norms[name] = ratios[name] * norms[name] / size, size
        # the ratio of a weight that was zero is 1 and says nothing
        trained = [
            name
            for name in ratios
            if name in norms and role.get(name, float(TRAINED)) == TRAINED and abs(ratios[name] - 1) > ROUNDING
        ]
        if not trained or not all(math.isfinite(ratios[name] * norms[name]) for name in trained):
            return 0.0
        modules: dict[str, list[str]] = {}
        for name in trained:
            modules.setdefault(owner(name), []).append(name)
        ratio = {module: _ratio(own, ratios, norms) for module, own in modules.items()}
        everything = _ratio(trained, ratios, norms)
        highest = self.watch.highest
        far = [module for module, value in ratio.items() if value > highest]
        wide = everything > highest or (len(modules) > 1 and 2 * len(far) > len(modules))
        # norms and biases begin near one or zero, and weigh much in the whole of a small model
        torn = [module for module, value in ratio.items() if value > self.watch.sudden]
        sudden = everything > self.watch.sudden or (len(modules) > 2 and 2 * len(torn) > len(modules))
        # an adapter, a prompt or a new head that is trained alone has not learnt anything yet
        whole = self.worn and 2 * len(trained) > len(role)
        if whole and everything > TURNED:
            wide = sudden = True
        if self.judging.model("update-ratio-high", wide, times=1 if sudden else None):
            named = sorted(far or modules, key=lambda module: -ratio[module])
            self.judging.tell(
                Finding(
                    "update-ratio-high",
                    "warning",
                    f"A step changes the weights by {everything:.2g} of their norm (about 1e-3 is usual), most in {listing(named)}.",
                    "Lower the learning rate by ten, clip gradients by norm, or begin with a warm-up.",
                    module=named[0] if named else "",
                ),
                named,
                ratio,
            )
        rate, before = max(rates.values(), default=math.nan), self.state["rates"].get("last", math.inf)
        top = max(self.state["rates"].get("top", 0.0), rate if math.isfinite(rate) else 0.0)
        self.state["rates"] = {"last": rate if math.isfinite(rate) else None, "top": top} if rates else {}
        before = math.inf if before is None else before
        rising = rates and not rate <= before
        small = everything < self.watch.lowest and not self.state["moved"] and not rising
        self.state["moved"] |= everything >= self.watch.lowest
        if self.judging.model("update-ratio-low", small, times=SLOW):
            self.judging.tell(
                Finding(
                    "update-ratio-low",
                    "warning",
                    f"A step changes the weights by {everything:.2g} of their norm, and never by more since the start (about 1e-3 is "
                    f"usual){f', at a learning rate of {rate:.2g}' if rates else ''}: this run hardly learns.",
                    "Raise the learning rate by ten or more; look for a scheduler that starts at its end, and for gradients that are clipped away.",
                ),
                values={"ratio": everything, "rate": rate} if rates else {"ratio": everything},
            )
        return everything


def _ratio(names: Sequence[str], ratios: Values, norms: Values) -> float:
    size = math.hypot(*(norms[name] for name in names), 0.0)
    return math.hypot(*(ratios[name] * norms[name] for name in names), 0.0) / size if size > 0 else 0.0
