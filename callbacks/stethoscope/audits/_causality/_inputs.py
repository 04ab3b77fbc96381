"""The arguments of one call and what is done to them: made shorter, one item more, perturbed from some step on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

KINDS = ("unit", "high", "low", "faint", "loud", "silent")
"""Perturbations: noise of 1, 0.1 and 100 times the input's rms, 10 rms up, 10 rms down, and zero.

Both signs and large sizes are needed for gates, maxima and sorts over time, the faint one where large ones saturate.
"""


@dataclass(frozen=True)
class Inputs:
    """Positional arguments of the model.

    Args:
        args: what the model is called with, without `lengths`.
        time_axis: time axis of the first argument, as given.
        lengths: valid steps per item, the last argument of the call; None for no such argument.
        batch_axis: None until it is known that there is one.
        kinds: perturbations to choose from.
        noise: what was drawn so far.
    """

    args: tuple[Any, ...]
    time_axis: int
    lengths: Tensor | None = None
    batch_axis: int | None = None
    kinds: tuple[str, ...] = KINDS
    noise: dict[tuple[int, str], Tensor] = field(default_factory=dict[tuple[int, str], Tensor], compare=False)

    @property
    def first(self) -> Tensor:
        """The argument that sets time and batch."""
        tensor: Tensor = self.args[0]
        return tensor

    @property
    def steps(self) -> int:
        """Length along time."""
        return self.first.size(self.time_axis)

    @property
    def items(self) -> int:
        """Batch size, 1 where there is no batch axis."""
        return 1 if self.batch_axis is None else self.first.size(self.batch_axis)

    @cached_property
    def timed(self) -> tuple[int, ...]:
        """Which arguments run along time: the first, and others of its length and batch size that hold real signals."""
        axis, ahead = self.time_axis, self.time_axis % self.first.dim()
        batch = 1 if ahead == 0 else 0

        def alike(tensor: Any) -> bool:
            return (
                isinstance(tensor, Tensor)
                and (tensor.is_floating_point() or tensor.is_complex())
                and -tensor.dim() <= axis < tensor.dim()
                and tensor.dim() > batch
                and self.first.dim() > batch
                and tensor.size(axis) == self.steps
                and tensor.size(batch) == self.first.size(batch)
            )

        return (0, *(i for i, tensor in enumerate(self.args) if i > 0 and alike(tensor)))

    def call(self) -> tuple[Any, ...]:
        """Fresh copies to call the model with: it may write into them."""
        args = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in self.args]
        return (*args, self.lengths.clone()) if self.lengths is not None else tuple(args)

    def resized(self, steps: int) -> Inputs:
        """The same, cut or repeated to `steps`. Masks are cut along every axis that is as long as time."""

        def along(tensor: Tensor, axis: int) -> Tensor:
            times = -(-steps // tensor.size(axis))
            return torch.cat([tensor] * times, dim=axis).narrow(axis, 0, steps)

        args = list(self.args)
        for i, arg in enumerate(self.args):
            if i in self.timed:
                args[i] = along(arg, self.time_axis)
            elif isinstance(arg, Tensor):
                for axis in [axis for axis in range(arg.dim()) if arg.size(axis) == self.steps]:
                    args[i] = along(args[i], axis)
        lengths = None if self.lengths is None else (self.lengths * steps // self.steps).clamp(min=1)
        return replace(self, args=tuple(args), lengths=lengths, noise={})

    def one_more(self, batch_axis: int) -> Inputs:
        """The same with the last item twice."""
        items = self.first.size(batch_axis)

        def grown(arg: Any) -> Any:
            if not isinstance(arg, Tensor) or arg.dim() <= batch_axis or arg.size(batch_axis) != items:
                return arg
            return torch.cat([arg, arg.narrow(batch_axis, items - 1, 1)], dim=batch_axis)

        lengths = None if self.lengths is None else torch.cat([self.lengths, self.lengths[-1:]])
        return replace(self, args=tuple(grown(arg) for arg in self.args), lengths=lengths, noise={})

    def wide(self) -> Inputs:
        """The same in float64."""
        args = [
            arg.to(torch.complex128 if arg.is_complex() else torch.float64)
            if isinstance(arg, Tensor) and (arg.is_complex() or arg.is_floating_point())
            else arg
            for arg in self.args
        ]
        return replace(self, args=tuple(args))

    def perturbed(
        self, start: int, kind: int, *, stop: int | None = None, item: int | None = None, starts: Tensor | None = None
    ) -> Inputs:
        """Change the steps `start <= t < stop`.

        Args:
            start: first step that changes.
            kind: index into `kinds`; item `i` of the batch gets `kind + i`, so that one pass tries several.
            stop: None for the end.
            item: change this item of the batch only.
            starts: start of each item, in place of `start`.
        """
        args = list(self.args)
        for i in self.timed:
            args[i] = self._changed(i, start, self.steps if stop is None else stop, kind, item, starts)
        return replace(self, args=tuple(args))

    def poisoned(self, start: int) -> Inputs:
        """NaN from `start` on."""
        args = list(self.args)
        for i in self.timed:
            args[i] = args[i].clone()
            args[i].narrow(self.time_axis, start, self.steps - start).fill_(float("nan"))
        return replace(self, args=tuple(args))

    def _changed(self, i: int, start: int, stop: int, kind: int, item: int | None, starts: Tensor | None) -> Tensor:
        new: Tensor = self.args[i].clone()
        for b in range(self.items):
            if item is not None and b != item:
                continue
            at = start if starts is None else int(starts[b])
            if at >= stop:
                continue
            name = self.kinds[(kind + b) % len(self.kinds)]
            span = new.narrow(self.time_axis, at, stop - at)
            drawn = self._noise(i, name).narrow(self.time_axis, at, stop - at)
            if self.batch_axis is not None:
                span, drawn = span.narrow(self.batch_axis, b, 1), drawn.narrow(self.batch_axis, b, 1)
            span.copy_(_moved(span, drawn, name, self._levels[i]))
        return new

    @cached_property
    def _levels(self) -> dict[int, Tensor | float]:
        """Rms of signals, or the values that occur in integer inputs."""
        levels: dict[int, Tensor | float] = {}
        for i in self.timed:
            tensor = self.args[i]
            if tensor.is_complex() or tensor.is_floating_point():
                levels[i] = float(tensor.abs().double().square().mean().sqrt()) or 1.0
            else:
                levels[i] = tensor.unique()
        return levels

    def _noise(self, i: int, name: str) -> Tensor:
        """One draw per argument and kind, so that perturbations that start at different steps agree where they overlap."""
        tensor = self.args[i]
        if (i, name) not in self.noise:
            # The global generator belongs to the model.
            generator = torch.Generator().manual_seed(1000 * i + KINDS.index(name))
            dtype = torch.complex128 if tensor.is_complex() else torch.float64
            self.noise[i, name] = torch.randn(tensor.shape, generator=generator, dtype=dtype).to(tensor.device)
        return self.noise[i, name]


def _moved(span: Tensor, noise: Tensor, kind: str, level: Tensor | float) -> Tensor:
    if isinstance(level, Tensor):
        place = torch.searchsorted(level.long(), span.long().contiguous())  # for booleans, too
        return level[(place + 1 + (noise.abs() * 1e3).long() % (len(level) - 1)) % len(level)]
    if kind == "silent":
        return torch.zeros_like(span)
    if kind in ("high", "low"):
        return span + (10 if kind == "high" else -10) * level * (1 + noise.abs()).to(span.dtype)
    size = {"unit": 1.0, "faint": 0.1, "loud": 100.0}[kind] * level
    return span + (size * noise).to(span.dtype)
