"""The loop's own numbers: those given to `step` and the learning rates, at every step, and what is known of a run before its first."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stethoscope._parts import describe
from stethoscope._protocols import Key
from stethoscope._shards import local
from stethoscope._tree import tensors

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch.optim import Optimizer

    from stethoscope._record import Record


def by_path(name: str, value: object) -> dict[str, Tensor]:
    """Return the tensors inside of what was given as `name`, by `name`, `name/0`, `name/key` and so on."""
    return {f"{name}/{path.replace('.', '/')}" if path else name: tensor for path, tensor in tensors(value)}


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
    """Return what is known of a run before its first step: its length, that several optimizers share it, the rate that a scheduler scales, that a step has steps inside."""
    # a one-cycle schedule calls its first rate the initial one, and climbs to this
    rates = [group.get("max_lr", group.get("initial_lr")) for each in optimizers for group in each.param_groups]
    known = {
        "plan/steps": steps,
        "plan/optimizers": len(optimizers) if len(optimizers) > 1 else None,
        "plan/lr": max((rate for rate in rates if isinstance(rate, float)), default=None),
        "plan/inner_steps": 1 if any(isinstance(each, torch.optim.LBFGS) for each in optimizers) else None,
    }
    return [stamp._replace(name=name, value=float(value)) for name, value in known.items() if value is not None]


def pretrained(model: nn.Module) -> dict[Key, Tensor]:
    """Return `plan/pretrained`: 1 where some normalisation was trained before, 0 where none was; nothing if there are none.

    Initialisations give its weights one value (1, 0), or at least its biases (DCGAN draws the weights), and training leaves
    no two alike: nothing else in a network tells so surely. Never waits for the device.
    """
    with torch.no_grad():
        # one by one, since a model may be spread over devices
        worn = [torch.stack([(each != each[0]).any() for each in own]).all() for own in _normalisations(model)]
        if not worn:
            return {}
        return {Key("plan/pretrained"): torch.stack([each.to(worn[0].device) for each in worn]).any().float()}


def _normalisations(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield this rank's weights, and biases where there are any, of each layer that is called a norm."""
    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            found = [each for each in module.parameters(recurse=False) if not _is_empty(each) and each.dim() == 1]
            if found:
                yield [local(each) for each in found]


def _is_empty(parameter: nn.Parameter) -> bool:
    lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
    return lazy or parameter.is_meta or not local(parameter).numel()
