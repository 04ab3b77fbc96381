"""Looks at the loss and at all gradients before the optimizer writes, and acts when something is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stethoscope._before import MAX_CALLS, Before
from stethoscope._closures import Closures
from stethoscope._optimizer import bad_settings, bad_write
from stethoscope._parts import is_asked
from stethoscope._record import Finding, FindingsError, Record
from stethoscope._shards import local
from stethoscope._transfer import fetch
from stethoscope._tree import plain
from stethoscope._unexplained import elsewhere, is_elsewhere, unexplained
from stethoscope.audits._incident import Incident
from stethoscope.audits._nonfinite_repeat import repeat_batches, repeat_calls
from stethoscope.audits._nonfinite_run import scalar

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch.optim import Optimizer

    from stethoscope._agreement import Agreement
    from stethoscope._incidents import Kept
    from stethoscope._parts import Notes
    from stethoscope.audits._nonfinite import NonFiniteReport

Act = Literal["raise", "skip"]


class Guard:
    """Decides before each write of an optimizer; waits for the device once per step.

    Args:
        model: unwrapped.
        optimizers: whose steps are guarded.
        act: `"raise"` leaves the step by `FindingsError`; `"skip"` takes the gradients away, so that nothing is written.
        replay: `fn(batch) -> loss`, to run a bad step again exactly; else its outermost calls are repeated.
        keep: writes an incident bundle where a folder is known, and says what became of it.
        notes: where findings go.
        deliver: sends them on their way.
        agreement: of several ranks, makes one decision for all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        act: Act,
        replay: Callable[[Any], Any] | None,
        keep: Callable[[Incident], Kept],
        notes: Notes,
        deliver: Callable[[], None],
        agreement: Agreement,
    ) -> None:
        self.skipped = 0
        self.idle = 0
        self.step = 0
        """The step under way."""
        self._loss: Tensor | None = None
        self._batches: list[Any] = []
        self._model, self._act, self._replay, self._keep = model, act, replay, keep
        self._notes, self._deliver, self._optimizers, self._agreement = notes, deliver, optimizers, agreement
        self._names = {id(each): plain(name) for name, each in model.named_parameters()}
        self._wrote: set[int] = set()  # optimizers whose last write was made from finite gradients
        self._asked = self._bad = self._was_bad = self._was_idle = False
        self._off = False
        self._before = Before(model, self._give_up)
        self._closures = Closures(optimizers, self._look, self._give_up)
        self._handles = [optimizer.register_step_pre_hook(self._judge) for optimizer in optimizers]

    def observe(self, batch: Any, given: Mapping[str, Any]) -> None:
        """Take what the loop hands over: each micro-batch of the step, and the last loss."""
        if batch is not None and not any(each is batch for each in self._batches) and len(self._batches) < MAX_CALLS:
            self._batches.append(batch)
        if "loss" in given:
            try:
                self._loss = scalar(given["loss"])
            except ValueError:  # not one number: the gradients will tell
                self._loss = None

    # -- the optimizer is about to write -----------------------------------------------------------------------------

    def _judge(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._off:
            return None
        try:
            return self._decide(optimizer, args, kwargs)
        except Exception as error:
            if is_asked(error):
                raise
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        """Say that the guard has failed, and let the step be written; torch goes through the hooks, so they stay until it ends."""
        if self._off:
            return
        self._off = True
        self._notes.disabled(self, "guard", error)

    def _decide(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._asked = True
        if getattr(optimizer, "grad_scale", None) is not None and self._first(self._bad_loss() is not None) is None:
            return None  # a fused optimizer under GradScaler: the scaler decides about gradients, on the device
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._closures.enter(optimizer)
            self._look(optimizer, self._loss)
            return None
        guarded = self._closures.wrap(optimizer, closure)
        return ((args[0], guarded, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": guarded})

    def _look(self, optimizer: Optimizer, loss: Tensor | None) -> bool:
        """Take one fused norm of everything; on a hit, look closely, repeat, report, act. Return whether it hit."""
        if self._off:
            return False
        owned = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        try:
            value, bad = _bad_gradients(owned, loss)
            known = bad_settings(optimizer) if owned else []
            where = self._agree(value is not None or bool(bad or known))
            if where is None:
                self._wrote.add(id(optimizer))
                return False
            if value is None and not bad and not known:
                known = [elsewhere(where)]
            names = [self._names.get(id(each), "a parameter outside of the model") for each in bad]
        except Exception as error:
            self._give_up(error)
            return False
        if self._act == "skip":
            for each in owned:
                each.grad = None
        stop = self._hit(optimizer, value, names, known)
        if stop is not None:
            self._closures.undo(optimizer)
            self._end()
            self._asked = True  # a loop that catches it may close the step, in which nobody else has kept the optimizer
            raise stop
        return True

    def _agree(self, bad: bool) -> int | None:
        """Return the lowest rank on which something is not finite; None where nothing is, or where the guard had to go."""
        self._agreement.shared |= self._before.replicated
        return self._agreement.first(bad)

    def _first(self, bad: bool) -> int | None:
        """The same, outside of a look: without the others, the guard goes."""
        try:
            return self._agree(bad)
        except Exception as error:
            self._give_up(error)
            return None

    def _hit(
        self, optimizer: Optimizer, loss: float | None, names: list[str], known: list[Finding]
    ) -> FindingsError | None:
        """Explain and report; return what to raise, if that is asked for."""
        try:
            findings = self._explain(optimizer, loss, names, known)
        except Exception as error:  # the decision stands, whatever goes wrong when it is explained
            if self._notes.strict:
                raise
            findings = [
                self._unexplained(loss, names, None, f"its cause is not known ({type(error).__name__}: {error})")
            ]
        self._wrote.discard(id(optimizer))
        first, self._bad = not self._bad, True  # of several optimizers that share a bad step
        self.skipped += first
        if first and not self._was_bad and not is_elsewhere(findings):  # that rank tells rank 0 more
            self._notes.pending += findings
            self._deliver()
        return FindingsError("\n".join(map(str, findings)), tuple(findings)) if self._act == "raise" else None

    def _bad_loss(self) -> float | None:
        """Return the loss if it is not finite. Waits for the device."""
        value = 0.0 if self._loss is None else fetch([self._loss.detach().float()])[0]
        return None if math.isfinite(value) else value

    # -- what went wrong ---------------------------------------------------------------------------------------------

    def _explain(self, optimizer: Optimizer, loss: float | None, bad: list[str], known: list[Finding]) -> list[Finding]:
        """Put the state of the step's beginning back and run it again, for a culprit."""
        self._before.rewind()
        if (self._was_bad or self._bad) and self._act == "skip":
            return []
        report: NonFiniteReport | None = None
        repeated = not known and not self._agreement.split
        if not known and not repeated:
            trouble = "parameters are split over ranks, and running the step again would need all of them at once"
            known = [self._unexplained(loss, bad, None, trouble)]
        if repeated:
            with self._before.paused(), self._agreement.alone():
                report, trouble = self._audit()
            known = (
                list(report.findings) if report and not report.ok else [self._unexplained(loss, bad, report, trouble)]
            )
            name = self._spoilt(report) if report and id(optimizer) in self._wrote else None
            if name is not None:
                known = [bad_write(optimizer, self._parameter(name), name)]
            self._before.rewind()
        done = "The step was skipped." if self._act == "skip" else "The optimizer has not written."
        given = {"guard": self._act, "loss": str(loss), "gradients_at_write": bad[:100]}
        found = [
            replace(each, step=self.step, message=f"{each.message} {done}", evidence={**given, **each.evidence})
            for each in known
        ]
        return self._with_incident(found, report, loss) if repeated else found

    def _spoilt(self, report: NonFiniteReport) -> str | None:
        """Name a parameter that the last write has left non-finite, when it explains what the audit has seen."""
        if report.origin == "parameter" and report.parameter:
            # it may also be finite and absurd
            return report.parameter if _spoilt(self._parameter(report.parameter)) else None
        if report.origin == "operation":
            # a step too long leaves weights that overflow beside those that have overflowed
            return next((self._names[id(each)] for each in self._model.parameters() if _spoilt(each)), None)
        return None

    def _parameter(self, name: str) -> Tensor:
        return next(each for each in self._model.parameters() if self._names[id(each)] == name)

    def _audit(self) -> tuple[NonFiniteReport | None, str]:
        """Return the first report that finds something, else the last one; and what kept the step from being repeated."""
        calls = self._before.calls
        try:
            if self._replay is not None and self._batches:
                batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((batch,), {}) for batch in self._batches]
                return repeat_batches(self._model, self._replay, batches, calls), ""
            return repeat_calls(self._model, calls), self._before.limits()
        except Exception as error:  # the decision stands, whatever the user's code does when it is run again
            return None, f"run again, the step raised {type(error).__name__}: {error}"

    def _unexplained(self, loss: float | None, bad: list[str], report: NonFiniteReport | None, trouble: str) -> Finding:
        spoilt = report is not None and any(call.spoilt for call in self._before.calls)
        whole = self._replay is not None and bool(self._batches)
        found = unexplained(loss, bad, repeated=report is not None, whole=whole, spoilt=spoilt, trouble=trouble)
        if loss is None and self._agreement.several:
            first = "Gradients were averaged over ranks: look first at what another rank says of this step. "
            found = replace(found, advice=f"{first}{found.advice}")
        return found

    def _with_incident(self, found: list[Finding], report: NonFiniteReport | None, loss: float | None) -> list[Finding]:
        """Write a bundle where a folder is known, and say in the findings where it is."""
        calls, batches = tuple(self._before.calls), tuple(self._batches)
        report = report if report is not None and report.origin is not None else None
        limits = tuple(filter(None, [self._before.limits()]))
        incident = Incident(self._model, found, report, calls, batches, loss, self.step, left_out=limits)
        kept = self._keep(incident)
        if not kept.text:
            return found
        return [
            replace(each, message=f"{each.message} {kept.text}", evidence={**each.evidence, "incident": kept.folder})
            for each in found
        ]

    def count(self, step: int, rank: int) -> list[Record]:
        """Return how many steps were skipped so far, once any was."""
        return [Record("guard/skipped", float(self.skipped), step, rank=rank, source="step")] if self.skipped else []

    # -- the step ends -----------------------------------------------------------------------------------------------

    def end_step(self, step: int) -> FindingsError | None:
        """Close a step: say when nothing was written for another reason, and let go of its batch; return what to raise.

        Where GradScaler has kept the optimizer from being asked, a loss that is not finite is a fault all the same: scaling
        comes after the loss, and what the forward pass has written into buffers is there.
        """
        if self._off:
            self.detach()
        idle, error = bool(self._handles) and not self._asked, None
        loss = self._bad_loss() if idle else None
        if idle and (where := self._first(loss is not None)) is not None:
            known = [] if loss is not None else [elsewhere(where)]
            wrote = (each for each in self._optimizers if id(each) in self._wrote)
            idle, error = False, self._hit(next(wrote, self._optimizers[0]), loss, [], known)
        self.idle += idle
        if idle and not self._was_idle:
            self._notes.pending.append(
                Finding(
                    "step-skipped",
                    "info",
                    f"No optimizer has written in step {step}, and not because of the guard: GradScaler skips steps whose "
                    "gradients overflow, which is normal at the start of a training in fp16.",
                    "Nothing, unless it goes on: then the scale has reached its floor and the gradients are really bad. Without "
                    "a GradScaler: call monitor.step once per optimizer step, after optimizer.step().",
                    step,
                    evidence={"by": "scaler"},
                )
            )
        self._was_bad, self._was_idle = self._bad, idle
        self.step = step + 1
        self._end()
        return error

    def _end(self) -> None:
        self._asked = self._bad = False
        self._loss, self._batches = None, []
        self._before.forget()

    def close(self) -> None:
        """Remove all hooks and say how many steps were skipped."""
        self.detach()
        if self.skipped and self._act == "skip":
            self._notes.pending.append(
                Finding(
                    "step-skipped",
                    "info",
                    f"The guard has skipped {self.skipped} of {self.step} steps"
                    f"{f'; {self.idle} more were not written by any optimizer (GradScaler)' if self.idle else ''}.",
                    "The learning rate's schedule and the step counter went on in these steps.",
                    self._notes.step,
                    evidence={"by": "guard", "skipped": self.skipped, "idle": self.idle, "steps": self.step},
                )
            )

    def detach(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()
        self._closures.detach()
        self._before.detach()


def check_guard(guard: object, optimizer: object, replay: object) -> None:
    """Accept the arguments of `Monitor` that are about a guard.

    Raises:
        ValueError: they are none, or do not go together.
    """
    if guard not in (None, "raise", "skip"):
        raise ValueError(f"guard must be None, 'raise' or 'skip', got {guard!r}.")
    if (guard and optimizer is None) or (replay and not guard):
        raise ValueError("guard needs the optimizer whose writes it looks at, and replay needs a guard.")


def _spoilt(tensor: Tensor) -> bool:
    return not fetch([torch.isfinite(tensor.detach()).all()])[0]


def _bad_gradients(owned: Sequence[Tensor], loss: Tensor | None) -> tuple[float | None, list[Tensor]]:
    """Return the loss if it is not finite, and the parameters whose gradient is not. Waits once, twice on a hit."""
    gradients = [_dense(local(each.grad)) for each in owned if each.grad is not None]
    looked: list[Tensor] = []
    if gradients:
        # half precision would overflow in its own squares, and double cannot be narrowed
        wide = torch.float64 if any(each.dtype is torch.float64 for each in gradients) else torch.float32
        looked += torch._foreach_norm(gradients, 2, dtype=wide)  # noqa: SLF001 - what clip_grad_norm_ uses
    if loss is not None and loss.numel() == 1:
        looked.append(loss.detach().reshape(()).float())
    if not looked:
        return None, []
    numbers = fetch(looked)
    value = numbers.pop() if len(looked) > len(gradients) else 0.0
    suspects = [i for i, number in enumerate(numbers) if not math.isfinite(number)]
    if suspects:
        # a norm of large finite values overflows as well
        exact = fetch([torch.isfinite(gradients[i]).all() for i in suspects])
        suspects = [i for i, finite in zip(suspects, exact, strict=True) if not finite]
    return (None if math.isfinite(value) else value), [owned[i] for i in suspects]


def _dense(gradient: Tensor) -> Tensor:
    gradient = gradient.detach()
    if gradient.layout is torch.sparse_coo:
        gradient = gradient._values()  # noqa: SLF001 - values() wants a coalesced tensor
    if gradient.is_complex():
        gradient = torch.view_as_real(gradient)
    return gradient
