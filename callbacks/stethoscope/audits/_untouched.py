"""Run somebody's functions and leave no trace: what they can reach is put back afterwards."""

from __future__ import annotations

import copy
import functools
import inspect
import random
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from stethoscope._aside import aside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DEPTH = 3
"""Attributes of attributes that are followed: a bound method's object, its trainer, the trainer's model."""
WIDTH = 100
"""Entries of a collection that are followed: beyond that it is data."""
MOST = 10_000
"""Objects looked at before the search ends."""


@contextmanager
def untouched(*functions: Callable[..., Any]) -> Iterator[list[nn.Module]]:
    """Put back what calls of `functions` change; yield the outermost modules that they reach.

    Put back: parameters, buffers, gradients and training flags of modules, whatever has `state_dict` and
    `load_state_dict` (optimizers, schedulers, scalers), and the random states of Python, NumPy and torch. Not put back:
    plain Python attributes, files, and what cannot be reached through closures, bound objects, defaults, `partial` and
    globals that the functions name. A monitor does not read these calls. Costs one copy of the weights.
    """
    reached = list(_reached(functions))
    modules = {id(module): module for thing in reached if isinstance(thing, nn.Module) for module in thing.modules()}
    stateful = [thing for thing in reached if not isinstance(thing, nn.Module)]
    tensors = {id(tensor): tensor for module in modules.values() for tensor in _own(module)}
    values = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    gradients = [
        (tensor, tensor.grad, None if tensor.grad is None else tensor.grad.clone())
        for tensor in tensors.values()
        if tensor.is_leaf
    ]
    # The same tensor objects are put back, and the global random states are what user code draws from.
    buffers = [(module, dict(module._buffers), module.training) for module in modules.values()]  # noqa: SLF001
    states = [(thing, copy.deepcopy(thing.state_dict())) for thing in stateful]
    seeds = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    inner = {id(child) for module in modules.values() for child in module.children()}
    try:
        with aside():
            yield [module for name, module in modules.items() if name not in inner]
    finally:
        with torch.no_grad():
            # by way of .data: a graph that the caller still holds must not see a change
            for tensor, value in values:
                tensor.data.copy_(value)
            for tensor, gradient, before in gradients:
                tensor.grad = gradient
                if gradient is not None and before is not None:
                    gradient.data.copy_(before)
        for module, held, training in buffers:
            for name, buffer in held.items():  # a scripted module's buffers have no update
                module._buffers[name] = buffer  # noqa: SLF001
            module.training = training
        for thing, state in states:
            thing.load_state_dict(state)
        random.setstate(seeds[0])
        np.random.set_state(seeds[1])  # noqa: NPY002
        torch.set_rng_state(seeds[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


def _own(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _reached(functions: tuple[Callable[..., Any], ...]) -> Iterator[Any]:
    """Yield modules and whatever else can save and load its state."""
    seen: set[int] = set()
    queue: list[tuple[Any, int]] = [(function, 0) for function in functions]
    while queue and len(seen) < MOST:
        thing, depth = queue.pop(0)
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if inspect.isclass(thing) or inspect.ismodule(thing):
            continue
        if isinstance(thing, nn.Module):
            yield thing
            continue
        if type(thing).__module__.startswith("stethoscope."):
            continue  # a monitor's state is not the training's
        if all(callable(getattr(type(thing), name, None)) for name in ("state_dict", "load_state_dict")):
            yield thing
        queue += [(other, depth + 1) for other in _held(thing)] if depth <= DEPTH else []


def _held(thing: Any) -> Iterator[Any]:
    if isinstance(thing, functools.partial):
        yield from (thing.func, *thing.args, *thing.keywords.values())
    elif inspect.ismethod(thing):
        yield from (thing.__self__, thing.__func__)
    elif inspect.isfunction(thing):
        yield getattr(thing, "__wrapped__", None)
        held = inspect.getclosurevars(thing)
        yield from (*held.nonlocals.values(), *held.globals.values(), *(thing.__defaults__ or ()))
    elif isinstance(thing, dict):
        yield from islice(thing.values(), WIDTH)
    elif isinstance(thing, list | tuple | set):
        yield from islice(thing, WIDTH)
    elif not isinstance(thing, torch.Tensor):
        yield from getattr(thing, "__dict__", {}).values()
