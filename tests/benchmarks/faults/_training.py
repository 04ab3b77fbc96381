"""`Training`: the pieces of one small training program, each of which a fault may replace, and the loop over them."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from contextlib import AbstractContextManager

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

Batch: TypeAlias = tuple[Tensor, ...]
Tensors: TypeAlias = dict[str, Tensor]
Hook: TypeAlias = "Callable[[Training, int], None]"


class Observer(Protocol):
    """Who looks at a training: ours, or a peer's adapter."""

    def start(self, training: Training) -> None: ...
    def backward_done(self, training: Training, step: int) -> None: ...
    def step(self, training: Training, step: int, batch: Batch, tensors: Tensors) -> None: ...
    def phase(self, name: str) -> AbstractContextManager[object]: ...
    def log(self, metrics: Mapping[str, object], phase: str, step: int) -> None: ...


def plain_update(t: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
    """The loop of every tutorial, with accumulation, clipping and a gradient scaler where asked for."""
    t.optimizer.zero_grad()
    for part in range(t.accumulate):
        batch = t.sample(step * t.accumulate + part, "train")
        with t.autocast():
            tensors = t.forward(t.model, batch)
        loss = tensors["loss"] / t.accumulate
        (t.scaler.scale(loss) if t.scaler else loss).backward()
    finish_update(t, step, observer)
    return batch, tensors


def finish_update(t: Training, step: int, observer: Observer) -> None:
    """From gradients to weights."""
    if t.scaler:
        t.scaler.unscale_(t.optimizer)
    for hook in t.after_backward:
        hook(t, step)
    observer.backward_done(t, step)
    if t.clip is not None:
        nn.utils.clip_grad_norm_(t.model.parameters(), t.clip)
    if t.scaler:
        t.scaler.step(t.optimizer)
        t.scaler.update()
    else:
        t.optimizer.step()
    if t.scheduler:
        t.scheduler.step()


def clipped_before_unscaling_update(t: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
    """With a gradient scaler, clipped to 1 while gradients are still multiplied by its scale: a mistake."""
    t.optimizer.zero_grad()
    batch = t.sample(step, "train")
    with t.autocast():
        tensors = t.forward(t.model, batch)
    t.scaler.scale(tensors["loss"]).backward()
    observer.backward_done(t, step)
    nn.utils.clip_grad_norm_(t.model.parameters(), 1.0)
    t.scaler.step(t.optimizer)
    t.scaler.update()
    return batch, tensors


def update_of_two(t: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
    """One backward pass, after which a second optimizer steps as well."""
    t.optimizers[1].zero_grad()
    seen = plain_update(t, step, observer)
    t.optimizers[1].step()
    return seen


def plain_validation(t: Training, step: int, observer: Observer) -> None:
    """Two batches in eval mode, their metrics averaged."""
    t.model.eval()
    metrics: dict[str, list[object]] = {}
    with observer.phase("val"), torch.no_grad(), t.autocast():
        for i in range(2):
            batch = t.sample(step * 2 + i, "val")
            tensors = t.forward(t.model, batch)
            for name, value in {"loss": float(tensors["loss"]), **t.measure(tensors, batch)}.items():
                metrics.setdefault(name, []).append(value)
    observer.log({name: mean_of(values) for name, values in metrics.items()}, "val", step)


def mean_of(values: list[object]) -> object:
    """Of numbers; anything else as it is."""
    return sum(values) / len(values) if all(isinstance(v, (int, float)) for v in values) else values[0]


def seeded(*key: int) -> torch.Generator:
    """A random state of its own for each batch, so that nobody who looks can change the data."""
    return torch.Generator().manual_seed(hash(key) % 2**31)


@dataclass
class Training:
    """One training program.

    Args:
        model: what is trained.
        sample: `(step, phase) -> batch`; the first tensor is what the model is given.
        forward: `(model, batch) -> tensors`, among them `"loss"`: what the loop computes and shows to an observer.
        measure: `(tensors, batch) -> metrics` of a validation batch.
        optimize: builds the optimizer from parameters, when the loop starts: model surgery before that is no fault.
        schedule: builds the scheduler; it is stepped after each optimizer step.
        precision: dtype of autocast; None switches it off.
        scaled: whether a `GradScaler` is used.
        before, after_backward, after_step: called with the training and the step.
        update: one optimizer step, `(training, step, observer) -> (batch, tensors)`.
    """

    model: nn.Module
    sample: Callable[[int, str], Batch]
    forward: Callable[[nn.Module, Batch], Tensors]
    measure: Callable[[Tensors, Batch], dict[str, object]]
    optimize: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Callable[[Optimizer], LRScheduler] | None = None
    steps: int = 300
    val_every: int = 50
    clip: float | None = None
    accumulate: int = 1
    precision: torch.dtype | None = None
    scaled: bool = False
    before: list[Hook] = field(default_factory=list)
    after_backward: list[Hook] = field(default_factory=list)
    after_step: list[Hook] = field(default_factory=list)
    update: Callable[[Training, int, Observer], tuple[Batch, Tensors]] = plain_update
    validate: Callable[[Training, int, Observer], None] = plain_validation
    optimizers: list[Optimizer] = field(default_factory=list)
    scheduler: LRScheduler | None = None
    scaler: torch.amp.GradScaler | None = None

    @property
    def optimizer(self) -> Optimizer:
        """The one that `plain_update` steps."""
        return self.optimizers[0]

    def prepare(self) -> None:
        """Build what depends on the model as it is now. A fault that builds its own optimizer goes before."""
        if not self.optimizers:
            self.optimizers = [self.optimize(p for p in self.model.parameters() if p.requires_grad)]
        self.scheduler = self.schedule(self.optimizer) if self.schedule else None
        self.scaler = torch.amp.GradScaler("cpu") if self.scaled else None

    def run(self, observer: Observer) -> list[float]:
        """Train; return the loss of each step."""
        self.prepare()
        observer.start(self)
        losses = []
        for step in range(self.steps):
            for hook in self.before:
                hook(self, step)
            self.model.train()
            batch, tensors = self.update(self, step, observer)
            for hook in self.after_step:
                hook(self, step)
            observer.step(self, step, batch, tensors)
            losses.append(float(tensors["loss"].detach()))
            if (step + 1) % self.val_every == 0:
                self.validate(self, step, observer)
        return losses

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision, where asked for."""
        return nullcontext() if self.precision is None else torch.autocast("cpu", self.precision)
