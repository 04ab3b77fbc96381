"""How a step began: its calls of the model, its random state, its buffers, so that it can be run again and undone."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from stethoscope._randomness import RandomState, random_state
from stethoscope._tree import callable_parts, size_of, tensors
from stethoscope.audits._nonfinite_call import Call, autocasts
from stethoscope.probes._hook import Hook, takes_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.utils.hooks import RemovableHandle

MAX_CALLS = 16
"""Outermost calls of one step that are kept, with their inputs, until the step ends."""
MAX_BYTES = 2**30
"""Inputs of one step that are kept, in bytes: micro-batches would pile up on the device otherwise."""
MAX_GRADIENT = 2**26
"""Largest output, in bytes, whose gradient is kept until the step ends: autograd would free it earlier."""
SMALL = 65536
"""Values up to which a buffer is copied at every step; a larger one only when its version counter says that it changed.
(BatchNorm's kernels write without counting, but no layer has so many channels.)"""


class Before:
    """Keeps the beginning of the step under way.

    Inputs are kept by reference: what changes them in place during the step changes what would be run again.

    Args:
        model: unwrapped. Its outermost calls are followed, and those of its children that are called without it, as
            Lightning's training_step does.
        failed: takes an error of ours, which must not reach the model's call.
    """

    def __init__(self, model: nn.Module, failed: Callable[[Exception], None]) -> None:
        self.failed = failed
        self.calls: list[Call] = []
        self.too_large = 0
        """Calls of this step that were not kept, for the size of their inputs or their number."""
        self.replicated = False
        """Whether a call has come through DistributedDataParallel, which may be around the model without our knowing."""
        self._owners = [
            (module._buffers, name)  # noqa: SLF001 - the module's own dictionary, as a buffer may be replaced
            for module in model.modules()
            if takes_hooks(module)  # a scripted part lets nobody into its buffers
            for name in module._buffers  # noqa: SLF001
        ]
        self._kept: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._begun = self._busy = False
        self._seen = False  # whether a call of this step was
        self._random: RandomState | None = None
        self._bytes = 0
        self._versions: list[tuple[Tensor, int]] = []  # of the inputs, when they were taken
        self._kept_call: Call | None = None  # the one under way
        self._devices = sorted({each.device for each in model.parameters() if each.device.type == "cuda"}, key=str)
        self._model, self._depth = model, 0
        self._handles = self._follow(model)
        # hooks on all children cost a small model several percent, and most models are called as a whole
        self._spare = [handle for child in callable_parts(model) for handle in self._follow(child)]
        self._begin()

    def _follow(self, module: nn.Module) -> list[RemovableHandle]:
        if not takes_hooks(module):
            return []
        return [
            module.register_forward_pre_hook(_Entry(self), with_kwargs=True, prepend=True),
            module.register_forward_hook(_Exit(self), always_call=True),
        ]

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take note of a call; the first one of a step begins it."""
        self.replicated |= DistributedDataParallel._active_ddp_module is not None  # noqa: SLF001 - nobody else knows
        if _is_redirected(module):
            return
        self._depth += 1
        if self._depth > 1 or self._busy or not module.training or _elsewhere():
            return
        state = None
        if not self._seen:
            self._seen = True
            state = self._begin()
        inputs = [each for _, each in tensors((args, kwargs))]
        self._bytes += sum(map(size_of, inputs))
        if len(self.calls) == MAX_CALLS or self._bytes > MAX_BYTES:
            self.too_large += 1
            return
        state = state or random_state(self._devices)
        call = Call(module, args, kwargs, torch.is_grad_enabled(), autocasts(), state, {})
        self.calls.append(call)
        self._kept_call = call
        self._versions += [(each, each._version) for each in inputs if not each.is_inference()]  # noqa: SLF001 - no copy

    def _begin(self) -> RandomState:
        self._begun = True
        self._random = random_state(self._devices)
        self._keep_buffers()
        return self._random

    def leave(self, output: object) -> None:
        """Take note of a call's end, and of the gradients that its outputs will get."""
        self._depth = max(self._depth - 1, 0)
        if self._depth or self._kept_call is None:
            return
        call, self._kept_call = self._kept_call, None
        if not call.grad or torch.compiler.is_compiling():
            return
        for path, each in tensors(output):
            # a leaf would keep the hook beyond this step
            if each.requires_grad and not each.is_leaf and not each.is_nested and size_of(each) <= MAX_GRADIENT:
                each.register_hook(_Gradient(self, call.grad_outputs, path))  # type: ignore[no-untyped-call]

    def limits(self) -> str:
        """Say which calls cannot be repeated as they were, `""` if all can."""
        said: list[str] = []
        if self.too_large:
            said.append(
                f"{self.too_large} calls of the model were not kept (at most {MAX_CALLS} per step, with inputs of "
                f"{MAX_BYTES / 2**20:.0f} MiB together)"
            )
        if any(each._version != version for each, version in self._versions):  # noqa: SLF001
            said.append("an input was changed in place after the model had been called with it")
        return "; ".join(said)

    def rewind(self) -> None:
        """Put buffers and random states back to the beginning of the step."""
        if self._random is None or not self._begun:
            return
        with torch.no_grad():
            for i, (owner, name) in enumerate(self._owners):
                if i in self._kept:
                    buffer, copy, _ = self._kept[i]
                    buffer.data.copy_(copy)
                    owner[name] = buffer
        self._random.put()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not follow calls inside."""
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def forget(self) -> None:
        """End the step: let go of its inputs."""
        seen, self._seen = self._seen, False
        if self.calls and all(call.module is self._model for call in self.calls):
            while self._spare:
                self._spare.pop().remove()
        self.calls, self._versions, self._kept_call = [], [], None
        self._bytes = self._depth = self.too_large = 0
        self._begun = False
        if not seen:
            self._begin()  # compiled calls are not seen: a step of them begins where the last one ends

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in (*self._handles, *self._spare):
            handle.remove()
        self.forget()
        self._kept.clear()

    def _keep_buffers(self) -> None:
        to: list[Tensor] = []
        source: list[Tensor] = []
        for i, (owner, name) in enumerate(self._owners):
            buffer = owner.get(name)
            if buffer is None or is_lazy(buffer):
                continue
            kept = self._kept.get(i)
            if kept is None or kept[0] is not buffer:
                self._kept[i] = buffer, buffer.detach().clone(), buffer._version  # noqa: SLF001 - cheaper than a copy
            elif buffer.numel() <= SMALL or buffer._version != kept[2]:  # noqa: SLF001
                self._kept[i] = buffer, kept[1], buffer._version  # noqa: SLF001
                to.append(kept[1])
                source.append(buffer.detach())
        if to:
            torch._foreach_copy_(to, source)  # one call for all BatchNorm layers


class _Entry(Hook):
    """Tells `Before` of calls."""

    __slots__ = ("_before",)

    def __init__(self, before: Before) -> None:
        self._before = before

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None and not torch.compiler.is_compiling():
            try:
                self._before.enter(module, args, kwargs)
            except Exception as error:
                self._before.failed(error)


class _Exit(Hook):
    """Tells `Before` that they end."""

    __slots__ = ("_before",)

    def __init__(self, before: Before) -> None:
        self._before = before

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            try:
                self._before.leave(output)
            except Exception as error:
                self._before.failed(error)


class _Gradient(Hook):
    """Keeps what the backward pass hands to an output; several backward passes add up."""

    __slots__ = ("_before", "_kept", "_path")

    def __init__(self, before: Before, kept: dict[str, Tensor], path: str) -> None:
        self._before, self._kept, self._path = before, kept, path

    def __call__(self, gradient: Tensor) -> None:
        try:
            kept = self._kept.get(self._path)
            self._kept[self._path] = gradient.detach() if kept is None else kept + gradient.detach()
        except Exception as error:
            self._before.failed(error)


def _elsewhere() -> bool:
    """Whether a call cannot be repeated by itself: checkpointing's second forward, or one inside of vmap or grad."""
    return torch._C._current_graph_task_id() != -1 or torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001 - no other way to ask


def _is_redirected(module: nn.Module) -> bool:
    """Whether Lightning has put training_step in the place of forward, to lead it through DDP: no call of the model."""
    return getattr(module.__dict__.get("forward"), "__qualname__", "").startswith("_ForwardRedirection.")
