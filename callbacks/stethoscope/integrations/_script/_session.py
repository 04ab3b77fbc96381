"""One trained model of a script and its monitor, driven from outside."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

from stethoscope import presets
from stethoscope._monitor import Monitor
from stethoscope._run import new_run
from stethoscope._tree import unwrap
from stethoscope.integrations._script._find import parameters_of
from stethoscope.integrations._validation import Validation
from stethoscope.sinks._jsonl import file_of

if TYPE_CHECKING:
    from collections.abc import Callable

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
        gone: called with this session when the script has let go of the model's optimizers.
    """

    def __init__(
        self, training: Training, called: nn.Module, settings: Settings, to: str, gone: Callable[[Session], None]
    ) -> None:
        root, optimizers = training.root, training.optimizers
        self.monitor: Monitor | None = None
        self._validation: Validation | None = None
        self.name, self.to, self.steps = type(root).__name__, to, 0
        self._place = settings.place(to)
        self.run = new_run(root, None, settings.every)
        self._findings: list[Finding] = []
        self._every, self._validated = settings.every, -settings.every
        self._parameters = {id(each) for each in root.parameters()}
        self._active = {_key(each) for each in optimizers}  # optimizers that a step consists of
        self._stepped: set[int] = set()  # of these, in the step under way
        self._made: dict[int, int] = {}  # steps of each, and how many there were when its step under way began
        self._begun: dict[int, int] = {}
        self._rates: list[float | Tensor] = []  # of these
        self._thread, self._process = get_ident(), os.getpid()
        self._living, self._gone = len(optimizers), gone
        self._ended = [weakref.finalize(each, self._optimizer_gone) for each in optimizers]
        for each in self._ended:
            each.atexit = False
        chosen: Any = {} if settings.preset == "none" else getattr(presets, settings.preset)()
        monitor = Monitor(
            root,
            # only the guard needs them, and whoever holds them keeps the script from letting go of its model
            optimizers if settings.guard else None,
            sinks=[str(settings.place(to))],
            every=settings.every,
            guard=settings.guard,
            planned_steps=settings.planned_steps,
            **chosen,
        )
        # called itself and, since validation may go round DDP, what it wraps
        entries, container = [called, unwrap(called)], root if training.made else None
        self._validation = Validation(monitor, entries, self._may_validate, container)
        self.monitor = monitor  # last: if anything fails, it is dropped, and takes its hooks along

    @property
    def written(self) -> bool:
        """Whether there is a file."""
        return file_of(self._place, self.run.rank).exists()

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

    def before_step(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """An optimizer is about to write: the guard, where there is one, wants the loss."""
        key = _key(optimizer)
        self._begun[key] = self._made.get(key, 0)
        if self.monitor is not None and loss is not None:
            self.monitor.observe(loss=loss)

    def after_step(self, optimizer: Optimizer, loss: Tensor | None) -> None:
        """Close the step when all of the model's optimizers have made theirs."""
        if self.monitor is None or get_ident() != self._thread:
            return
        if self._validation is not None:
            self._validation.leave()
        key = _key(optimizer)
        if self._made.get(key, 0) > self._begun.get(key, 0):
            return  # it wraps one that has just stepped, as SAM and Lookahead do
        self._made[key] = self._made.get(key, 0) + 1
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

    def _may_validate(self) -> bool:
        if self.steps - self._validated < self._every:
            return False
        self._validated = self.steps
        return True

    def _optimizer_gone(self) -> None:
        """The script has let go of an optimizer: without one, it may want its model's memory back."""
        self._living -= 1
        if self._living == 0 and get_ident() == self._thread:
            self._gone(self)

    def give_up(self, part: object, error: Exception) -> None:
        """Say in this model's file that `part` has failed, and let go of the model."""
        if self.monitor is not None and self._process == os.getpid():
            self.monitor._notes.disabled(part, "integration", error)  # noqa: SLF001 - it is one of its parts
        self.close()

    def close(self) -> None:
        """Deliver everything and let go of the model."""
        if self._process != os.getpid():
            self.abandon()
            return
        monitor, self.monitor = self.monitor, None
        validation, self._validation = self._validation, None
        if monitor is None or validation is None:
            return
        for each in self._ended:
            each.detach()
        try:
            validation.close()
        finally:
            monitor.close()
            self._findings = monitor.findings

    def abandon(self) -> None:
        """Take off what measures, and write nothing: this process is a fork, and the files are its parent's."""
        monitor, self.monitor = self.monitor, None
        if monitor is not None:
            monitor._closed = True  # noqa: SLF001 - close() would wait for threads that did not come along
            monitor._probing.detach()  # noqa: SLF001
            if monitor._guard is not None:  # noqa: SLF001
                monitor._guard.detach()  # noqa: SLF001
        if self._validation is not None:
            self._validation.abandon()


def _key(optimizer: Optimizer) -> int:
    """Tell optimizers apart, and see through wrappers: an id that stays when a state is loaded."""
    return next((id(each) for group in optimizer.param_groups for each in group["params"]), id(optimizer))


def folder(to: str, name: str, taken: set[str]) -> str:
    """Choose where a model writes: the first one to the run folder itself, further ones below it, by their class.

    Examples:
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
