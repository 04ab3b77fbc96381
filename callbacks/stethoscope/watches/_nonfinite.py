"""Where NaN and Inf come from, judged from flags alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, isnan
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from stethoscope._record import Finding, Record
from stethoscope.probes import Activations, Buffers, Parameters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stethoscope._protocols import Probe, State
    from stethoscope._record import Severity


class _Origin(NamedTuple):
    """The first module, in call order, with a non-finite output."""

    module: str
    inputs_finite: bool


@dataclass(frozen=True)
class NonFinite:
    """Names the module where NaN or Inf is born, apart from those that only pass it on.

    **What it decides:** a step is bad when its loss is NaN or Inf; without a loss, when what the model returned holds
    a NaN (error) or an Inf other than -Inf (warning). A mask of -Inf or a NaN that `where` removes is healthy and not
    reported, nor accused later: what was non-finite in the last healthy step of the phase counts as finite. In a bad
    step the first module in call order with a non-finite output decides:

    - its parameters were non-finite before the step: the parameter is the origin (`nonfinite-parameter`);
    - its inputs were finite: the module is the origin;
    - its inputs were not: the value came from the model's input or from an operation between modules;
    - no module: the loss function is the origin (`nonfinite-loss`).

    Weights that are non-finite when a step begins are reported even if no module has passed them on yet; the step before
    then ended with a bad gradient or a bad write of the optimizer. Inf often turns into NaN in a later module, so the first of each is named.

    Running statistics of normalisations that hold NaN, Inf or values above 1e18 while the loss is finite are reported as well
    (`nonfinite-buffer`), on observed steps.

    **Cost:** host only, one pass over the records.   **Needs:** one flag per module and per parameter at every step, one per running
    statistic on observed ones.

    Args:
        loss: name under which the loss is given to `Monitor.step`.

    Examples:
        >>> flags = [
        ...     Record("activation/nonfinite", 1.0, 3, module="encoder.1"),
        ...     Record("loss", float("nan"), 3, source="step"),
        ... ]
        >>> from stethoscope.testing import replay
        >>> replay(NonFinite(), flags)[0].module
        'encoder.1'
    """

    urgent: ClassVar[bool] = True  # flags and the loss stay with their rank

    loss: str = "loss"

    @property
    def needs(self) -> tuple[Probe, ...]:
        """One flag per module and per parameter, at every step, and per running statistic on observed ones."""
        return (
            Activations(statistics=("nonfinite",), every=1),
            Parameters(statistics=("nonfinite",), every=1),
            Buffers(),
        )

    def init(self) -> State:
        """Nothing seen; no parameter known to be non-finite; no phase in a bad state; no flag known to be harmless."""
        return {"seen": False, "weights": [], "bad": [], "harmless": {}, "buffers": []}

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """See `Watch`."""
        if not records or records[0].source == "log":
            return state, ()
        step, phase, rank = records[0].step, records[0].phase, records[0].rank
        losses = [r.value for r in records if r.source == "step" and r.name == self.loss and isinstance(r.value, float)]
        raised = [r for r in records if "/" in r.name and "nonfinite" in r.name and r.value]
        # a phase that has had no healthy step yet is compared with training
        harmless: dict[str, float] = state["harmless"].get(phase) or state["harmless"].get("train", {})
        flags = [r for r in raised if not _within(r, harmless)]
        origin, first_nan = _first(flags, 1.0), _first(flags, 2.0)
        weights = [r.module for r in flags if r.name == "parameter/nonfinite"]
        severity = _severity(flags, losses)
        known: list[str] = state["weights"]
        findings: list[Finding] = []
        place = {"step": step, "phase": phase, "rank": rank}
        if severity and phase not in state["bad"]:
            evidence = {
                "first_nonfinite": origin.module if origin else None,
                "first_nan": first_nan.module if first_nan else None,
                "loss": str(losses[0]) if losses else None,
                "modules": len({r.module for r in flags if r.name == "activation/nonfinite"}),
                "harmless": sorted({r.module for r in raised if _is_output(r) and _within(r, harmless)})[:100],
            }
            if not any(r.name.startswith("activation/outermost_") for r in records):
                evidence["origin"] = "unknown"
            # weights are looked at while training; in other phases the last look counts
            culprit = _reached(weights if phase == "train" else known, origin)
            findings.append(_explain(origin, first_nan, culprit, losses, severity, place, evidence))
        elif weights and not known and not severity:
            findings.append(_waiting(weights, place))
        buffers = {r.module: r.value for r in raised if r.name == "buffer/nonfinite" and isinstance(r.value, float)}
        if any(r.name == "buffer/count" for r in records):
            # in a bad step they are spoilt by what the step's own finding names
            if buffers and not state.get("buffers") and not severity and not weights:
                findings.append(_spoilt(buffers, place))
            state = {**state, "buffers": [] if severity or weights else list(buffers)[:100]}
        bad = [each for each in state["bad"] if each != phase] + ([phase] if severity else [])
        weights = weights[:100] if phase == "train" else known
        if not severity and not weights:
            seen = {_series(r): r.value for r in raised if r.name.startswith("activation/") and r.value in (1.0, 2.0)}
            state = {**state, "harmless": {**state["harmless"], phase: seen}}
        return {**state, "seen": True, "weights": weights, "bad": bad}, findings


def _series(flag: Record) -> str:
    return f"{flag.name} {flag.module}"


def _within(flag: Record, harmless: dict[str, float]) -> bool:
    """Whether the flag was as high in a healthy step."""
    return isinstance(flag.value, float) and flag.value <= harmless.get(_series(flag), 0.0)


def _is_output(flag: Record) -> bool:
    return flag.name == "activation/nonfinite" or flag.name.startswith("activation/nonfinite.")


def _reached(weights: Sequence[str], origin: _Origin | None) -> str:
    """The bad weight that the first bad module owns, itself or, when it holds other modules, through one of them."""
    if origin is None or not origin.inputs_finite:
        return ""
    inside = f"{origin.module}." if origin.module else ""
    own = [name for name in weights if name.rpartition(".")[0] == origin.module]
    return next(iter(own or [name for name in weights if name.startswith(inside)]), "")


def _first(flags: Sequence[Record], level: float) -> _Origin | None:
    """The first output in call order that is that bad, and whether the inputs of its module were finite."""
    dirty = {(flag.module, flag.call) for flag in flags if flag.name.startswith("activation/input_nonfinite")}
    for flag in flags:
        if _is_output(flag) and isinstance(flag.value, float) and flag.value >= level:
            return _Origin(flag.module, (flag.module, flag.call) not in dirty)
    return None


def _severity(flags: Sequence[Record], losses: Sequence[float]) -> Severity | None:
    """Whether the step is bad: the loss decides, or else what the model returned."""
    if losses:
        return None if all(map(isfinite, losses)) else "error"
    returned = {flag.value for flag in flags if flag.name.startswith("activation/outermost_")}
    return "error" if 2.0 in returned else "warning" if 1.0 in returned else None


def _explain(
    origin: _Origin | None,
    first_nan: _Origin | None,
    parameter: str,
    losses: Sequence[float],
    severity: Severity,
    place: dict[str, Any],
    evidence: dict[str, Any],
) -> Finding:
    bad = next((each for each in losses if not isfinite(each)), None)
    loss = "not finite" if bad is None else "NaN" if isnan(bad) else "Inf" if bad > 0 else "-Inf"
    then = f" The loss is {loss}." if losses else ""
    if origin is None and evidence.get("origin") == "unknown":
        return Finding(
            "nonfinite-loss",
            severity,
            f"The loss is {loss}. No module was seen to make it so, but what the model returned was not seen either: "
            "it comes from the loss function or from a part that is not observed.",
            "See what probe-read-nothing says: a model in eval mode or on another thread shows nothing, and a compiled one "
            "only in observed steps. Monitor(guard='raise', replay=fn) runs such a step again, eagerly, and names the operation.",
            evidence=evidence,
            **place,
        )
    if origin is None:
        same = evidence["harmless"]
        others = f", but for {same[0]!r}{' and others' if same[1:] else ''} as in healthy steps" if same else ""
        return Finding(
            "nonfinite-loss",
            severity,
            f"The loss is {loss} although every module's output is finite{others}: the loss function made it so.",
            "Look for log, sqrt or a division of something that can be zero in the loss, and for a target out of range.",
            evidence={**evidence, "origin": "loss"},
            **place,
        )
    turns = f" It turns into NaN in {first_nan.module!r}." if first_nan and first_nan.module != origin.module else ""
    what = "NaN" if first_nan and first_nan.module == origin.module else "Inf"
    name = repr(origin.module) if origin.module else "the model itself"
    if parameter:
        return Finding(
            "nonfinite-parameter",
            severity,
            f"{what} comes from the parameter {parameter!r}, which was not finite when this step began: {name} is the "
            f"first module that it reaches.{turns}{then}",
            "Go back to an earlier checkpoint, then look at the gradients and the optimizer of the step before, which "
            "wrote it: Monitor's gradient norms tell whether the backward pass was finite.",
            module=origin.module,
            evidence={**evidence, "origin": "parameter", "parameter": parameter},
            **place,
        )
    if not origin.inputs_finite:
        return Finding(
            "nonfinite-activation",
            severity,
            f"{what} was already in the input of {name}, the first module whose output holds it: it comes from the "
            f"model's input or from an operation between modules. {name} is innocent.{turns}{then}",
            "Check the batch for NaN and Inf, then the lines that run before this module in its parent's forward.",
            module=origin.module,
            evidence={**evidence, "origin": "input"},
            **place,
        )
    return Finding(
        "nonfinite-activation",
        severity,
        f"{name} is the first module that makes {what} from finite inputs.{turns}{then}",
        "Check it for overflow of its dtype, log or division of zero and a softmax row that is masked whole; and its "
        "parameters for absurdly large values.",
        module=origin.module,
        evidence={**evidence, "origin": "operation"},
        **place,
    )


def _waiting(weights: Sequence[str], place: dict[str, Any]) -> Finding:
    more = f" and {len(weights) - 1} more" if len(weights) > 1 else ""
    return Finding(
        "nonfinite-parameter",
        "error",
        f"The parameter {weights[0]!r}{more} was not finite when this step began, though the loss still is: the step "
        "before ended with a bad gradient or a bad write, or something wrote the weight in between.",
        "Go back to an earlier checkpoint; look at the gradient norms, eps and the learning rate of the step before.",
        module=weights[0].rpartition(".")[0],
        evidence={"origin": "backward or optimizer", "parameter": weights[0], "count": len(weights)},
        **place,
    )


def _spoilt(buffers: Mapping[str, float], place: dict[str, Any]) -> Finding:
    name = next((each for each, flag in buffers.items() if flag > 1), next(iter(buffers)))
    lost = buffers[name] > 1
    more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
    return Finding(
        "nonfinite-buffer",
        "error" if lost else "warning",
        f"The running statistic {name!r}{more} holds {'NaN or Inf' if lost else 'values above 1e18'}, though the loss is finite: a batch has "
        "spoilt it, and validation will read it.",
        "Look for the batch (an input of 1e20, a NaN under GradScaler, which skips the step but not the forward pass); reset_running_stats() and "
        "some batches in train mode" + (", or a checkpoint: it does not heal." if lost else " heal it sooner."),
        module=name.rpartition(".")[0],
        evidence={"buffers": list(buffers)[:100], "count": len(buffers)},
        **place,
    )
