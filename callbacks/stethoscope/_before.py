"""How a step began: its calls of the model, its random state, its buffers, so that it can be run again and undone."""

from __future__ import annotations

import random
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from stethoscope._tree import has_no_forward
from stethoscope.probes._hook import Hook, takes_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.utils.hooks import RemovableHandle

MAX_CALLS = 16
"""Outermost calls of one step that are kept, with their inputs, until the step ends."""
SMALL = 65536
"""Values up to which a buffer is copied at every step; a larger one only when its version counter says that it changed.
(BatchNorm's kernels write without counting, but no layer has so many channels.)"""


class Call(NamedTuple):
    """One outermost call: what was called, with what, in which modes."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool
    autocast: tuple[tuple[str, torch.dtype], ...]

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Set grad mode and autocast as they were."""
        with ExitStack() as stack:
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype))
            yield


class Before:
    """Keeps the beginning of the step under way.

    Inputs are kept by reference: what changes them in place during the step changes what would be run again.

    Args:
        model: unwrapped. Its outermost calls are followed, and those of its children that are called without it, as
            Lightning's training_step does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self._owners = [
            (module._buffers, name)  # noqa: SLF001 - the module's own dictionary, as a buffer may be replaced
            for module in model.modules()
            if takes_hooks(module)  # a scripted part lets nobody into its buffers
            for name in module._buffers  # noqa: SLF001
        ]
        self._kept: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._begun = self._busy = False
        self._seeds: tuple[Any, ...] = ()
        self._devices = sorted({each.device for each in model.parameters() if each.device.type == "cuda"}, key=str)
        self._model, self._depth = model, 0
        self._handles = self._follow(model)
        # hooks on all children cost a small model several percent, and most models are called as a whole
        self._spare = [handle for child in _children(model) for handle in self._follow(child)]
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
        self._depth += 1
        if self._depth > 1 or self._busy or not module.training or torch._C._current_graph_task_id() != -1:  # noqa: SLF001 - checkpointing
            return
        if not self.calls:
            self._begin()
        if len(self.calls) < MAX_CALLS:
            self.calls.append(Call(module, args, kwargs, torch.is_grad_enabled(), _autocast()))

    def _begin(self) -> None:
        self._begun = True
        self._seeds = self._random_states()
        self._keep_buffers()

    def leave(self) -> None:
        """Take note of a call's end."""
        self._depth = max(self._depth - 1, 0)

    def rewind(self) -> None:
        """Put buffers and random states back to the beginning of the step."""
        if not self._begun:
            return
        with torch.no_grad():
            for i, (owner, name) in enumerate(self._owners):
                if i in self._kept:
                    buffer, copy, _ = self._kept[i]
                    buffer.data.copy_(copy)
                    owner[name] = buffer
        python, numpy, torch_state, *cuda = self._seeds
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002 - the global state is what models draw from
        torch.set_rng_state(torch_state)
        for device, state in zip(self._devices, cuda, strict=True):
            torch.cuda.set_rng_state(state, device)

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
        seen = bool(self.calls)
        if self.calls and all(call.module is self._model for call in self.calls):
            while self._spare:
                self._spare.pop().remove()
        self.calls, self._depth = [], 0
        self._begun = False
        if not seen:
            self._begin()  # compiled calls are not seen: a step of them begins where the last one ends

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in (*self._handles, *self._spare):
            handle.remove()
        self.forget()
        self._kept.clear()

    def _random_states(self) -> tuple[Any, ...]:
        cuda = [torch.cuda.get_rng_state(device) for device in self._devices]
        return random.getstate(), np.random.get_state(), torch.get_rng_state(), *cuda  # noqa: NPY002 - see rewind

    def _keep_buffers(self) -> None:
        to: list[Tensor] = []
        source: list[Tensor] = []
        for i, (owner, name) in enumerate(self._owners):
            buffer = owner.get(name)
            if buffer is None:
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

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._before.enter(module, args, kwargs)


class _Exit(Hook):
    """Tells `Before` that they end."""

    __slots__ = ("_before",)

    def __init__(self, before: Before) -> None:
        self._before = before

    def __call__(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            self._before.leave()


def _children(model: nn.Module) -> list[nn.Module]:
    """Modules that may be called from outside without the model: its children, and those of lists without a forward."""
    found = []
    for child in model.children():
        found += _children(child) if has_no_forward(child) else [child]
    return found


def _autocast() -> tuple[tuple[str, torch.dtype], ...]:
    return tuple(
        (device, torch.get_autocast_dtype(device)) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )
