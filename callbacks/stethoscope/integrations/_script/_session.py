"""One trained model of a script and its monitor, driven from outside."""

from __future__ import annotations

import logging
import weakref
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from stethoscope import presets
from stethoscope._aside import is_aside
from stethoscope._monitor import Monitor
from stethoscope._run import new_run
from stethoscope._tree import unwrap
from stethoscope.integrations._script._find import parameters_of
from stethoscope.probes._hook import Hook, takes_hooks
from stethoscope.sinks._jsonl import file_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn
    from torch.optim import Optimizer

    from stethoscope._record import Finding
    from stethoscope.integrations._script._find import Training
    from stethoscope.integrations._script._settings import Settings


class Session:
    """Observes one model from its first training call to the end of the script, or of its optimizer.

    A step ends when the model's optimizers have stepped, each once. Calls in eval mode without gradients are the phase
    `val`, at most once in `every` steps, since a script may call the model so between any two steps.

    Args:
        training: what was found.
        called: the module whose call is under way.
        settings: what `stethoscope run` was told.
        to: where to write.
        gone: called when the script has let go of the model's optimizers.
    """

    def __init__(
        self, training: Training, called: nn.Module, settings: Settings, to: str, gone: Callable[[], None]
    ) -> None:
        root, optimizers = training.root, training.optimizers
        chosen: Any = {} if settings.preset == "none" else getattr(presets, settings.preset)()
        self.monitor: Monitor | None = Monitor(
            root,
            # only the guard needs them, and whoever holds them keeps the script from letting go of its model
            optimizers if settings.guard else None,
            sinks=[to],
            every=settings.every,
            guard=settings.guard,
            planned_steps=settings.planned_steps,
            **chosen,
        )
        self.name, self.to, self.steps = type(root).__name__, to, 0
        self.run = new_run(root, None, settings.every)
        self._findings: list[Finding] = []
        self._every, self._validated = settings.every, -settings.every
        self._parameters = {id(each) for each in root.parameters()}
        self._made = root if training.made else None
        self._active = {_key(each) for each in optimizers}  # optimizers that a step consists of
        self._stepped: set[int] = set()  # of these, in the step under way
        self._rates: list[float | Tensor] = []  # of these
        self._thread = get_ident()
        self._phase = ExitStack()
        self._validating = False
        # called itself and, since validation may go round DDP, what it wraps
        self._called = [each for each in dict.fromkeys((called, unwrap(called))) if takes_hooks(each)]
        self._handles = [
            each.register_forward_pre_hook(_Entry(self), with_kwargs=True, prepend=True) for each in self._called
        ]
        self._ended = [weakref.finalize(each, self._optimizer_gone) for each in optimizers]
        for each in self._ended:
            each.atexit = False
        self._living, self._gone = len(optimizers), gone

    @property
    def written(self) -> bool:
        """Whether there is a file."""
        return file_of(self.to, self.run.rank).exists()

    @property
    def findings(self) -> list[Finding]:
        """What was found so far."""
        return self._findings if self.monitor is None else self.monitor.findings

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is this model or a part of it."""
        return any(id(each) in self._parameters for each in module.parameters())

    def owns(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer trains this model."""
        return _key(optimizer) in self._active or bool(parameters_of(optimizer) & self._parameters)

    def before_step(self, loss: Tensor | None) -> None:
        """An optimizer is about to write: the guard wants the loss."""
        if self.monitor is not None and loss is not None:
            self.monitor.observe(loss=loss)

    def after_step(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """Close the step when all of the model's optimizers have made theirs."""
        if self.monitor is None or get_ident() != self._thread:
            return
        self._leave()
        key = _key(optimizer)
        if key in self._stepped:
            self._active = set(self._stepped)  # the others do not step each time
        self._active.add(key)
        self._stepped.add(key)
        self._rates += [group["lr"] for group in optimizer.param_groups if "lr" in group]
        if self._stepped >= self._active:
            rates = {f"lr/{i}" if i else "lr": rate for i, rate in enumerate(self._rates)}
            self._stepped, self._rates = set(), []
            self.steps += 1
            self.monitor.step(**({} if loss is None else {"loss": loss}), **rates)

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called: in a validation or not?"""
        if self.monitor is None or get_ident() != self._thread or is_aside():
            return
        if self._made is not None:
            self._made.training = module.training
        validating = not module.training and not torch.is_grad_enabled()
        if validating and not self._validating and self.steps - self._validated >= self._every:
            with telling(module, args, kwargs):
                self._phase.enter_context(self.monitor.phase("val"))
            self._validating, self._validated = True, self.steps
        elif not validating and self._validating:
            with telling(module, args, kwargs):
                self._leave()

    def _leave(self) -> None:
        self._validating = False
        self._phase.close()

    def _optimizer_gone(self) -> None:
        """The script has let go of an optimizer: without one, it may want its model's memory back."""
        self._living -= 1
        if self._living == 0 and get_ident() == self._thread:
            self.close()
            self._gone()

    def close(self) -> None:
        """Deliver everything and let go of the model."""
        monitor, self.monitor = self.monitor, None
        if monitor is None:
            return
        for handle in self._handles:
            handle.remove()
        for each in self._ended:
            each.detach()
        try:
            self._leave()
        finally:
            monitor.close()
            self._findings = monitor.findings
            for module in self._called:
                tidy(module)
            self._called, self._made = [], None

    def abandon(self) -> None:
        """Do nothing any more, and write nothing: this process is a fork, and the files are its parent's."""
        self.monitor = None


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
    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        try:
            self._session.enter(module, args, kwargs)
        except Exception:  # instrumentation never stops a training
            self._session.abandon()
            logging.getLogger("stethoscope").exception("`stethoscope run` keeps out of the training from here on.")


def _key(optimizer: Optimizer) -> int:
    """Tell optimizers apart, and see through wrappers: an id that stays when a state is loaded."""
    return next((id(each) for group in optimizer.param_groups for each in group["params"]), id(optimizer))


def folder(to: str, name: str, taken: set[str]) -> str:
    """Choose where a model writes: the first one to the run folder itself, further ones below it, by their class.

    Example:
        >>> folder("runs/gan", "Critic", {"runs/gan"}), folder("a.jsonl", "Critic", {"a.jsonl"})
        ('runs/gan/Critic', 'a.Critic.jsonl')
    """
    if to not in taken:
        return to
    path, number = Path(to), 1
    while True:
        label = f"{name}-{number}" if number > 1 else name
        chosen = path.with_suffix(f".{label}.jsonl") if path.suffix == ".jsonl" else path / label
        if chosen.as_posix() not in taken:
            return chosen.as_posix()
        number += 1
