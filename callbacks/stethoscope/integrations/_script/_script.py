"""Listens to a whole script through torch's global hooks, and starts a session per trained model."""

from __future__ import annotations

import functools
import logging
import os
import random
import sys
from multiprocessing import parent_process
from multiprocessing.util import Finalize
from threading import local
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
    register_module_module_registration_hook,
)
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from stethoscope._secrets import trace_of
from stethoscope.integrations._keep_out import keeps_out
from stethoscope.integrations._loss import Losses
from stethoscope.integrations._script import _say, _traceback

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.hooks import RemovableHandle

    from stethoscope.integrations._script._session import Session
    from stethoscope.integrations._script._settings import Settings

log = logging.getLogger("stethoscope")

_MOST = 256
"""Outermost calls in train mode after which the search for an optimizer rests, until one steps that nobody knows."""


class _Depth(local):
    value = 0


class Script:
    """What a process of `stethoscope run` does to torch, from its import to the end of the process.

    Hooks on all modules are there only while a model is searched for: from the first call in train mode, at which its optimizer
    is found, to that of the last model whose optimizer is alive, and when an optimizer is gone or an unknown one steps. Hooks of
    optimizers stay.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sessions: list[Session] = []
        self._losses: Losses | None = None
        self._steady: list[RemovableHandle] = []
        self._searching: list[RemovableHandle] = []
        self._wanted = False  # whether these are to be there
        self._compiled: type[nn.Module] | None = None  # torch's wrapper around a compiled module, once there is one
        self._handler, self._propagate = logging.StreamHandler(sys.stderr), True
        self._depth = _Depth()
        self._calls = 0  # outermost ones since the search began, and of these
        self._strange = 0  # such of modules that belong to no session
        self._unknown = 0  # steps of optimizers whose model was not found
        self._own: set[int] = set()  # optimizers of models that the script monitors itself
        self._undo: Callable[[], None] | None = None
        self.given_up = False

    @keeps_out
    def begin(self) -> None:
        """Called once, when torch has been imported."""
        # standard output is the script's: what we log goes to standard error, whatever the script tells its root logger
        self._handler.setLevel(logging.WARNING)
        self._handler.setFormatter(logging.Formatter("stethoscope: %(message)s"))
        log.addHandler(self._handler)
        self._propagate, log.propagate = log.propagate, False
        self._losses = Losses(self._loss_failed)
        self._undo = _traceback.install()
        self._steady.append(register_optimizer_step_pre_hook(self._before_step))
        self._steady.append(register_optimizer_step_post_hook(self._after_step))
        self._steady.append(register_module_module_registration_hook(self._registered))
        self._search()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forked)

    def end(self) -> None:
        """Take everything off, deliver, and say what was seen."""
        self.given_up = True
        for each in (self._take_off, *(session.close for session in self.sessions), self._say):
            try:
                each()
            except Exception as error:
                log.error("Ending `stethoscope run` has failed.\n%s", trace_of(error))  # noqa: TRY400 - as it is
        log.removeHandler(self._handler)
        log.propagate = self._propagate

    def _take_off(self) -> None:
        self._rest()
        for handle in self._steady:
            handle.remove()
        if self._losses is not None:
            self._losses.close()
        if self._undo is not None:
            self._undo()
        if self._compiled is not None:
            self._compiled.__call__ = self._compiled.__call__.__wrapped__  # type: ignore[method-assign, attr-defined]

    def _say(self) -> None:
        over, self.sessions = [each for each in self.sessions if each.steps], []
        _say.sessions(self.settings, over)
        if _say.is_main(self.settings) and not over:
            if self._own:
                _say.say(f"{self.settings.target} monitors its model itself: `run` has kept out of it.")
            else:
                _say.nothing(self.settings)

    def give_up(self, error: Exception) -> None:
        """Say that this has failed, in the files of all models as well, and let go of them."""
        self._rest()
        for session in self.sessions:
            session.give_up(self, error)

    @keeps_out
    def _loss_failed(self, error: Exception) -> None:
        raise error

    @keeps_out
    def _forked(self) -> None:
        """A child begins anew: what its parent observes, the parent writes."""
        sessions, self.sessions = self.sessions, []
        for session in sessions:
            session.abandon()
        if self._losses is not None:
            self._losses.take()  # what the parent's step under way consists of
        self._search()

    # -- the search for what is trained ------------------------------------------------------------------------------

    def _search(self) -> None:
        self._calls = self._strange = 0
        self._wanted = not self.given_up
        self._hook()

    def _rest(self) -> None:
        self._wanted, self._depth = False, _Depth()
        self._unhook()

    def _hook(self) -> None:
        if self._wanted and not self._searching:
            self._searching.append(register_module_forward_pre_hook(self._enter))
            self._searching.append(register_module_forward_hook(self._leave, always_call=True))

    def _unhook(self) -> None:
        while self._searching:
            self._searching.pop().remove()

    @keeps_out
    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling():
            return
        self._depth.value += 1
        if self._depth.value == 1 and module.training and torch.is_grad_enabled():
            self._look_at(module, args)

    @keeps_out
    def _registered(self, parent: nn.Module, name: str, module: nn.Module | None) -> None:
        """A module got a submodule: `torch.compile` has made a wrapper, if it is that."""
        kind = type(parent)
        if self._compiled is None and name == "_orig_mod" and kind.__name__ == "OptimizedModule":
            self._compiled = kind
            kind.__call__ = self._through(kind.__call__)  # type: ignore[method-assign]

    def _through(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Call a compiled module without hooks on all modules: torch warns of these there, and would compile them in."""

        @functools.wraps(original)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not self._searching or torch.compiler.is_compiling():
                return original(module, *args, **kwargs)
            self._enter_compiled(module, args)
            try:
                return original(module, *args, **kwargs)
            finally:
                self._leave_compiled(module)

        return call

    @keeps_out
    def _enter_compiled(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._unhook()
        self._enter(module, args)

    @keeps_out
    def _leave_compiled(self, module: nn.Module) -> None:
        self._leave(module, (), None)
        self._hook()

    @keeps_out
    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if not torch.compiler.is_compiling():
            self._depth.value = max(self._depth.value - 1, 0)

    def _look_at(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._calls += 1
        if self._calls > _MOST:
            self._rest()
        if not any(each.requires_grad for each in module.parameters()) or any(map(_holds(module), self.sessions)):
            return
        self._strange += 1
        if not _power_of_two(self._strange):
            return  # it takes a tenth of a second to look through all objects
        state = random.getstate()  # some packages draw from it when they are imported
        try:
            self._look_for_its_training(module, args)
        finally:
            random.setstate(state)

    def _look_for_its_training(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        from stethoscope.integrations._script._find import training_of
        from stethoscope.integrations._script._session import Session, folder
        from stethoscope.integrations._validation import telling

        found = training_of(module)
        if found is not None:
            self._calls = self._strange = 0
            if found.monitor is not None:
                self._own |= {id(each) for each in found.optimizers}
            else:
                to = folder(self.settings.to, type(found.root).__name__, {each.to for each in self.sessions})
                with telling(module, args, {}):
                    self.sessions.append(Session(found, module, self.settings, to, self._gone))
                if parent_process() is not None:
                    Finalize(None, self.end, exitpriority=100)  # a child of multiprocessing runs no atexit
            if all(id(each) in self._own or self._session_of(each) for each in found.others):
                self._rest()

    @keeps_out
    def _gone(self, session: Session) -> None:
        """The script has let go of a model."""
        session.close()
        self._search()

    # -- steps -------------------------------------------------------------------------------------------------------

    @keeps_out
    def _before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        losses = self._losses
        if losses is None or torch.compiler.is_compiling():
            return
        losses.stepping = True
        session = self._session_of(optimizer)
        if session is None:
            self._unknown += id(optimizer) not in self._own
            if _power_of_two(self._unknown):
                self._search()
        else:
            session.before_step(optimizer, losses.peek() if self.settings.guard else None)

    @keeps_out
    def _after_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        losses = self._losses
        if losses is None or torch.compiler.is_compiling():
            return
        losses.stepping = False
        loss: Tensor | None = losses.take()
        session = self._session_of(optimizer)
        if session is not None:
            session.after_step(optimizer, loss)

    def _session_of(self, optimizer: Optimizer) -> Session | None:
        return next((each for each in self.sessions if each.monitor is not None and each.owns(optimizer)), None)


def _power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def _holds(module: nn.Module) -> Callable[[Session], bool]:
    return lambda session: session.monitor is not None and session.holds(module)
