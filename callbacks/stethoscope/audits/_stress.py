"""Boundary inputs that users forget, in every precision: which of them make NaN or Inf, and where."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope._record import Finding, Report
from stethoscope._tree import tensors, unwrap
from stethoscope.audits._nonfinite import NonFiniteReport, examine
from stethoscope.audits._nonfinite_run import Task, run
from stethoscope.audits._nonfinite_tensor import samples
from stethoscope.audits._stress_inputs import Batch, batch_of, boundaries

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from stethoscope._record import Severity

Verdict = Literal["finite", "non-finite", "refused"]

HARSH = "x 1000"
"""An input that no model owes an answer to: what it breaks is information."""
EMPTY = " in one item"
"""Ends the names of masks and lengths that leave nothing of an item, which a loader may never make: a warning, no error."""


class Trial(NamedTuple):
    """One input in one precision.

    Args:
        input: name of the boundary input, e.g. `"silence"`.
        precision: `"as is"`, `"bfloat16"`, `"float16"`, `"autocast bfloat16"`, `"autocast float16"`.
        verdict: `finite`, `non-finite` (output or gradient), `refused` (the model raised).
        report: what `audits.nonfinite` says; None where the model raised.
        error: what it raised.
    """

    input: str
    precision: str
    verdict: Verdict
    report: NonFiniteReport | None = None
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class StressReport(Report):
    """What `audits.stress` returns.

    Args:
        trials: every input in every precision.
    """

    trials: tuple[Trial, ...] = ()

    def failures(self) -> list[Trial]:
        """Return the trials with a non-finite output or gradient."""
        return [trial for trial in self.trials if trial.verdict == "non-finite"]


def stress(model: nn.Module, x: Tensor | tuple[Any, ...] | Mapping[str, Any]) -> StressReport:
    """Feed boundary inputs in several precisions and say which of them give a non-finite output or gradient, and where.

    Inputs, made from `x`: as given, silence, ones, an impulse, a constant 0.5, clipped, rms 1e-6, 1000 times as large, one
    item, length 1 and twice the length along each dimension but the batch, one sample NaN. For integers: as given, the ends of
    the range (0 and the last row of the `Embedding` that reads it, else the smallest and the largest value that `x` holds), one
    item, the lengths. Of several tensors the first float one is varied, else the first of two dimensions; others follow in
    batch and length. A mask among them (bool, or 0 and 1) is set to all True and to all False for one item: one of the two is all
    padding. Lengths (integers, one per item) are set to 0, to 1 and to the longest.

    Precisions: as is; for a float32 model also bfloat16 and float16, whole (on a copy) and by autocast. What the model refuses by
    an exception is not held against it.

    The model is left as it was, as by `nonfinite`. Uses its training flag as it is.

    Cost: two runs of `nonfinite` per input and precision, about a hundred in all; a copy of the model.

    Args:
        model: any module.
        x: a typical batch, `(batch, ...)`, of at least one dimension; a tuple of positional or a dictionary of keyword arguments.

    Raises:
        TypeError: there is no tensor in `x`.
        ValueError: `x` is empty or has no dimension.
        Exception: what the model raises for `x` itself, as it is.

    Examples:
        >>> class Normalised(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x / x.std(-1, keepdim=True))
        >>> report = stress(Normalised(4, 2), torch.randn(3, 4))
        >>> sorted({trial.input for trial in report.failures() if trial.precision == "as is"})
        ['constant', 'ones', 'silence']
    """
    batch = batch_of(x)
    model = unwrap(model)
    trials: list[Trial] = []
    for precision, ready, dtype, context in _precisions(model, batch.x):
        for name, each in boundaries(model, batch):
            trial = _try(ready, each.each(partial(_to, dtype=dtype)), name, precision, context)
            if not trials and trial.verdict == "refused":
                batch.call(model)  # raises what it has just raised
            trials.append(trial)
    findings = [*_findings(trials), *_spread(model, batch)]
    finite = sum(trial.verdict == "finite" for trial in trials)
    refused = sum(trial.verdict == "refused" for trial in trials)
    lines = [f"{finite} of {len(trials)} trials are finite, {refused} were refused by the model.", *_refusals(trials)]
    return StressReport(
        title=f"stress of {type(model).__name__}",
        summary="\n".join(lines),
        findings=tuple(findings),
        trials=tuple(trials),
    )


def _refusals(trials: list[Trial]) -> Iterator[str]:
    """Say what was not tried, so that nobody takes it for finite: whole precisions first, with the reason."""
    inputs: dict[str, None] = {}
    for precision in dict.fromkeys(trial.precision for trial in trials):
        own = [trial for trial in trials if trial.precision == precision]
        if all(trial.verdict == "refused" for trial in own):
            yield f"Not tried in {precision}: {own[0].error}"
        else:
            inputs |= {trial.input: None for trial in own if trial.verdict == "refused"}
    if inputs:
        yield f"Refused: {', '.join(inputs)}. (.trials has the exceptions.)"


def _to(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _precisions(
    model: nn.Module, x: Tensor
) -> Iterator[tuple[str, nn.Module, torch.dtype | None, AbstractContextManager[Any]]]:
    yield "as is", model, None, nullcontext()
    if any(each.dtype is not torch.float32 for each in model.parameters() if each.is_floating_point()):
        return
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield f"autocast {name}", model, None, torch.autocast(x.device.type, dtype=dtype)
        try:
            whole = copy.deepcopy(model).to(dtype)
        except RuntimeError:  # weight_norm of old keeps a tensor with a graph, which cannot be copied
            continue
        yield name, whole, dtype, nullcontext()


def _try(model: nn.Module, batch: Batch, name: str, precision: str, context: AbstractContextManager[Any]) -> Trial:
    report: NonFiniteReport | None = None
    try:
        # first the output, where a mask of -Inf is healthy, then the gradients of what is finite in it
        for loss in (None, _mean):
            with context:
                report = examine(Task(model, model, batch.args, batch.kwargs, loss))
            raised = report.findings[0].evidence["exception"] if report.findings else ""
            if raised:
                return Trial(name, precision, "refused", error=raised)
            if report.origin is not None:
                return Trial(name, precision, "non-finite", report)
    except Exception as error:
        return Trial(name, precision, "refused", error=f"{type(error).__name__}: {error}".partition("\n")[0][:200])
    return Trial(name, precision, "finite", report)


def _mean(output: Any) -> Tensor:
    found = [each for _, each in tensors(output, depth=8) if each.is_floating_point() and each.numel()]
    finite = [each[torch.isfinite(each)].float() for each in found if not each.is_nested]
    return torch.stack([each.mean() for each in finite if each.numel()] or [torch.zeros(())]).sum()


def _findings(trials: list[Trial]) -> list[Finding]:
    """Return one finding per culprit."""
    culprits: dict[tuple[Any, ...], list[Trial]] = {}
    for trial in trials:
        if trial.verdict == "non-finite" and trial.report is not None:
            report = trial.report
            culprits.setdefault((report.origin, report.module, report.operation, report.parameter), []).append(trial)
    found: list[Finding] = []
    for (origin, module, operation, parameter), failed in culprits.items():
        usual = [trial for trial in failed if trial.input != HARSH]
        sure = [trial for trial in usual if not trial.input.endswith(EMPTY)]
        severity: Severity = "warning" if usual else "info"
        if any(trial.input == "as given" or trial.precision == "as is" for trial in sure):
            severity = "error"
        by_precision = "; ".join(
            f"{precision}: {', '.join(trial.input for trial in failed if trial.precision == precision)}"
            for precision in dict.fromkeys(trial.precision for trial in failed)
        )
        first = failed[0].report
        assert first is not None
        found.append(
            Finding(
                "nonfinite-stress",
                severity,
                f"{len(failed)} trials are not finite ({by_precision}). {first.findings[0].message}",
                first.findings[0].advice,
                module=module,
                evidence={
                    "origin": origin,
                    "operation": operation,
                    "parameter": parameter,
                    "source": first.source,
                    "trials": [[trial.input, trial.precision] for trial in failed],
                },
            )
        )
    return found


def _spread(model: nn.Module, batch: Batch) -> list[Finding]:
    """Say whether a NaN in one sample reaches the others."""
    x = batch.x
    if not x.is_floating_point() or x.shape[0] < 2:
        return []
    sick = x.clone()
    sick[0].view(-1)[0] = float("nan")
    reached: set[int] = set()

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = model(*args, **kwargs)
        for _, each in tensors(output, depth=8):
            if each.dim() and each.shape[0] == x.shape[0] and (each.is_floating_point() or each.is_complex()):
                reached.update(samples(each, x.shape[0]))
        return output

    bad = batch.put(batch.signal, sick)
    run(Task(model, watched, bad.args, bad.kwargs))
    if not reached - {0}:
        return []
    return [
        Finding(
            "nonfinite-stress",
            "info",
            f"A NaN in one sample of {x.shape[0]} makes {len(reached)} of them non-finite: samples are mixed"
            f"{' (BatchNorm in train mode does that)' if model.training else ''}.",
            "Check batches before the model, since one broken file spoils its whole batch.",
            evidence={"origin": "input", "samples": sorted(reached)},
        )
    ]
