"""Looks at the loss and at all gradients before the optimizer writes, and acts when something is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stethoscope._before import Before
from stethoscope._optimizer import bad_settings, bad_write
from stethoscope._record import Finding, FindingsError
from stethoscope._transfer import fetch
from stethoscope._tree import plain
from stethoscope.audits._nonfinite import examine
from stethoscope.audits._nonfinite_run import Task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer

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
        notes: where findings go.
        deliver: sends them on their way.
        paused: what must not look on while the step is repeated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        act: Act,
        replay: Callable[[Any], Tensor] | None,
        notes: Notes,
        deliver: Callable[[], None],
        paused: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.skipped = 0
        self.idle = 0
        self.loss: Tensor | None = None
        self.batch: Any = None
        self._model, self._act, self._replay = model, act, replay
        self._notes, self._deliver, self._paused = notes, deliver, paused
        self._names = {id(each): plain(name) for name, each in model.named_parameters()}
        self._wrote: set[int] = set()  # optimizers whose last write was made from finite gradients
        self._asked = self._bad = self._was_bad = self._was_idle = False
        self._step = 0
        self._before = Before(model)
        self._handles = [optimizer.register_step_pre_hook(self._judge) for optimizer in optimizers]

    # -- the optimizer is about to write -----------------------------------------------------------------------------

    def _judge(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._asked = True
        if getattr(optimizer, "grad_scale", None) is not None:
            return None  # a fused optimizer under GradScaler: the scaler decides, on the device
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            self._look(optimizer, self.loss)
            return None

        def guarded() -> Any:
            loss = closure()
            self._look(optimizer, loss if isinstance(loss, Tensor) else None)
            return loss

        return ((args[0], guarded, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": guarded})

    def _look(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """Take one fused norm of everything; on a hit, look closely, repeat, report, act."""
        owned = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        try:
            value, bad = _bad_gradients(owned, loss)
            known = bad_settings(optimizer) if owned else []
            if value is None and not bad and not known:
                self._wrote.add(id(optimizer))
                return
            names = [self._names.get(id(each), "a parameter outside of the model") for each in bad]
            findings = self._explain(optimizer, value, names, known)
        except Exception as error:
            self._notes.disabled(self, "guard", error)
            self.detach()
            return
        if self._act == "skip":
            for each in owned:
                each.grad = None
        self._wrote.discard(id(optimizer))
        first, self._bad = not self._bad, True  # of several optimizers that share a bad step
        self.skipped += first
        if first and not self._was_bad:
            self._notes.pending += findings
            self._deliver()
        if self._act == "raise":
            self._end()
            raise FindingsError("\n".join(map(str, findings)), tuple(findings))

    # -- what went wrong ---------------------------------------------------------------------------------------------

    def _explain(self, optimizer: Optimizer, loss: float | None, bad: list[str], known: list[Finding]) -> list[Finding]:
        """Put the state of the step's beginning back and run it again, for a culprit."""
        self._before.rewind()
        if (self._was_bad or self._bad) and self._act == "skip":
            return []
        if not known:
            with self._before.paused(), self._paused():
                report = self._audit()
            known = list(report.findings) if report and not report.ok else [self._finding(loss, bad, report)]
            name = self._spoilt(report) if report and id(optimizer) in self._wrote else None
            if name is not None:
                known = [bad_write(optimizer, self._parameter(name), name)]
        done = "The step was skipped." if self._act == "skip" else "The optimizer has not written."
        given = {"guard": self._act, "loss": str(loss), "gradients_at_write": bad[:100]}
        return [
            replace(each, step=self._step, message=f"{each.message} {done}", evidence={**given, **each.evidence})
            for each in known
        ]

    def _spoilt(self, report: NonFiniteReport) -> str | None:
        """Name a parameter that the last write has left non-finite, when it explains what the audit has seen."""
        if (
            report.origin == "operation"
        ):  # a step too long leaves weights that overflow beside those that have overflowed
            return next((self._names[id(each)] for each in self._model.parameters() if _spoilt(each)), None)
        return report.parameter if report.origin == "parameter" else None

    def _parameter(self, name: str) -> Tensor:
        return next(each for each in self._model.parameters() if self._names[id(each)] == name)

    def _audit(self) -> NonFiniteReport | None:
        """Return the first report that finds something, else the last one."""
        report: NonFiniteReport | None = None
        if self._replay is not None and self.batch is not None:
            replay = self._replay
            with torch.enable_grad():
                return examine(Task(self._model, replay, (self.batch,), {}, loss=_itself, whole=True))
        for call in self._before.calls:
            with call.modes():
                report = examine(Task(self._model, call.module, call.args, call.kwargs))
            if not report.ok:
                return report
        return report

    def _finding(self, loss: float | None, bad: list[str], report: NonFiniteReport | None) -> Finding:
        if loss is not None:
            again = (
                "repeated, the forward pass is finite"
                if self._replay is None
                else "repeated, the step is finite: it differs"
            )
            return Finding(
                "nonfinite-loss",
                "error",
                f"The loss is {loss}; {again if report else 'no call of the model was seen in this step'}.",
                "Look at the loss function: log, sqrt or a division of zero, a target out of range. "
                "Monitor(replay=fn) and monitor.observe(batch) before optimizer.step() name the operation.",
                evidence={"origin": "loss"},
            )
        one = len(bad) == 1
        which = f"The gradient of {bad[0]!r} is" if one else f"{len(bad)} gradients ({', '.join(bad[:3])}, ...) are"
        return Finding(
            "nonfinite-gradient",
            "error",
            f"{which} not finite before the optimizer writes, though the forward pass, repeated, is.",
            "Monitor(replay=fn) and monitor.observe(batch) before optimizer.step() name the operation. After "
            "clip_grad_norm_ one bad gradient has spoiled all; look before it.",
            module=bad[0].rpartition(".")[0] if one else "",
            evidence={"origin": "backward", "parameter": bad[0] if one else ""},
        )

    # -- the step ends -----------------------------------------------------------------------------------------------

    def end_step(self, step: int) -> None:
        """Close a step: say when nothing was written for another reason, and let go of its batch."""
        idle = bool(self._handles) and not self._asked
        self.idle += idle
        if idle and not self._was_idle:
            self._notes.pending.append(
                Finding(
                    "step-skipped",
                    "info",
                    f"No optimizer has written in step {step}, and not because of the guard: GradScaler skips steps whose "
                    "gradients overflow, which is normal at the start of a training in fp16.",
                    "Nothing, unless it goes on: then the scale has reached its floor and the gradients are really bad.",
                    step,
                    evidence={"by": "scaler"},
                )
            )
        self._was_bad, self._was_idle = self._bad, idle
        self._step = step + 1
        self._end()

    def _end(self) -> None:
        self._asked = self._bad = False
        self.loss = self.batch = None
        self._before.forget()

    def close(self) -> None:
        """Remove all hooks and say how many steps were skipped."""
        self.detach()
        if self.skipped and self._act == "skip":
            self._notes.pending.append(
                Finding(
                    "step-skipped",
                    "info",
                    f"The guard has skipped {self.skipped} of {self._step} steps; {self.idle} more were not written by "
                    "any optimizer (GradScaler).",
                    "The learning rate's schedule and the step counter went on in these steps.",
                    self._notes.step,
                    evidence={"by": "guard", "skipped": self.skipped, "idle": self.idle, "steps": self._step},
                )
            )

    def detach(self) -> None:
        """Remove all hooks."""
        while self._handles:
            self._handles.pop().remove()
        self._before.detach()


def _spoilt(tensor: Tensor) -> bool:
    return not fetch([torch.isfinite(tensor.detach()).all()])[0]


def _itself(loss: Any) -> Any:
    return loss


def _bad_gradients(owned: Sequence[Tensor], loss: Tensor | None) -> tuple[float | None, list[Tensor]]:
    """Return the loss if it is not finite, and the parameters whose gradient is not. Waits once, twice on a hit."""
    gradients = [_dense(each.grad) for each in owned if each.grad is not None]
    looked: list[Tensor] = []
    if gradients:
        looked += torch._foreach_norm(gradients, 2, dtype=torch.float32)  # noqa: SLF001 - what clip_grad_norm_ uses
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
