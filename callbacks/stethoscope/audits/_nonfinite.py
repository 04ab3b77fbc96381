"""Where is a non-finite number born? One exact answer for one input."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stethoscope._randomness import random_state
from stethoscope._record import Report
from stethoscope._tree import plain, unwrap
from stethoscope.audits._nonfinite_call import Call, autocasts, grad_outputs
from stethoscope.audits._nonfinite_run import Outcome, Repair, Task, run
from stethoscope.audits._nonfinite_words import explain

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stethoscope._record import Severity
    from stethoscope.audits._nonfinite_trace import Birth, Place

Origin = Literal["input", "parameter", "buffer", "operation", "loss", "backward", "optimizer"]

MOST = 4
"""Suspects that are tried one by one, each for the price of one more run."""


@dataclass(frozen=True, kw_only=True)
class NonFiniteReport(Report):
    """What `audits.nonfinite` returns.

    Args:
        origin: `input`, `parameter`, `buffer`, `operation` (from finite inputs), `loss`, `backward`; None: all is finite.
        module: the innermost module that was running, or the owner of the parameter; `""` for the root's own forward, a
            function outside of every module, and the input.
        call_index: which call of that module in this run, from 0.
        operation: e.g. `"aten.sqrt"`, `""` when no operation is to blame.
        source: `file:line in function: code` of the user's code.
        first_inf: the first operation that returned Inf on the way from the origin; None without one.
        first_nan: the first that returned NaN.
        parameter: qualified name of the parameter or buffer to blame; for `backward`, of the one gradient reached.
        samples: indices in the batch where it is born; else those that it reaches in the output, if not all.
        gradients: parameters whose gradient is not finite.
    """

    origin: Origin | None = None
    module: str = ""
    call_index: int = 0
    operation: str = ""
    source: str = ""
    first_inf: Place | None = None
    first_nan: Place | None = None
    parameter: str | None = None
    samples: tuple[int, ...] = ()
    gradients: tuple[str, ...] = ()
    _task: Task | None = field(default=None, repr=False, compare=False)
    _call: Call | None = field(default=None, repr=False, compare=False)

    def save(self, folder: str | Path) -> Path:
        """Write an incident bundle: what was found and all that `stethoscope replay` needs to find it again elsewhere.

        The input, the random states, buffers and weights (at most 256 MiB together; what did not fit is listed), flags, versions.
        Two files, strict JSON and safetensors, no pickle. The weights are those of now: save before the model changes.

        Args:
            folder: where to; gets a number behind its name if it exists.

        Returns:
            The folder written.

        Raises:
            ValueError: there is nothing to keep: all was finite, or the report is another one's.
            OSError: the folder cannot be written.

        Examples:
            >>> report = nonfinite(torch.nn.Linear(2, 2), torch.tensor([[1.0, float("nan")]]))
            >>> report.save("runs/incident").name
            'incident'
        """
        from stethoscope.audits._incident import Incident, write

        if self._task is None or self._call is None or self.origin is None:
            raise ValueError("There is no incident to save: this report has found no culprit.")
        call = self._call
        left_out: tuple[str, ...] = ()
        try:
            call = call._replace(grad_outputs=grad_outputs(self._task, call))
        except Exception as error:  # the model may well be one that raises
            left_out = (f"gradients at the output: {type(error).__name__}: {error}",)
        return write(Incident(self._task.model, self.findings, self, (call,), left_out=left_out), Path(folder))


def nonfinite(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Any] | Tensor | None = None,
    forward: Callable[..., Any] | str | None = None,
    **kwargs: Any,
) -> NonFiniteReport:
    """Run the model once and name the operation, weight or input in which a NaN or Inf of its output is born.

    Every operation is looked at below autograd and autocast. What counts is what reaches the output, or with `loss` the
    loss and the gradients: a mask of -Inf and a NaN that `where` removes are healthy. Several suspects are told apart by
    running again with all but one of them repaired; a weight that is finite but absurd is found the same way.

    Parameters, buffers, gradients, training flags and random states are put back, all hooks removed, also after an
    exception. The inputs are copied. Use the grad mode, the autocast and the training flag of the run in question.

    Cost: about ten forward passes, one copy of the weights and of the inputs; a run more per suspect. Waits for the device.

    Args:
        model: any module, also inside of DDP or compile wrappers; its code runs eagerly.
        *args: positional arguments of the forward pass.
        loss: called with the output, returns the loss (a tensor of one number, a dict with `loss`, a tuple that begins
            with it); then the backward pass is examined as well. Or a loss with its graph, for backward only.
        forward: for models without a usable `forward`: a method's name, a bound method, a submodule, or
            `fn(model, *args, **kwargs)`.
        **kwargs: keyword arguments of the forward pass.

    Raises:
        TypeError: `model` is no module.
        ValueError: `loss` gives more than one number.
        Exception: what the model raises, unless a non-finite value was born before: then the report is about that value.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].weight[0, 0].fill_(float("nan"))
        >>> report = nonfinite(model, torch.ones(3, 2))
        >>> report.origin, report.parameter
        ('parameter', '1.weight')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got an object of {type(model).__name__}.")
    model = unwrap(model)
    task = Task(model, _call(model, forward), args, kwargs, loss)
    call = Call(task.call, args, kwargs, torch.is_grad_enabled(), autocasts(), random_state(_devices(model)), {})
    report = examine(task)
    return report if report.origin is None else replace(report, _task=task, _call=call)


def _devices(model: nn.Module) -> list[torch.device]:
    return sorted({each.device for each in model.parameters() if each.device.type == "cuda"}, key=str)


def examine(task: Task) -> NonFiniteReport:
    """Run a task, find its culprit, report; see `nonfinite`."""
    outcome = run(task)
    if isinstance(outcome.error, ValueError) and outcome.error.args[:1] and "loss must give" in str(outcome.error):
        raise outcome.error
    suspects = _suspects(outcome)
    if not suspects:
        if outcome.error is not None:
            raise outcome.error
        return NonFiniteReport(title=_title(task.model), summary=_healthy(outcome, task.loss))
    culprit = _culprit(task, outcome, suspects)
    return _report(task, outcome, culprit, _absurd(task, outcome, culprit))


def _call(model: nn.Module, forward: Callable[..., Any] | str | None) -> Callable[..., Any]:
    if forward is None:
        return model
    if isinstance(forward, str):
        return getattr(model, forward)  # type: ignore[no-any-return]
    if isinstance(forward, nn.Module) or isinstance(getattr(forward, "__self__", None), nn.Module):
        return forward
    return lambda *args, **kwargs: forward(model, *args, **kwargs)


def _suspects(outcome: Outcome) -> list[Birth]:
    """Return the births that count, the one that reached an operation first in front."""
    births = outcome.births
    real = [birth for birth in births if birth.kind != "mask"]
    if outcome.phase is not None:
        found = [births[i] for i in outcome.culprits]
    elif outcome.error is not None:
        found = [birth for birth in real if birth.reached < float("inf")]
    else:
        # nothing has come out yet, but what stays in the model will
        found = [births[i] for several in outcome.state.values() for i in several]
        found = found or [birth for birth in real if birth.kind in ("parameter", "buffer")]
    return sorted(set(found), key=lambda birth: (birth.reached, birth.index))


def _culprit(task: Task, outcome: Outcome, suspects: list[Birth]) -> Birth:
    """Return the first suspect that suffices: with all others repaired, it still goes wrong."""
    if len(suspects) == 1 or outcome.phase is None:
        return suspects[0]
    for suspect in suspects[:MOST]:
        others = [each for each in suspects if each is not suspect]
        again = run(task, _repair(task, others, inputs=suspect.kind != "input"))
        if again.phase is not None and suspect.key in {again.births[i].key for i in again.culprits}:
            return suspect
    return suspects[0]


def _repair(task: Task, births: Sequence[Birth], *, inputs: bool) -> Repair:
    names = {birth.name for birth in births if birth.kind in ("parameter", "buffer")}
    weights = [
        (tensor, _filled(tensor, ~torch.isfinite(tensor))) for name, tensor in _owned(task.model) if name in names
    ]
    return Repair(
        frozenset(birth.index for birth in births if birth.kind == "operation"),
        inputs and any(birth.kind == "input" for birth in births),
        tuple(weights),
    )


def _absurd(task: Task, outcome: Outcome, culprit: Birth) -> tuple[str, float] | None:
    """Name a finite weight without which the run is finite, and its value.

    Absurd is `|w| > max(1e4 * median |w|, sqrt(largest number of the dtype))`; one or two values have the median 1.
    """
    if culprit.kind != "operation" or not outcome.wrong:
        return None
    found: list[tuple[str, float, tuple[Tensor, Tensor]]] = []
    for name, tensor in _owned(task.model):
        if not tensor.is_floating_point() or not tensor.numel() or tensor.layout is not torch.strided:
            continue
        size = tensor.detach().abs()
        finite = torch.isfinite(size)
        median = float(size[finite].float().median()) if tensor.numel() > 2 and bool(finite.any()) else 1.0
        high = finite & (size > max(1e4 * median, torch.finfo(tensor.dtype).max ** 0.5))
        if bool(high.any()):
            found.append((name, float(tensor.detach()[high][0]), (tensor, _filled(tensor, high))))
    if not found or run(task, Repair(weights=tuple(each[2] for each in found))).wrong:
        return None
    if len(found) > 1:
        for name, value, weight in found:
            if not run(task, Repair(weights=(weight,))).wrong:
                return name, value
    return found[0][:2]


def _filled(tensor: Tensor, where: Tensor) -> Tensor:
    rest = tensor.detach()[~where]
    return tensor.detach().masked_fill(where, float(rest.float().median()) if rest.numel() else 0.0)


def _owned(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(plain(name), each) for name, each in (*model.named_parameters(), *model.named_buffers())]


def _report(task: Task, outcome: Outcome, culprit: Birth, absurd: tuple[str, float] | None) -> NonFiniteReport:
    place, origin, parameter = culprit.place, _origin(outcome, culprit), culprit.name
    if absurd is not None:
        culprit.name = parameter = absurd[0]
        buffers = {plain(name) for name, _ in task.model.named_buffers()}
        origin = "buffer" if parameter in buffers else "parameter"
    owned = origin in ("parameter", "buffer")
    if origin == "backward" and len(outcome.gradients) == 1:
        parameter = outcome.gradients[0]
    module = parameter.rpartition(".")[0] if owned else place.module
    if not culprit.samples and len(outcome.samples) < (outcome.batch or 0):
        culprit.samples = outcome.samples  # a number without a batch, which spoils some of its items only
    still = outcome.phase is None and outcome.error is None and origin == "parameter"
    severity: Severity = (
        "warning" if still or not (culprit.first_nan or culprit.flags.nan or outcome.phase != "forward") else "error"
    )
    finding = explain(origin, module, culprit, outcome, severity, absurd[1] if absurd else None)
    return NonFiniteReport(
        title=_title(task.model),
        summary=f"{outcome.operations} operations were looked at.",
        findings=(finding,),
        origin=origin,
        module=module,
        call_index=place.call_index,
        operation=place.operation,
        source=place.source,
        first_inf=culprit.first_inf,
        first_nan=culprit.first_nan,
        parameter=parameter if owned or (origin == "backward" and parameter) else None,
        samples=culprit.samples,
        gradients=tuple(outcome.gradients),
    )


def _origin(outcome: Outcome, culprit: Birth) -> Origin:
    if culprit.kind in ("input", "parameter", "buffer"):
        return culprit.kind
    if "backward" in (outcome.phase, culprit.phase):
        return "backward"
    return "loss" if culprit.phase == "loss" else "operation"


def _title(model: nn.Module) -> str:
    return f"non-finite values in {type(model).__name__}"


def _healthy(outcome: Outcome, loss: object) -> str:
    healed = sum(birth.kind == "operation" for birth in outcome.births)
    checked = "The output is" if loss is None else "The loss and all gradients are"
    more = f" {healed} operations made NaN or Inf that was removed again." if healed else ""
    return f"No NaN or Inf: {checked} finite in this run of {outcome.operations} operations.{more}"
