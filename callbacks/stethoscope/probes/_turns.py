"""Which parameters several optimizers step with one and the same gradient: part of `Optimizers`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from stethoscope.probes._hook import Hook

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle


class Turns:
    """The order in which optimizers step within one observed step, and whether a gradient arrives in between.

    An optimizer that steps within the step of another is a part of it (SAM, Lookahead). Two that each have a backward pass of their own
    share a parameter on purpose (an encoder with two losses).
    """

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self._holders: dict[int, set[int]] = {}  # parameter -> optimizers that have ever stepped it
        self._shared: dict[int, Tensor] = {}
        self._handles: list[RemovableHandle] = []
        self._forget()

    def _forget(self) -> None:
        self._inside: list[int] = []
        self._by: dict[int, int] = {}  # parameter -> the optimizer that has used its gradient
        self.twice: dict[int, int] = {}  # parameter -> optimizers that have used the same gradient

    def holds(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        """Remember that `optimizer` holds `parameters`."""
        for each in parameters:
            holders = self._holders.setdefault(id(each), set())
            holders.add(id(optimizer))
            if len(holders) > 1:
                self._shared[id(each)] = each

    def arm(self) -> None:
        """Listen for one step, where any parameter has several holders."""
        self.release()
        if self._shared:
            self._handles = [register_optimizer_step_pre_hook(_Begins(self))]
            for each in self._shared.values():
                if each.requires_grad and each.is_leaf:
                    self._handles.append(each.register_post_accumulate_grad_hook(_Arrives(self)))  # type: ignore[no-untyped-call]

    def begins(self, optimizer: Optimizer) -> None:
        self._inside.append(id(optimizer))

    def arrives(self, parameter: Tensor) -> None:
        self._by.pop(id(parameter), None)
        self.twice.setdefault(id(parameter), 1)

    def stepped(self, optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
        """Take in that `optimizer` has used the gradients of `parameters`."""
        if not self._handles:
            return
        outer = self._inside[0] if self._inside else id(optimizer)
        if self._inside and self._inside[-1] == id(optimizer):
            self._inside.pop()
        for each in parameters:
            if id(each) in self._shared and each.grad is not None:
                before = self._by.setdefault(id(each), outer)
                if before != outer:
                    self.twice[id(each)] = self.twice.get(id(each), 1) + 1
                    self._by[id(each)] = outer

    def release(self) -> None:
        """Stop listening."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._forget()


class _Begins(Hook):
    __slots__ = ("turns",)

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __call__(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            self.turns.begins(optimizer)
        except Exception as error:  # instrumentation never stops a training
            self.turns.failure = error


class _Arrives(Hook):
    __slots__ = ("turns",)

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def __call__(self, parameter: Tensor) -> None:
        try:
            self.turns.arrives(parameter)
        except Exception as error:
            self.turns.failure = error
