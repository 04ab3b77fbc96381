"""One outermost call of a step, as it is repeated: by the guard right away, from an incident bundle later."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from stethoscope._tree import tensors
from stethoscope.audits._nonfinite_run import Task, scalar
from stethoscope.audits._nonfinite_tensor import flags
from stethoscope.audits._untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stethoscope._randomness import RandomState


class Call(NamedTuple):
    """What was called, with what, in which modes.

    Args:
        module: what was called, or a method of it.
        args, kwargs: by reference.
        grad: whether gradients were on.
        autocast: devices and dtypes of the autocasts around it.
        random: as it was when the call began; None where that is not known.
        grad_outputs: what the backward pass has handed to its outputs, by their paths: d loss / d output.
    """

    module: nn.Module | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    random: RandomState | None
    grad_outputs: dict[str, Tensor]

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Set random state, grad mode and autocast as they were."""
        if self.random is not None:
            self.random.put()
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield

    @property
    def spoilt(self) -> bool:
        """Whether what comes back from the loss, or from a later call, is not finite already. Waits for the device."""
        return len(self._usable()) < len(self.grad_outputs)

    def _usable(self) -> dict[str, Tensor]:
        # an output that the module itself goes on with is handed a bad gradient by the module itself
        return {path: each for path, each in self.grad_outputs.items() if not any(flags(each))}

    def forward(self, model: nn.Module) -> Task:
        """Return the task that repeats the call."""
        return Task(model, self.module, self.args, self.kwargs)

    def backward(self, model: nn.Module) -> Task:
        """Return the task that repeats it and hands the same finite gradients back, whatever the loss was."""
        return Task(model, self.module, self.args, self.kwargs, loss=self._against)

    def _against(self, output: Any) -> Tensor:
        # in float64, as the sum itself must not overflow; -Inf of a mask is handed nothing back
        given = self._usable()
        terms = [
            (torch.nan_to_num(each.double(), posinf=0.0, neginf=0.0) * given[path].double()).sum()
            for path, each in tensors(output, depth=8)
            if path in given
        ]
        return torch.stack(terms).sum() if terms else torch.zeros((), dtype=torch.float64)


def grad_outputs(task: Task, call: Call) -> dict[str, Tensor]:
    """Return the gradients of a task's loss with respect to the outputs of its call; the model is left as it was."""
    if task.loss is None or isinstance(task.loss, Tensor):
        return {}
    with untouched(task.model.forward, task.call, task.loss), call.modes(), torch.enable_grad():
        output = task.call(*task.args, **task.kwargs)
        named = {path: each for path, each in tensors(output, depth=8) if each.requires_grad and not each.is_nested}
        found = torch.autograd.grad(scalar(task.loss(output)), list(named.values()), allow_unused=True)
    return {path: each for path, each in zip(named, found, strict=True) if each is not None}


def autocasts() -> tuple[tuple[str, torch.dtype], ...]:
    """Return devices and dtypes of the autocasts that are on."""
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
