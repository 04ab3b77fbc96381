"""The loop's own numbers, recorded at every step: those given to `step`, and the learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

from torch import Tensor

from stethoscope._parts import describe
from stethoscope._protocols import Key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch.optim import Optimizer

    from stethoscope._record import Record


def numbers_of_step(
    named: Mapping[str, object], given: Mapping[str, Tensor], optimizers: Iterable[Optimizer], stamp: Record
) -> tuple[list[Record], dict[Key, Tensor]]:
    """Return what the host has already, as records, and what is still on a device.

    Args:
        named: the arguments of `step`, by name.
        given: all tensors of the step; those of one element that come from `named` are taken.
        optimizers: their groups' learning rates are `lr`, `lr/1` ... in order.
        stamp: the fields that all records share.
    """
    ready = [stamp._replace(name=n, value=_float(v)) for n, v in named.items() if isinstance(v, Real)]
    scalars = {
        Key(name): value for name, value in given.items() if value.numel() == 1 and name.partition("/")[0] in named
    }
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for i, group in enumerate(groups):
        name, rate = f"lr/{i}" if i else "lr", group.get("lr")
        if name in named:
            continue  # the caller knows better: a scheduler may have moved on since the optimizer's step
        if isinstance(rate, Tensor):
            scalars[Key(name)] = rate
        elif rate is not None:
            ready.append(stamp._replace(name=name, value=float(rate)))
    return ready, scalars


def _float(number: Real) -> float | None:
    try:
        return float(number)
    except (ArithmeticError, TypeError, ValueError):  # an integer beyond all floats, a number of a type of its own
        return None


def several(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the optimizers as a tuple, without the wrappers of Accelerate and Fabric, which take no hooks.

    Raises:
        TypeError: one of them is none.
    """
    if optimizer is None:
        return ()
    optimizers = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    for each in optimizers:
        if not hasattr(each, "param_groups"):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer or several, got {describe(each)}.")
    return tuple(map(_unwrapped, optimizers))


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    while hasattr(getattr(optimizer, "optimizer", None), "param_groups"):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]  # a wrapper has it
    return optimizer


def plan(steps: int | None, optimizers: Sequence[Optimizer], stamp: Record) -> list[Record]:
    """Return what is known of a run before its first step: its length, and that several optimizers share it."""
    known = {"plan/steps": steps, "plan/optimizers": len(optimizers) if len(optimizers) > 1 else None}
    return [stamp._replace(name=name, value=float(value)) for name, value in known.items() if value is not None]
