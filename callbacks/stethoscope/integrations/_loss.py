"""The loss of a step: the tensors that `backward` was called on since the last one.

torch has no hook for that, so `torch.autograd.backward` and `scale` and `step` of `GradScaler` are wrapped, and restored by `close`.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

if TYPE_CHECKING:
    from collections.abc import Callable


class Losses:
    """Collects losses, without waiting for the device, until the step is over with the graphs that say what they were made of.

    The loss of a step is the *sum* of what backward was called on: that is what the optimizer's gradient belongs to. So a loss
    that the script divides by the number of accumulated batches is their mean, and the two losses of a discriminator are
    one. What `GradScaler.scale` has multiplied is taken as it was before, and a step that `GradScaler.step` leaves out, since
    its gradients have overflowed, takes its loss with it.

    Args:
        failed: takes an error of ours, once; there is no loss from there on.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.stepping = False
        """Whether an optimizer is at work: then only the first call counts, since LBFGS searches along a line."""
        self._pending: list[Tensor] = []
        self._failed, self._off = failed, False
        self._taken = False
        self._unscaled: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._undo: list[Callable[[], None]] = []
        try:
            self._wrap(torch.autograd, "backward", self._backward)
            self._wrap(GradScaler, "scale", self._scale)
            self._wrap(GradScaler, "step", self._scaled_step)
        except BaseException:
            self.close()
            raise

    def take(self) -> Tensor | None:
        """Return the loss of the step that is over, with its graph; optimizers that step one after the other share its value."""
        self._taken = True
        self._unscaled.clear()
        loss = self.peek()
        self._pending = [] if loss is None else [loss.detach()]
        return loss

    def peek(self) -> Tensor | None:
        """Return the loss of the step under way, on its device; None where backward was not called."""
        if len(self._pending) > 1:
            device = self._pending[0].device
            alike = [each.reshape(()).float() for each in self._pending if each.device == device]
            self._pending = [torch.stack(alike).sum()]
        return self._pending[0] if self._pending else None

    def close(self) -> None:
        """Put back what was wrapped, unless somebody has wrapped it again."""
        while self._undo:
            self._undo.pop()()

    # -- what is wrapped ---------------------------------------------------------------------------------------------

    def _wrap(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        wrapper = functools.wraps(original)(make(original))

        def undo() -> None:
            if getattr(owner, name) is wrapper:
                setattr(owner, name, original)

        self._undo.append(undo)  # before there is anything to undo
        setattr(owner, name, wrapper)

    def _backward(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            # gradients of inputs only belong to an attack or a penalty, not to the step
            if isinstance(tensors, Tensor) and kwargs.get("inputs") is None:
                self._note(self._add, tensors)
            return original(tensors, *args, **kwargs)

        return backward

    def _scale(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def scale(scaler: GradScaler, outputs: Any) -> Any:
            scaled = original(scaler, outputs)
            if isinstance(scaled, Tensor) and isinstance(outputs, Tensor):
                self._note(self._remember, scaled, outputs)
            return scaled

        return scale

    def _scaled_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def step(scaler: GradScaler, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(scaler, *args, **kwargs)
            finally:
                self._taken = True

        return step

    def _note(self, call: Callable[..., None], *args: Tensor) -> None:
        """Take something down for us in the middle of what the script calls."""
        if self._off:
            return
        try:
            call(*args)
        except Exception as error:  # instrumentation never stops a training
            self._off, self._pending = True, []
            self._failed(error)

    def _remember(self, scaled: Tensor, loss: Tensor) -> None:
        self._unscaled[id(scaled)] = weakref.ref(scaled), loss

    def _add(self, loss: Tensor) -> None:
        inner = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - activation checkpointing calls backward in backward
        if inner or loss.numel() != 1 or not loss.is_floating_point() or torch.compiler.is_compiling():
            return
        if self._taken:
            self._pending, self._taken = [], False
        elif self.stepping and self._pending:
            return
        scaled = self._unscaled.get(id(loss))
        self._pending.append(scaled[1] if scaled and scaled[0]() is loss else loss)
