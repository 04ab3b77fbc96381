"""Validation, recognised by how a model is called, where a framework or script has no event for its beginning."""

from __future__ import annotations

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
    from torch.utils.hooks import RemovableHandle

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
        self._handles: list[RemovableHandle] = []
        when_dropped(monitor, [self.abandon])
        for each in dict.fromkeys(modules):
            if takes_hooks(each):
                self._handles.append(each.register_forward_pre_hook(_Entry(self), with_kwargs=True, prepend=True))

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
        self._container = None
        self.leave()

    def fail(self, error: Exception) -> None:
        """Recognise no validation any more, say so, and go back to training."""
        self.off = True
        monitor = self._monitor()
        if monitor is not None:
            monitor._notes.disabled(self, "integration's part", error)  # noqa: SLF001 - it is one of its parts
        self.leave()

    def abandon(self) -> None:
        """Look at no call any more, and leave the phase as it is: in a fork it is the parent's to close."""
        self.off = True
        for handle in self._handles:
            handle.remove()


@contextmanager
def telling(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Change the hooks of a module inside while its pre-hooks run, and tell new ones of the call under way.

    Torch has made a list of pre-hooks, but not of the others.
    """
    hooks = module._forward_pre_hooks  # noqa: SLF001 - no other way
    before = set(hooks)
    yield
    for number, hook in list(hooks.items()):
        if number not in before:
            with_kwargs = number in module._forward_pre_hooks_with_kwargs  # noqa: SLF001
            hook(module, args, kwargs) if with_kwargs else hook(module, args)


class _Entry(Hook):
    __slots__ = ("_validation",)

    def __init__(self, validation: Validation) -> None:
        self._validation = validation

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if torch.compiler.is_compiling() or kwargs is None:
            return
        try:
            self._validation.called(module, args, kwargs)
        except Exception as error:  # instrumentation never stops a training
            self._validation.fail(error)
