"""`GradientHealth`: gradients that vanish, explode, are cut off, are clipped away or are never zeroed."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from stethoscope._record import Finding
from stethoscope.probes import Activations, Gradients, Optimizers, Parameters
from stethoscope.watches import _gradient_balance as balance
from stethoscope.watches._compounding import stacks, steadily
from stethoscope.watches._gradient_modules import (
    FEWEST,
    IDLE,
    TRAINED,
    UNHELD,
    Module,
    by_module,
    cut_off,
    looks_unchosen,
    norm_of,
    reached,
    trend,
)
from stethoscope.watches._recurrence import unreached
from stethoscope.watches._skipped_steps import skipped
from stethoscope.watches._streaks import Judging, listing, owner, train_values

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Record, Severity

CLIPPED = 5  # observed steps in a row that are clipped hard: the first steps of a run may be, all of them are not
USUAL = 1e-4  # of the weights: a tenth of what is usual
MEMORY = 20  # observed norms whose median is the level


@dataclass(frozen=True)
class GradientHealth:
    """Reports gradients that vanish, explode, are exactly zero, are clipped away, or still hold those of the step before.

    **What it decides**, on observed steps, for modules (the norm over a module's own parameters, so that a bias whose
    gradient is zero by construction does not count), `relative` being the gradient's norm over that of the weights:

    - `gradient-vanishing`, `gradient-exploding` (over depth): the median relative gradient of the first quarter of the
      modules, in the order of the forward pass, and that of the last quarter differ by `depth_ratio`, or the first and the last layer of a stack; or all of it is below
      `smallest`. Or one module's relative gradient is below `starved` times the median of all, in five observed steps: something closed
      lies between it and the loss.
    - `gradient-exploding` (over time): the norm of all gradients is `growth` times the median of up to 20 earlier ones and
      `large` times that of the weights, twice in a row.
    - `gradient-zero`: exactly zero, or none at all, in a module that runs, or in the weights over time or of one direction of a recurrent layer. Only info where it looks like an expert that
      is not chosen: modules before it and others of its name get gradients, and all of them are given the same, or it nothing. An error
      where gradients arrive, but are gone when the optimizer steps and leaves all as it is, or where all are zero, unless a loss that did
      teach has come down to exactly zero.
    - `step-skipped`: gradients hold NaN or Inf and no optimizer has stepped for more than 20 steps in a row, 30 from the start on.
    - `gradient-imbalance`: one module's gradient lies `imbalance` times above the median of all modules, absolutely and relatively.
    - `gradient-clipping`: the optimizer gets less than `clipped_share` of the norm in all of the last five observed steps; an info where its
      steps are of usual length all the same, as those of Adam.
    - `gradient-accumulation`: gradients of the step before were not zeroed.
    - `nonfinite-gradient`: the optimizer has used a gradient that holds NaN or Inf.

    Except for the last, a state must hold for `observations` observed steps that span `steps` steps. Many modules make one
    finding. **Cost:** host only, one pass over the records of observed steps. **Needs:** gradient norms, weight norms,
    and what the optimizer is handed.

    Args:
        observations: observed steps in a row before anything is said.
        steps: steps that they must span at least.
        depth_ratio: a factor. Healthy networks stay within a few hundred; 1e4 is eight sigmoid layers.
        smallest: relative gradient of the whole model. 1e-8 is below Adam's eps for weights of any usual size.
        starved: share of the median, of one module. A layer scale of 1e-6 begins there, and has left it after some steps.
        growth: a factor over the run's own level.
        large: relative gradient of the whole model: SGD at a rate of 0.1 would replace all weights in one step.
        imbalance: a factor.
        clipped_share: in (0, 1). Below 2 % a learning rate is in effect fifty times lower than the one that was set.

    Examples:
        >>> from stethoscope import Record
        >>> from stethoscope.testing import replay
        >>> norms = {"a.weight": 0.0, "b.weight": 1.0}
        >>> records = [Record("gradient/norm", v, step, n) for step in (0, 50, 100) for n, v in norms.items()]
        >>> replay(GradientHealth(), records)[0].code
        'gradient-zero'

    References: Glorot and Bengio 2010 (gradients over depth); Pascanu et al. 2013 (exploding gradients).
    """

    _: KW_ONLY
    observations: int = 3
    steps: int = 10
    depth_ratio: float = 1e4
    smallest: float = 1e-8
    starved: float = 1e-6
    growth: float = 100.0
    large: float = 10.0
    imbalance: float = 1e4
    clipped_share: float = 0.02

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Norms of gradients and weights, what optimizers use, and which modules run."""
        return (
            Gradients(),
            Parameters(statistics=("norm", "unchanged", "update_ratio")),
            Optimizers(),
            Activations(statistics=("rms",)),
        )

    def init(self) -> State:
        """Nothing seen."""
        return {"held": {}, "totals": [], "moved": False, "taught": False, "shares": [], "skipped": None}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        found = train_values(
            records,
            "gradient/norm",
            "gradient/nonfinite",
            "gradient/applied_norm",
            "gradient/scale",
            "gradient/carried",
            "parameter/norm",
            "parameter/role",
            "parameter/unchanged",
            "parameter/update_ratio",
            "optimizer/steps",
            "optimizer/total",
            "activation/rms",
            "activation/input_rms",
        )
        gradients = found["gradient/norm"]
        if not gradients:
            return state, ()
        judging = Judging(state["held"], records[0].step, self.observations, self.steps)
        look = _Look(self, dict(state), judging)
        bad = {name: count for name, count in found["gradient/nonfinite"].items() if name and count}
        bad |= {name: 1.0 for name, norm in gradients.items() if name and math.isnan(norm)}
        if bad or not math.isfinite(gradients.get("", 0.0)):
            # a step that a scaler skips is how mixed precision works, and one that a guard has emptied is saved
            stepped = found["optimizer/steps"].get("", 1.0) > 0
            written = stepped and (any(reached(name, found) for name in bad or gradients if name) or not any(gradients))
            look.nonfinite(bad, everywhere=len(bad) >= sum(map(bool, gradients)), applied=written)
            total = found["optimizer/total"].get("", math.nan)
            look.state["skipped"] = None if stepped else skipped(judging, state.get("skipped"), list(bad), total)
            return {**look.state, "held": judging.held}, judging.findings
        look.state["skipped"] = None
        judging.model("step-skipped", False)
        judging.model("nonfinite-gradient", False)
        roles = found["parameter/role"]
        if UNHELD in roles.values():
            # what no optimizer holds, none sets to zero: sums over all steps so far say nothing of this one
            gradients = {name: norm for name, norm in gradients.items() if name and roles.get(name) != UNHELD}
        cut = cut_off(roles, found["activation/rms"])
        modules = dict.fromkeys(cut, Module(0.0, 0.0)) | by_module(gradients, found["parameter/norm"])
        lossless = any(r.name == "loss" and r.source == "step" and r.value == 0.0 for r in records)
        if modules:
            look.zero(modules, found["activation/input_rms"], lossless=lossless)
        unreached(judging, {name: norm for name, norm in gradients.items() if name})
        steep = look.depth(modules)
        total, size = norm_of(gradients), norm_of(found["parameter/norm"])
        look.time(gradients.get("", total), total / size if size > 0 else 0.0)
        # a trend over depth unbalances single modules, too
        balance.far_above(judging, {} if steep else modules, self.imbalance)
        balance.far_below(judging, {} if steep else modules, self.starved)
        applied, scale = found["gradient/applied_norm"], found["gradient/scale"].get("", 1.0)
        lost = look.lost({name: norm for name, norm in gradients.items() if norm > 0}, applied, found)
        pairs = [(scale * applied[name], norm) for name, norm in gradients.items() if name in applied and norm > 0]
        look.clipping([] if lost else pairs, found["parameter/update_ratio"].values())
        look.carried(found["gradient/carried"].get("", 0.0))
        return {**look.state, "held": judging.held}, judging.findings


class _Look:
    """One observed step as it is judged: the state becomes the new one, findings gather."""

    def __init__(self, watch: GradientHealth, state: dict[str, Any], judging: Judging) -> None:
        self.watch, self.state, self.judging = watch, state, judging

    def nonfinite(self, bad: Mapping[str, float], *, everywhere: bool, applied: bool) -> None:
        if not self.judging.model("nonfinite-gradient", applied, times=1):
            return
        first = next(iter(bad), "") if not everywhere else ""
        where = f" of {listing(list(bad), 1)}" if first else ""
        self.judging.tell(
            Finding(
                "nonfinite-gradient",
                "error",
                f"The gradient{where} holds NaN or Inf, and the optimizer has written with it: the weights are lost.",
                "Go back to a checkpoint before this step. Monitor(guard='raise') stops before the write and names the origin; "
                "audits.nonfinite finds the operation.",
                module=owner(first),
            ),
            list(bad),
        )

    def lost(
        self, arrived: Mapping[str, float], applied: Mapping[str, float], found: Mapping[str, Mapping[str, float]]
    ) -> bool:
        """Judge whether what backward has brought is gone when the optimizer steps: it is handed zeros, or nothing."""
        roles, still = found["parameter/role"], found["parameter/unchanged"]
        stepped = [name for name in arrived if roles.get(name) in (IDLE, TRAINED)]
        gone = bool(stepped) and all(roles[name] == IDLE or applied.get(name) == 0 for name in stepped)
        # an optimizer may throw gradients away once it has used them
        unused = gone and all(still.get(name) == 1.0 for name in stepped)
        if self.judging.model("gradient-zero-lost", unused):
            self.judging.tell(
                Finding(
                    "gradient-zero",
                    "error",
                    f"backward() brings gradients (norm {norm_of(arrived):.3g}), but the optimizer is handed none of them: they are gone "
                    "before its step.",
                    "Look for zero_grad() between backward() and optimizer.step(); it belongs before backward().",
                ),
                values={"norm": norm_of(arrived)},
            )
        return gone

    def zero(self, modules: Mapping[str, Module], given: Mapping[str, float], *, lossless: bool) -> None:
        zero = {name: 0.0 for name, each in modules.items() if each.gradient == 0}
        if modules and len(zero) == len(modules):  # none where no optimizer of torch holds any parameter
            # a hinge loss that has come down to exactly zero has nothing left to teach; one that begins there has taught nothing
            reached = lossless and self.state.get("taught", True)
            if self.judging.model("gradient-zero-everywhere", not reached):
                since = (
                    f"since {self.watch.observations} observed steps"
                    if not lossless
                    else "since the first observed step, and so is the loss"
                )
                self.judging.tell(
                    Finding(
                        "gradient-zero",
                        "error",
                        f"All gradients are exactly zero, {since}.",
                        "Look for a loss that is cut off from the model (detach, no_grad, item, argmax, rounding), a "
                        "loss weight or mask of zero, targets longer than the inputs (CTC with zero_infinity), or units that are all dead.",
                    ),
                    list(zero),
                )
            return
        self.state["taught"] = True
        self.judging.model("gradient-zero-everywhere", False)
        order = list(modules)
        quiet = {name for name in zero if looks_unchosen(name, order, zero, given)}
        for code, hits in (("gradient-zero", zero.keys() - quiet), ("gradient-zero-quiet", quiet)):
            news = self.judging.hold(code, {name: 0.0 for name in order if name in hits}, order)
            if news:
                self._unreached(news, "info" if hits is quiet else "warning", len(modules))

    def _unreached(self, news: Sequence[str], severity: Severity, count: int) -> None:
        last = news[-1]
        more = "an expert that is never chosen, or a branch" if severity == "info" else "a part"
        self.judging.tell(
            Finding(
                "gradient-zero",
                severity,
                f"The gradients of {len(news)} of {count} modules are exactly zero ({listing(news)}): {more} that the "
                "loss does not reach.",
                f"Look right after {last!r} for detach(), no_grad(), argmax or rounding, a multiplication by zero, dead or "
                "saturated units; if it is meant, turn requires_grad off.",
                module=last,
            ),
            news,
        )

    def depth(self, modules: Mapping[str, Module]) -> bool:
        """Judge the trend over depth; return whether there is one, which also unbalances single modules."""
        alive = [(name, each.relative) for name, each in modules.items() if each.relative > 0]
        ratio: float = 1.0
        early: Sequence[tuple[str, float]] = alive[:1]
        late: Sequence[tuple[str, float]] = alive[-1:]
        if len(alive) >= FEWEST:
            ratio, early, late = trend(alive)
            # a module whose gradient dwarfs its own weights, among others that are well, is out of balance, and no trend
            most = max(alive, key=lambda each: each[1])
            rest, _, _ = trend([each for each in alive if each is not most])
            for stack in stacks(dict(alive)):
                # sigmoids in one part of a model, around which the rest is reached by a skip connection
                if (
                    len(stack) >= FEWEST
                    and stack[-1][1] > self.watch.depth_ratio * stack[0][1]
                    and steadily(stack, 1.0)
                ):
                    ratio, early, late = stack[0][1] / stack[-1][1], stack[:1], stack[-1:]
            if most[1] > self.watch.large and 1 / self.watch.depth_ratio < rest < self.watch.depth_ratio:
                ratio = rest
        everything = norm_of({name: each.relative for name, each in modules.items()})
        faint = 0 < everything < self.watch.smallest and not self.state["moved"]
        self.state["moved"] |= everything >= self.watch.smallest
        low = faint or ratio < 1 / self.watch.depth_ratio
        for code, hit in (("gradient-vanishing", low), ("gradient-exploding-depth", ratio > self.watch.depth_ratio)):
            if not self.judging.model(code, hit):
                continue
            first, last = early[0], late[-1]
            if code == "gradient-vanishing":
                self.judging.tell(
                    Finding(
                        "gradient-vanishing",
                        "warning",
                        f"Gradients vanish: {first[1]:.2g} of the weights' norm in {first[0]!r}, {last[1]:.2g} in {last[0]!r}"
                        f"{f', a factor of {1 / ratio:.2g} over depth' if not faint else ', from the start'}.",
                        "Use residual connections or normalisation, ReLU-like activations in place of sigmoid or tanh, and an "
                        "initialisation with a gain near 1; look for saturated activations.",
                        module=first[0],
                    ),
                    [name for name, _ in alive],
                    dict(alive),
                )
            else:
                self.judging.tell(
                    Finding(
                        "gradient-exploding",
                        "warning",
                        f"Gradients explode over depth: {last[1]:.2g} of the weights' norm in {last[0]!r}, {first[1]:.2g} in "
                        f"{first[0]!r}, a factor of {ratio:.2g}.",
                        "Lower the gain of the initialisation to about 1, add normalisation or residual connections, clip "
                        "gradients by norm.",
                        module=first[0],
                    ),
                    [name for name, _ in alive],
                    dict(alive),
                )
        return low or ratio > self.watch.depth_ratio

    def time(self, total: float, relative: float) -> None:
        totals: list[float] = self.state["totals"]
        level = median(totals) if len(totals) >= 2 else 0.0
        high = level > 0 and total > self.watch.growth * level and relative > self.watch.large
        if self.judging.model("gradient-exploding", high, times=2):
            self.judging.tell(
                Finding(
                    "gradient-exploding",
                    "error",
                    f"Gradients explode: their norm is {total:.3g}, {total / level:.2g} times the usual {level:.3g} and "
                    f"{relative:.2g} times that of the weights.",
                    "Go back to a checkpoint and lower the learning rate or clip gradients by norm; look at the batches since then.",
                ),
                values={"norm": total, "level": level, "relative": relative},
            )
        if not high:
            self.state["totals"] = [*totals, total][-MEMORY:]

    def clipping(self, pairs: Sequence[tuple[float, float]], ratios: Collection[float]) -> None:
        if not pairs:
            return
        share = math.hypot(*(used for used, _ in pairs)) / math.hypot(*(norm for _, norm in pairs))
        shares: list[float] = [*self.state["shares"], share][-CLIPPED:]
        self.state["shares"] = shares
        hard = len(shares) >= CLIPPED and max(shares) < self.watch.clipped_share
        if self.judging.model("gradient-clipping", hard, times=1):
            middle = median(shares)
            # the step of Adam is as long whatever a gradient is multiplied by
            ratio = median(ratios) if ratios else 0.0
            severity: Severity = "info" if ratio >= USUAL else "warning"
            so = (
                f"steps are of usual length all the same ({ratio:.2g} of the weights), but each batch counts alike."
                if severity == "info"
                else f"the learning rate is in effect {1 / max(middle, 1e-30):.3g} times lower."
            )
            self.judging.tell(
                Finding(
                    "gradient-clipping",
                    severity,
                    f"Clipping leaves {middle:.2g} of the gradient's norm in each of the last {len(shares)} observed steps: {so}",
                    "Raise the bound of clip_grad_norm_ to about the usual norm (the record gradient/norm), so that it cuts "
                    "outliers only; under a GradScaler call scaler.unscale_(optimizer) before.",
                ),
                values={"share": middle, "norm": math.hypot(*(norm for _, norm in pairs))},
            )

    def carried(self, share: float) -> None:
        if self.judging.model("gradient-accumulation", share > 0.5):
            self.judging.tell(
                Finding(
                    "gradient-accumulation",
                    "warning",
                    f"Gradients are not zeroed: in {share:.0%} of the parameters looked at, the gradient still holds that of the "
                    "step before, so each step repeats all earlier ones.",
                    "Call optimizer.zero_grad() before each backward() that begins a step; with several micro-batches per "
                    "step, call monitor.step() once, after optimizer.step().",
                ),
                values={"share": share},
            )
