"""Validation, recognised by how a model is called, where a framework or script has no event for its beginning."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch

from stethoscope._aside import is_aside
from stethoscope._dropped import when_dropped
from stethoscope.probes._hook import Hook, takes_hooks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from stethoscope._monitor import Monitor


class Validation:
    """Enters the phase `val` when a module is called in eval mode without gradients, and leaves it when it is not any more.

    Args:
        monitor: whose phase it is.
        modules: whose calls to look at.
        due: asked when a validation would begin; False leaves it unrecorded.
        container: a module that is never called itself and shall have the mode of those that are.
    """

    def __init__(
        self,
        monitor: Monitor,
        modules: Sequence[nn.Module],
        due: Callable[[], bool] = lambda: True,
        container: nn.Module | None = None,
    ) -> None:
        self.off = False
        self.running = False
        # weakly, since this is what hooks hold: a monitor that is dropped goes, and they with it
        self._monitor, self._due, self._container, self._thread = ref(monitor), due, container, get_ident()
        self._phase = ExitStack()
        self._modules = [each for each in dict.fromkeys(modules) if takes_hooks(each)]
        self._handles = [
            each.register_forward_pre_hook(_Entry(self), with_kwargs=True, prepend=True) for each in self._modules
        ]
        when_dropped(monitor, [self.abandon])

    def called(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A module is called: in a validation or not?"""
        monitor = self._monitor()
        if self.off or monitor is None or get_ident() != self._thread or is_aside():
            return
        if self._container is not None:
            self._container.training = module.training
        validating = not module.training and not torch.is_grad_enabled()
        if self.running and not validating:
            with telling(module, args, kwargs):
                self.leave()
        elif validating and not self.running and self._due():
            with telling(module, args, kwargs):
                self._phase.enter_context(monitor.phase("val"))
            self.running = True

    def leave(self) -> None:
        """It is over, if there was one."""
        self.running = False
        self._phase.close()

    def close(self) -> None:
        """Leave, and let go of the modules."""
        self.abandon()
        try:
            self.leave()
        finally:
            for module in self._modules:
                tidy(module)
            self._modules, self._container = [], None

    def abandon(self) -> None:
        """Look at no call any more, and leave the phase as it is: in a fork it is the parent's to close."""
        self.off = True
        for handle in self._handles:
            handle.remove()


@contextmanager
def telling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Change the hooks of a module inside while its pre-hooks run: torch has made a list of these, but not of the others.

    A new one is told of the call under way. One that is gone is still called, and must be as it was put on.
    """
    tidy(module)
    hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs  # noqa: SLF001 - no other way
    before = {number: number in with_kwargs for number in hooks}
    yield
    for number, wants in before.items():
        if wants and number not in hooks:
            with_kwargs[number] = True
    for number, hook in list(hooks.items()):
        if number not in before:
            hook(module, args, kwargs) if number in with_kwargs else hook(module, args)


def tidy(module: nn.Module) -> None:
    """Forget how hooks that are gone were to be called."""
    hooks, with_kwargs = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs  # noqa: SLF001 - no other way
    for number in [number for number in with_kwargs if number not in hooks]:
        del with_kwargs[number]


class _Entry(Hook):
    __slots__ = ("_validation",)

    def __init__(self, validation: Validation) -> None:
        self._validation = validation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            self._validation.called(module, args, kwargs)
        except Exception:  # instrumentation never stops a training
            self._validation.off = True
            logging.getLogger("stethoscope").exception("Validations are not recognised any more.")
