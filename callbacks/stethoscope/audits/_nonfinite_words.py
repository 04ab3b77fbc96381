"""What the audit says about each origin: one finding, its advice, its evidence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stethoscope._record import Finding
from stethoscope.audits._nonfinite_tensor import headroom_bits

if TYPE_CHECKING:
    from stethoscope._record import Severity
    from stethoscope.audits._nonfinite_run import Outcome
    from stethoscope.audits._nonfinite_trace import Birth, Place

_SINGULAR = "{} of these inputs is not a finite number: look for a zero divisor, log or sqrt outside of its domain; clamp first, e.g. x.clamp(min=1e-8)."
_ENDS = {"forward": "the output", "loss": "the loss", "backward": "the gradients"}


def explain(
    origin: str, module: str, birth: Birth, outcome: Outcome, severity: Severity, absurd: float | None
) -> Finding:
    """Return the finding for the culprit of a run."""
    evidence = _evidence(origin, birth, outcome)
    what = "NaN" if birth.flags.nan else "Inf"
    stays = f"the state {next(iter(outcome.state))!r} of the model" if outcome.state else "nothing yet"
    end = _ENDS[outcome.phase] if outcome.phase else "an exception" if outcome.error else stays
    where = "" if not birth.samples else f" Samples of the batch: {_few(birth.samples)}."
    turns = ""
    if birth.first_nan and birth.first_inf and birth.first_inf.module != birth.first_nan.module:
        turns = f" It turns into NaN in {_module(birth.first_nan.module)}, which is innocent."
    if origin == "input":
        first = birth.first_nan or birth.first_inf
        reached = f"; {_module(first.module)} is the first to read it and innocent" if first else ""
        message = f"{what} was already in the input {birth.name!r} and reaches {end}{reached}.{where}{turns}"
        return Finding("nonfinite-input", severity, message, _INPUT, evidence=evidence)
    if origin == "parameter" and absurd is not None:
        evidence["value"] = absurd
        message = (
            f"{birth.name!r} holds {absurd:.3g}, finite but absurd: {birth.place.operation} overflows because of it "
            f"{_at(birth.place)}, and with it set to the tensor's median {end} is finite.{turns}"
        )
        advice = "Restore this weight from a checkpoint; a single huge value is a damaged file, a flipped bit or an exploded step."
        return Finding("nonfinite-parameter", severity, message, advice, module=module, evidence=evidence)
    if origin == "parameter":
        reaches = f"and reaches {end}" if outcome.phase else "though it has not reached the output of this run"
        message = f"The parameter {birth.name!r} holds {what} {reaches}.{turns}"
        return Finding("nonfinite-parameter", severity, message, _PARAMETER, module=module, evidence=evidence)
    if origin == "buffer":
        reaches = f"and reaches {end}" if outcome.phase else "though the output of this run is still clean"
        value = f" ({absurd:.3g}, finite but absurd)" if absurd is not None else ""
        message = f"The state {birth.name!r} holds {what if absurd is None else 'a value'}{value} {reaches}.{turns}"
        return Finding("nonfinite-buffer", severity, message, _BUFFER, module=module, evidence=evidence)
    why, advice = _why(birth)
    born = (
        f"{what} is born in {birth.place.operation or 'an operation'} of {_module(module)} {_at(birth.place)}".rstrip()
    )
    if origin == "backward":
        if (birth.details or {}).get("in_loss"):
            born = f"{what} is born in {birth.place.operation} in the loss {_at(birth.place)}"
        reached = f" It reaches {len(outcome.gradients)} gradients: {_few(outcome.gradients)}."
        message = f"{born}, in the backward pass; output and loss are finite.{reached}"
        advice = (
            "sqrt, norm, std and division have infinite slopes at zero, and where() does not hide them, since 0 * Inf is "
            "NaN: make the input safe before the operation, e.g. sqrt(x.clamp(min=1e-8))."
        )
        owner = module or evidence["parameter"].rpartition(".")[0]  # a hook on a parameter runs in no module
        return Finding("nonfinite-gradient", severity, message, advice, module=owner, evidence=evidence)
    if origin == "loss":
        message = f"{born}, in the loss function.{why}{where}"
        return Finding("nonfinite-loss", severity, message, advice, module=module, evidence=evidence)
    message = f"{born} and reaches {end}.{why}{where}{turns}"
    return Finding("nonfinite-activation", severity, message, advice, module=module, evidence=evidence)


_INPUT = "Check the batch before the model: torch.isfinite(x).all(); look for silence divided by its own level and broken files."
_PARAMETER = (
    "Go back to an earlier checkpoint. The step that wrote it had a non-finite gradient, or an optimizer with eps=0, fp16 "
    "weights or an infinite learning rate: run with Monitor(guard='raise')."
)
_BUFFER = (
    "An earlier batch has poisoned it. Reset it (BatchNorm: reset_running_stats()) or go back to a checkpoint, and find the "
    "batch with Monitor(guard='raise')."
)


def _why(birth: Birth) -> tuple[str, str]:
    details = birth.details or {}
    operation = birth.place.operation.removeprefix("aten.") or "the operation"
    if details.get("masked"):
        return (
            " All other inputs are finite or the -Inf of a mask.",
            "A row that is masked as a whole has no softmax: leave out empty items, or keep one position of each row.",
        )
    if details.get("raw_memory"):
        return " The memory was never written.", "Use zeros() in place of empty()."
    if details.get("outside"):
        return (
            " The tensor was not made by an operation of this run: it comes from NumPy, a closure or a target.",
            "Check this tensor where it is made.",
        )
    top, dtype = details.get("needed"), details.get("dtype")
    if top and dtype:
        bits = headroom_bits(top, getattr(torch, dtype))
        if bits < 0:
            holds = [
                each for each in ("bfloat16", "float32", "float64") if headroom_bits(top, getattr(torch, each)) > 0
            ]
            return (
                f" The result needs {top:.3g}, {-bits:.1f} bits more than {dtype} holds ({torch.finfo(getattr(torch, dtype)).max:.3g}).",
                f"Overflow of {dtype}: {' or '.join(holds[:2]) or 'no dtype'} would hold it; or scale the inputs down.",
            )
    seen = details.get("input_absmax")
    inputs = f" Its inputs are finite (absmax {seen:.3g})." if seen is not None else " Its inputs are finite."
    return inputs, _SINGULAR.format(operation)


def _evidence(origin: str, birth: Birth, outcome: Outcome) -> dict[str, Any]:
    details = dict(birth.details or {})
    top, dtype = details.get("needed"), details.get("dtype")
    if top and dtype:
        details["headroom_bits"] = round(headroom_bits(top, getattr(torch, dtype)), 2)
    return {
        "origin": origin,
        "operation": birth.place.operation,
        "source": birth.place.source,
        "parameter": birth.name
        or (outcome.gradients[0] if origin == "backward" and len(outcome.gradients) == 1 else ""),
        "samples": list(birth.samples),
        "first_inf": birth.first_inf.module if birth.first_inf else None,
        "first_nan": birth.first_nan.module if birth.first_nan else None,
        "gradients": outcome.gradients[:100],
        "exception": f"{type(outcome.error).__name__}: {outcome.error}" if outcome.error else "",
        **details,
    }


def _module(name: str) -> str:
    return repr(name) if name else "no module (the root's own forward or a function)"


def _at(place: Place) -> str:
    return f"({place.source})" if place.source else ""


def _few(items: Any) -> str:
    shown = ", ".join(map(str, items[:5]))
    return f"{shown} and {len(items) - 5} more" if len(items) > 5 else shown
